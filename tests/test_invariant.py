"""Batch invariance: rows that depend on nothing but themselves, and models that decode what one forward pass gives.

On a CPU; GPUs: tests/kernels/test_triton_invariant.py.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfbyte as hb
from halfbyte import ops
from halfbyte.invariant import batch_invariant, disable, enable
from halfbyte.invariant.mode import _Mode
from halfbyte.numerics import rows
from halfbyte.ops import invariant
from halfbyte.recipe import LayerOverride, LayerRecipe, TrainingRecipe

from .check import close, equal, same_bits, true
from .test_linear import OFFSETS, PAIRS, expert_operands, operands, sums

ROW = hb.NVFP4(scaling="row")


# --- matmuls --------------------------------------------------------------------------------------------------------


def lanes(a: Tensor, b: Tensor) -> Tensor:
    """The dot product as kernels/cpu/invariant.py writes it down, one torch operation for each rounding."""
    total = torch.zeros(a.shape[0], b.shape[0], 16)
    products = a.float()[:, None] * b.float()[None]
    for start in range(0, a.shape[1], 16):
        part = products[..., start : start + 16]
        total[..., : part.shape[-1]] += part
    for step in (8, 4, 2, 1):
        total = total[..., :step] + total[..., step:]
    return total[..., 0]


def test_the_order_of_a_matmul(rng) -> None:
    for m, n, k in ((3, 5, 64), (1, 9, 37), (7, 2, 500)):
        a, b = (torch.randn(r, k, generator=rng).bfloat16() for r in (m, n))
        found = ops.scaled_matmul(a, b, None, None, out_dtype=torch.float32, batch_invariant=True)
        same_bits(found, lanes(a, b), f"{m}×{n}×{k}")


@pytest.mark.parametrize("pair", [p for p in PAIRS if not p.startswith("tensor")])
def test_linear_does_not_depend_on_the_batch(rng, pair: str) -> None:
    x, w = operands(rng, pair, 70, 48, 160)
    bias = torch.randn(48, generator=rng)
    whole = hb.linear(x, w, bias, batch_invariant=True, out_dtype=torch.float32)
    exact, error = sums(x) @ sums(w).mT + bias, sums(x).abs() @ sums(w).abs().mT
    close(whole, exact, (160 + 3) * 2.0**-24 * (error + bias.abs()))
    for start, end in ((0, 1), (3, 4), (69, 70), (5, 38), (0, 64)):
        part = hb.linear(x[start:end], w, bias, batch_invariant=True, out_dtype=torch.float32)
        same_bits(part, whole[start:end], f"rows {start} to {end}")


def test_an_ordinary_matmul_does(rng) -> None:
    """Else the tests here would show nothing."""
    x, w = torch.randn(300, 700, generator=rng), torch.randn(64, 700, generator=rng)
    true(not all(torch.equal((x @ w.mT)[:m], x[:m] @ w.mT) for m in (1, 2, 3, 5, 17)), "torch is batch-invariant here")


@pytest.mark.parametrize("ends", list(OFFSETS.values()), ids=list(OFFSETS))
def test_grouped_linear_is_linear(rng, ends: list[int]) -> None:
    x, w = expert_operands(rng, ROW, hb.NVFP4())
    offsets = torch.tensor(ends, dtype=torch.int32)
    found = hb.grouped_linear(x, w, offsets, batch_invariant=True)
    start = 0
    for expert, end in enumerate(ends):
        part = hb.linear(x[start:end], w[expert], batch_invariant=True)
        same_bits(found[start:end], part, f"expert {expert}")
        start = end
    equal(found[start:].abs().sum().item(), 0.0)


def test_threads_share_results_not_sums(rng) -> None:
    a, b = torch.randn(40, 2000, generator=rng), torch.randn(300, 2000, generator=rng)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(ops.scaled_matmul(a, b, None, None, out_dtype=torch.float32, batch_invariant=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same_bits(other, found[0])


def test_what_cannot_be(rng) -> None:
    x, w = operands(rng, "row, tensor", 4, 16, 32)
    with pytest.raises(hb.FormatError, match="accumulate_into with batch_invariant=True"):
        hb.linear(x, w, batch_invariant=True, accumulate_into=torch.zeros(4, 16))
    with pytest.raises(hb.UnsupportedError, match="impl='reference' on cpu: needs impl='cpu'"):
        hb.linear(x, w, batch_invariant=True, impl="reference")
    with pytest.raises(hb.FormatError, match="one scale for all tokens depends on the batch"):
        TrainingRecipe(hb.NVFP4(), hb.NVFP4(), batch_invariant=True)
    override = LayerOverride(LayerRecipe(ROW), match=("*.q_proj",))
    with pytest.raises(hb.FormatError, match="all layers are, or none is"):
        TrainingRecipe(ROW, hb.NVFP4(), batch_invariant=True, overrides=(override,))


# --- the mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 31, 4096, 4097, 9000])
def test_row_sum(rng, n: int) -> None:
    x = torch.randn(7, n, generator=rng)
    found = rows.row_sum(x)
    close(found, x.double().sum(-1), 2.0**-22 * x.double().abs().sum(-1))
    same_bits(rows.row_sum(x[3:4]), found[3:4])
    same_bits(invariant.row_sum(x), found)


FUNCTIONS = {
    "linear": lambda x: F.linear(x, torch.arange(96.0 * 40).view(40, 96).sin(), torch.arange(40.0)),
    "matmul": lambda x: x @ torch.arange(96.0 * 40).view(96, 40).cos(),
    "mean": lambda x: x.pow(2).mean(-1, keepdim=True),
    "sum": lambda x: x.sum(dim=(1, 2)),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax of another": lambda x: torch.softmax(x, 1),
    "rms_norm": lambda x: F.rms_norm(x, (96,), torch.arange(96.0), 1e-6),
    "layer_norm": lambda x: F.layer_norm(x, (96,), torch.arange(96.0), torch.ones(96)),
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "power": lambda x: x.abs() ** 1.7,
    "power of a number": lambda x: 2.7**x,
    "sinh": torch.sinh,
    "sums and differences": lambda x: torch.add(x, x.clamp(0, 1), alpha=1) - 0.3 + x - (2 - x),
    "cos": torch.cos,
    "topk": lambda x: torch.topk(x.float() + torch.arange(96) * 1e-4, 5).values,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(rng, name: str, dtype: torch.dtype) -> None:
    """Close to torch's, in forward and backward, and the same for a token alone."""

    def call(x: Tensor) -> Tensor:
        given = x.float() if name in ("linear", "matmul", "rms_norm", "layer_norm") else x
        return FUNCTIONS[name](given)

    x = torch.randn(13, 5, 96, generator=rng).to(dtype)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    wanted = call(theirs)
    with batch_invariant():
        found = call(mine)
        for i in (0, 7, 12):
            same_bits(call(x[i : i + 1]), found.detach()[i : i + 1], f"{name} of {i}")
    equal((found.dtype, found.shape), (wanted.dtype, wanted.shape))
    size = wanted.detach().double().abs().amax() + 1e-3
    close(found.detach(), wanted.detach(), size * (2e-6 if found.dtype == torch.float32 else 2.0**-7))
    dy = torch.randn(wanted.shape, generator=rng).to(wanted.dtype)
    wanted.backward(dy)
    found.backward(dy)
    close(
        mine.grad, theirs.grad, (theirs.grad.double().abs().amax() + 1e-3) * (1e-5 if dtype == torch.float32 else 0.02)
    )


