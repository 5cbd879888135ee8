"""Batch-invariant kernels: every count of rows gives the same bits; natively on a GPU (mark gpu), else interpreted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import halfbyte as hb
from halfbyte.invariant import batch_invariant
from halfbyte.kernels import attention, invariant
from halfbyte.kernels import rows as rows_kernel
from halfbyte.numerics import rows
from halfbyte.ops import invariant as ops_invariant
from halfbyte.ops.matmul import scaled_grouped_matmul, scaled_matmul

from ..check import close, equal, same_bits, true
from .test_triton_kernels import DEVICE, INTERPRETING, poisoned_memory, pytestmark  # noqa: F401

needs_gpu = pytest.mark.skipif(INTERPRETING, reason="needs a GPU")
TILES = [invariant.FEW, invariant.MIDDLE, invariant.MANY]
ROW = hb.NVFP4(scaling="row")


def multiply(a: Tensor, b: Tensor, *scales: Tensor | None, bias: Tensor | None = None, **options: object) -> Tensor:
    given = [None if t is None else t.to(DEVICE) for t in (a, b, *scales)]
    bias = None if bias is None else bias.to(DEVICE)
    return invariant.scaled_matmul(*given, bias=bias, out_dtype=torch.float32, **options).cpu()  # type: ignore[arg-type]


def budget(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(result in float64, budget), as tests/test_linear.py derives it."""
    alpha = a_scale.double()[:, None] * b_scale.double()
    magnitude = a.double().abs() @ b.double().abs().mT * alpha
    return (a.double() @ b.double().mT) * alpha + bias, (a.shape[1] + 3) * 2.0**-24 * (magnitude + bias.abs())


@pytest.mark.parametrize("tile", TILES, ids=["few", "middle", "many"])
def test_rows_do_not_depend_on_the_count(rng, tile: invariant.Tile) -> None:
    for dtype, k in ((torch.bfloat16, 144), (torch.float16, 33)):
        a, b = (torch.randn(n, k, generator=rng).to(dtype) for n in (140, 50))
        a_scale, b_scale, bias = (torch.rand(n, generator=rng) for n in (140, 50, 50))
        whole = multiply(a, b, a_scale, b_scale, bias=bias, tile=tile)
        exact, error = budget(a, b, a_scale, b_scale, bias)
        close(whole, exact, error)
        for start, end in ((0, 1), (139, 140), (60, 70), (3, 132)):
            part = multiply(a[start:end], b, a_scale[start:end], b_scale, bias=bias, tile=tile)
            same_bits(part, whole[start:end], f"rows {start} to {end}")


def test_float32(rng) -> None:
    a, b = (torch.randn(n, 40, generator=rng) for n in (37, 20))
    whole = multiply(a, b, None, None)
    close(whole, a.double() @ b.double().mT, 42 * 2.0**-24 * (a.abs() @ b.abs().mT).double())
    same_bits(multiply(a[33:34], b, None, None), whole[33:34])


@pytest.mark.parametrize("ends", [[3, 3, 10, 90], [0, 0, 0, 0], [0, 90, 90, 90], [2, 4, 6, 9]], ids=str)
def test_grouped_is_not_grouped(rng, ends: list[int]) -> None:
    """An expert's rows as if there were no other expert."""
    a, b = torch.randn(90, 48, generator=rng).bfloat16().to(DEVICE), torch.randn(4, 40, 48, generator=rng).bfloat16()
    scale, b_scale, bias = (torch.rand(shape, generator=rng).to(DEVICE) for shape in ((90,), (4, 40), (4, 40)))
    b, offsets = b.to(DEVICE), torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    found = scaled_grouped_matmul(a, b, offsets, scale, b_scale, bias=bias, batch_invariant=True, impl="triton")
    start = 0
    for e, end in enumerate(ends):
        one = {"bias": bias[e], "batch_invariant": True, "impl": "triton"}
        part = scaled_matmul(a[start:end], b[e], scale[start:end], b_scale[e], **one)
        if not INTERPRETING or end - start <= 64:  # the interpreter's sums depend on the tile
            same_bits(found[start:end], part, f"expert {e}")
        start = end
    equal(found[start:].float().abs().sum().item(), 0.0)


@pytest.mark.parametrize("n", [1, 5, 96, 4096, 5000])
def test_row_sum(rng, n: int) -> None:
    x = torch.randn(3, n, generator=rng)
    same_bits(rows_kernel.row_sum(x.to(DEVICE)).cpu(), rows.row_sum(x))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("n", [1, 5, 96, 4096, 5000])