ELEMENTWISE = {
    **{name: FUNCTIONS[name] for name in ("silu", "gelu", "sigmoid", "exp", "power", "power of a number", "cos")},
    "rsqrt": lambda x: (x.abs() + 0.5).rsqrt(),
    "atanh": lambda x: torch.atanh(x.clamp(-0.9, 0.9)),
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sums": FUNCTIONS["sums and differences"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_functions_at_any_place(rng, dtype: torch.dtype) -> None:
    """In a vector of the CPU's, or among the elements that are left over at its end: of torch's own, many differ."""
    x = torch.randn(4096 * 3 + 37, generator=rng).to(dtype)
    places = [slice(i, i + n) for i in (0, 1, 777, 5001, len(x) - 20) for n in (1, 3, 17)]
    depends = set()
    for name, function in ELEMENTWISE.items():
        ordinary = function(x)
        depends |= {name} if any(not torch.equal(function(x[p].clone()), ordinary[p]) for p in places) else set()
        with batch_invariant():
            whole = function(x)
            for place in places:
                same_bits(function(x[place].clone()), whole[place], f"{name}, {place}")
    true(depends - {"sums"} or not torch.backends.cpu.get_cpu_capability().startswith("AVX"), "this shows nothing")


def test_what_backward_computes_again_is_under_the_mode(rng) -> None:
    """Tensor.backward takes the mode off while it runs; a checkpoint's forward pass puts it on again."""
    seen: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        with batch_invariant():
            seen.append(any(isinstance(m, _Mode) for m in torch.overrides._get_current_function_mode_stack()))
            return x.exp()

    x = torch.randn(3, 8, generator=rng).requires_grad_()
    with batch_invariant():
        torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).square().sum().backward()
    equal(seen, [True, True])


def test_ties_in_topk() -> None:
    with batch_invariant():
        values, indices = torch.tensor([[1.0, 3, 2, 3, 3]]).topk(2)
    equal((values.tolist(), indices.tolist()), ([[3.0, 3.0]], [[1, 3]]))


def test_the_mode_refuses_what_it_does_not_know() -> None:
    x = torch.randn(2, 3, 3)
    calls = [
        lambda: torch.bmm(x, x), lambda: x @ x, lambda: torch.einsum("bij,bjk->bik", x, x), lambda: x.cumsum(-1),
        lambda: F.scaled_dot_product_attention(x, x, x), lambda: F.conv1d(x, x), lambda: x.var(-1),
        lambda: torch.add(x, x, alpha=1.7), lambda: x.clone().sub_(x, alpha=2), lambda: torch.atan2(x, x),
        lambda: torch.logaddexp(x, x),
    ]  # fmt: skip
    for call in calls:
        call()
        with batch_invariant(), batch_invariant(), pytest.raises(hb.UnsupportedError, match="not known to be"):
            call()
    with batch_invariant():
        equal(torch.arange(3).cumsum(-1).tolist(), [0, 1, 3])  # integers have no order
    torch.bmm(x, x)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention(rng, window: int | None, softcap: float | None) -> None:
    """A query alone, with the keys that it attends to and no others, gives what it gives in the whole."""
    q, k, v = (torch.randn(2, heads, 21, 16, generator=rng).bfloat16() for heads in (6, 2, 2))
    i = torch.arange(21)
    seen = i[None] <= i[:, None]
    if window:
        seen = seen & (i[None] > i[:, None] - window)
    mask = seen.expand(2, 1, 21, 21).clone()
    mask[1, :, :, :4] = False  # padding on the left
    found = invariant.attention(q, k, v, mask, scaling=0.3, softcap=softcap)
    scores = q.double() @ k.double().repeat_interleave(3, 1).mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    close(found, shares @ v.double().repeat_interleave(3, 1), 0.02)
    for b, at in ((0, 0), (0, 20), (1, 4), (1, 20)):
        keys = mask[b, 0, at].nonzero()[:, 0]
        alone = [t[b : b + 1, :, keys] for t in (k, v)]
        whole = torch.ones(1, 1, 1, len(keys), dtype=torch.bool)
        one = invariant.attention(q[b : b + 1, :, at : at + 1], *alone, whole, scaling=0.3, softcap=softcap)
        same_bits(one[0, :, 0], found[b, :, at], f"query {at} of {b}")
    equal(found[1, :, :4].abs().sum().item(), 0.0)
    with pytest.raises(hb.ShapeError, match=r"mask is torch\.bool \(2, 1, 21, 20\); needs"):
        invariant.attention(q, k, v, mask[..., :20], scaling=1.0)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_the_bounds_of_each_query() -> None:
    rows = ["1110", "0111", "0110", "1011", "0101", "0000", "1111"]
    mask = torch.tensor([[c == "1" for c in row] for row in rows])[None, None]
    first, until, last = invariant.key_bounds(mask)
    equal(first[0].tolist(), [0, 1, 1, 0, 1, 0x7FFFFFFF, 0])
    equal(until[0, [0, 1, 2, 3, 4, 6]].tolist(), [3, 4, 3, 1, 2, 4])
    equal(last[0].tolist(), [3, 4, 3, 4, 4, 0, 4])


def test_enable_and_disable(rng) -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, x)

    model = nn.Sequential(nn.Linear(24, 24), Scores())
    x = torch.randn(2, 24, 24, generator=rng)
    wanted = model(x)
    enable(model)
    enable(model)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(hb.UnsupportedError, match="bmm with these arguments"):
            one(x)
    torch.bmm(x, x)  # left again, though it raised
    disable(model)
    disable(model)
    same_bits(model(x), wanted)