def test_softmax(rng, n: int, log: bool) -> None:
    x = 9 * torch.randn(4, n, generator=rng)
    x[0, 0] = -torch.inf
    x[1] = -torch.inf
    x[2, n // 2] = torch.nan
    found = rows_kernel.softmax(x.to(DEVICE), log).cpu()
    wanted = x.double().log_softmax(-1) if log else x.double().softmax(-1)
    finite = wanted.isfinite()
    equal(found[~finite], wanted[~finite].float(), "not finite")
    close(found[finite], wanted[finite], 1e-5 * wanted[finite].abs() + 1e-6 * log, "float64's")
    same_bits(rows_kernel.softmax(x[3:].to(DEVICE), log).cpu(), found[3:], "a row alone")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention(rng, dtype: torch.dtype, window: int | None) -> None:
    n = 70
    q, k, v = (torch.randn(1, heads, n, 24, generator=rng).to(dtype) for heads in (3, 1, 1))
    i = torch.arange(n)
    seen = (i[None] <= i[:, None]) & (i[None] >= 2)
    if window:
        seen &= i[None] > i[:, None] - window
        q, seen = q[:, :, -9:], seen[-9:]
    mask = seen[None, None]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, by_mask: bool = False) -> Tensor:
        tensors = [t.to(DEVICE) for t in (q, k, v, mask)]
        first, until, last = ops_invariant.key_bounds(tensors[3])
        until = torch.zeros_like(until) if by_mask else until
        return attention.attention(*tensors, (first, until, last), 0.3, 4.0).cpu()

    found = call(q, k, v, mask)
    same_bits(call(q, k, v, mask, by_mask=True), found, "each block by its mask")
    scores = 4 * torch.tanh(q.double() @ k.double().mT * (0.3 / 4))
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    close(found, shares @ v.double(), 0.02 if dtype == torch.bfloat16 else 1e-5)
    for at in (0, q.shape[2] - 1):
        keys = mask[0, 0, at].nonzero()[:, 0]
        if len(keys):
            alone = call(q[:, :, at : at + 1], k[:, :, keys], v[:, :, keys], mask[:, :, at : at + 1, keys])
            same_bits(alone[:, :, 0], found[:, :, at], f"query {at}")
        else:
            equal(found[:, :, at].abs().sum().item(), 0.0)


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=needs_gpu)])
def test_attention_of_every_batch_and_head(rng, many: bool) -> None:
    """Each sequence's and each key head's is what it is alone; many: more of them than a grid's second axis has."""
    batch, queries = (33_000, 5) if many else (2, 41)
    q = torch.randn(batch, 4, queries, 16, generator=rng).bfloat16().to(DEVICE)
    k, v = (torch.randn(batch, 2, queries, 16, generator=rng).bfloat16().to(DEVICE) for _ in range(2))
    mask = torch.ones(queries, queries, dtype=torch.bool, device=DEVICE).tril().expand(batch, 1, queries, queries)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = mask[: len(q)]
        return attention.attention(q, k, v, seen, ops_invariant.key_bounds(seen), 0.25, 0.0)

    found = call(q, k, v)
    for at in (0, batch // 2, batch - 1):
        for head in range(2):
            group = slice(2 * head, 2 * head + 2)
            alone = call(q[at : at + 1, group], k[at : at + 1, head : head + 1], v[at : at + 1, head : head + 1])
            same_bits(found[at : at + 1, group], alone, f"sequence {at}, key head {head}")


@needs_gpu
def test_every_count_of_rows_on_a_gpu() -> None:
    """1 to 300 rows, and thousands: all tiles, of which the largest has 256 columns, agree."""
    g = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(5000, 1040, generator=g, device="cuda").bfloat16()
    b = torch.randn(1536, 1040, generator=g, device="cuda").bfloat16()
    xq, wq = hb.quantize(a, ROW), hb.quantize(b, hb.NVFP4())
    whole, plain = hb.linear(xq, wq, batch_invariant=True), multiply(a, b, None, None)
    values, scale = hb.fake_quantize_unscaled(a, ROW)
    b_values, b_scale = hb.fake_quantize_unscaled(b, hb.NVFP4())
    for m in (*range(1, 301), 1000, 4096):
        for start in (0, 5000 - m):
            part = slice(start, start + m)
            found = scaled_matmul(values[part], b_values, scale[part], b_scale, batch_invariant=True)
            same_bits(found, whole[part], f"{m} rows")
        same_bits(multiply(a[:m], b, None, None), plain[:m], f"{m} rows, not quantized")
    for tile in (*TILES, invariant.LARGE):
        same_bits(multiply(a, b, None, None, tile=tile), plain, str(tile))


@needs_gpu
def test_the_mode_on_a_gpu() -> None:
    x = torch.randn(300, 4160, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    w = torch.randn(4160, device="cuda")
    calls = {
        "mean": lambda x: x.float().pow(2).mean(-1),
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.float()[:, :4111].log_softmax(-1),
        "rms_norm": lambda x: torch.nn.functional.rms_norm(x, (4160,), w.bfloat16(), 1e-6),
        "silu": torch.nn.functional.silu,
        "topk": lambda x: x.topk(8).indices,
    }
    for name, call in calls.items():
        with batch_invariant():
            whole = call(x)
            for i in (0, 17, 299):
                same_bits(call(x[i : i + 1]), whole[i : i + 1], name)
                same_bits(call(x[i : i + 19]), whole[i : i + 19], name)


@needs_gpu
@pytest.mark.parametrize("activations", ["row", "none"])
def test_the_shipped_model_on_a_gpu(tmp_path: Path, activations: str) -> None:
    """A trainer's logits, of a batch of sequences, and those decoded token by token, two by two."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    from halfbyte import runtime
    from halfbyte.nn import convert
    from halfbyte.recipe import TrainingRecipe

    from ..test_invariant_models import TINY, decoded, log_probs

    recipe = TrainingRecipe(ROW if activations == "row" else None, hb.NVFP4(), batch_invariant=True)
    trainer = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).train()
    convert(trainer, recipe)
    runtime.save_quantized(trainer, TINY, tmp_path / "out", recipe.options())
    trainer.cuda()
    rollout = hb.load(tmp_path / "out", activations=activations, device="cuda", batch_invariant=True)
    ids = torch.randint(3, 700, (6, 150), generator=torch.Generator().manual_seed(0)).cuda()
    logits = trainer(ids).logits
    log_probs(logits, ids).mean().backward()
    true(all(p.grad.isfinite().all() for p in trainer.parameters() if p.grad is not None), "a gradient is not finite")
    for row, prompt in ((slice(4, 6), 1), (slice(0, 1), 40)):
        found = decoded(rollout, ids[row], prompt)
        same_bits(found, logits.detach()[row], "logits")
        same_bits(log_probs(found, ids[row]), log_probs(logits, ids).detach()[row], "log-probabilities")
