"""One of two processes; `test_parallel` starts them: RANK STORE."""

import json
import sys
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch import distributed as dist

import halfbyte as hb
from halfbyte.nn import AmaxGroups, GroupedLinear, Linear, convert
from halfbyte.nn.operands import encode, encode_transposed, shared_amax
from halfbyte.recipe import TrainingRecipe, TransformerEngine

warnings.simplefilter("ignore")
ROW, SQUARE = hb.NVFP4(scaling="row"), hb.NVFP4(block=(16, 16))
HADAMARD = hb.NVFP4(hadamard=True)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def shards(rank: int) -> dict[str, bool]:
    """Each half, with the maximum reduced, against the same half of the whole."""
    group = dist.group.WORLD
    results = {}
    for seed, nan in ((0, False), (1, True)):
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x[5, 7] = float("nan") if nan else 30.0
        for fmt in (hb.NVFP4(), SQUARE, hb.NVFP4(scale_rule="four_over_six"), HADAMARD, hb.MXFP8()):
            whole = encode(x, fmt)
            for axis in (0, 1):
                mine = x.chunk(2, axis)[rank]
                part = encode(mine, fmt, shared_amax(mine, fmt, group))
                wanted = [t.chunk(2, axis)[rank] for t in (whole.packed, whole.block_scale)]
                good = same(part.packed, wanted[0]) and same(part.block_scale, wanted[1])
                results[f"{fmt} nan={nan} axis={axis}"] = good and same(part.tensor_scale, whole.tensor_scale)
        mine = x.chunk(2, 1)[rank]  # columns: every row's maximum is over both
        part, whole = encode(mine, ROW, shared_amax(mine, ROW, group)), encode(x, ROW)
        results[f"rows nan={nan}"] = same(part.packed, whole.packed.chunk(2, 1)[rank]) and same(
            part.tensor_scale, whole.tensor_scale
        )
        rows, columns = encode_transposed(x.chunk(2)[rank], hb.NVFP4(), HADAMARD, 16, AmaxGroups(group), "activations")
        both = encode(x, hb.NVFP4()), encode(x.mT, HADAMARD)
        results[f"transposed nan={nan}"] = same(rows.packed, both[0].packed.chunk(2)[rank]) and same(
            columns.packed, both[1].packed.chunk(2, 1)[rank]
        )
        gathered = [torch.empty_like(part.packed) for _ in range(2)]  # sequence parallelism: codes and scales travel
        dist.all_gather(gathered, part.packed)
        results[f"gathered nan={nan}"] = same(torch.cat(gathered, 1), whole.packed)
    flags = torch.tensor([int(all(results.values()))])
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return {**results, "on both ranks": bool(flags)}


ROWS = TrainingRecipe(ROW, ROW, ROW, backward="quantized")
LAYERS = {
    "tokens, quantized": TransformerEngine(disable_stochastic_rounding=True).recipe(),
    "tokens, dequantized": TrainingRecipe(backward="dequantized"),
    "tokens, row-scaled": ROWS,
    "row-parallel": ROWS,  # x and w sharded along what forward sums over
    "column-parallel": ROWS,  # w sharded along its rows, dy along what dgrad sums over
}


def layers(rank: int) -> dict[str, bool]:
    """Layers of which a rank has half, of the tokens or of the weight, compute what one process computes of it."""
    results: dict[str, bool] = {}
    for name, recipe in LAYERS.items():
        for experts in (1, 2):
            mine, whole = half(rank, name, recipe, experts)
            for what, part, wanted in zip(("y", "dx", "dw"), mine, whole, strict=True):
                error = float((part - wanted).norm() / wanted.norm())
                results[f"{name}, {experts} experts, {what}: {error:.1e}"] = error < 1e-6
    return results


def half(rank: int, name: str, recipe: TrainingRecipe, experts: int) -> tuple[list[Tensor], list[Tensor]]:
    world, rng = dist.group.WORLD, torch.Generator().manual_seed(5)
    # Rows sorted by expert, of each the first 32 on rank 0.
    x, w = torch.randn(experts, 64, 64, generator=rng), torch.randn(experts, 64, 64, generator=rng)
    dy = torch.randn(experts, 64, 64, generator=rng)
    x[0, 50, 40], w[0, 40, 50], dy[0, 45, 37] = 40.0, 9.0, 30.0  # maxima that rank 1 alone has
    whole = step(recipe, AmaxGroups(), x, w, dy)
    if name == "row-parallel":
        groups = AmaxGroups(activations=world, weights=world, along_columns=("activations", "weights"))
        mine = step(recipe, groups, x.chunk(2, 2)[rank], w.chunk(2, 2)[rank], dy)
        cut = (None, 2, 2)
    elif name == "column-parallel":
        groups = AmaxGroups(weights=world, gradients=world, along_columns=("gradients",))
        mine = step(recipe, groups, x, w.chunk(2, 1)[rank], dy.chunk(2, 2)[rank])
        cut = (2, None, 1)
    else:
        groups = AmaxGroups(activations=world, gradients=world)
        mine = step(recipe, groups, x.chunk(2, 1)[rank], w, dy.chunk(2, 1)[rank])
        cut = (1, 1, None)
    dist.all_reduce(mine[cut.index(None)])  # each rank has a part of the sums
    return mine, [t if axis is None else t.chunk(2, axis)[rank] for t, axis in zip(whole, cut, strict=True)]


def step(recipe: TrainingRecipe, groups: AmaxGroups, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dw of x (experts, tokens, K), w (experts, N, K) and dy (experts, tokens, N)."""
    experts, tokens, k = x.shape
    layer = (
        Linear(k, w.shape[1], False, recipe=recipe)
        if experts == 1
        else GroupedLinear(experts, k, w.shape[1], recipe=recipe)
    )
    layer.quantization.groups = groups
    with torch.no_grad():
        layer.weight.copy_(w.reshape(layer.weight.shape))
    leaf = x.reshape(-1, k).detach().clone().requires_grad_()
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * tokens
    y = layer(leaf) if experts == 1 else layer(leaf, ends)
    y.backward(dy.reshape(-1, w.shape[1]))
    return [y.detach().view_as(dy), leaf.grad.view_as(x), layer.weight.grad.view_as(w)]


class Block(nn.Module):
    """An attention's and an MLP's projections, by the names that are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{p}_proj": nn.Linear(32, 32) for p in "qkvo"})
        self.mlp = nn.ModuleDict({p: nn.Linear(32, 32) for p in ("gate_proj", "up_proj", "down_proj")})

    def forward(self, x: Tensor) -> Tensor:
        a = self.self_attn
        x = x + a.o_proj(torch.tanh(a.q_proj(x)) * a.k_proj(x) + a.v_proj(x))
        return x + self.mlp.down_proj(torch.sigmoid(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def train(model: nn.Module, x: Tensor, y: Tensor, reduce: bool) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(5):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if reduce:
            dist.all_reduce(total, dist.ReduceOp.SUM)
            total /= 2
        losses.append(float(total))
    return losses


def fsdp(rank: int, backward: str) -> dict[str, list[float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Each rank's own words would round another shard otherwise than the whole: to nearest, the two can be compared.
    # Data parallelism sums wgrad over ranks, each of its own tokens' blocks, as one process does.
    base = TransformerEngine(disable_stochastic_rounding=True).recipe() if backward == "quantized" else TrainingRecipe()
    recipe = replace(base, backward=backward, reuse_weights=True)
    x, y = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(3)).unbind(0)
    torch.manual_seed(0)
    single = Model()
    sharded = Model()
    sharded.load_state_dict(single.state_dict())
    convert(single, recipe)
    losses = train(single, x, y, reduce=False)
    world = dist.group.WORLD
    convert(sharded, recipe, groups=AmaxGroups(activations=world, gradients=world))
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return {"single": losses, "sharded": train(sharded, x.chunk(2)[rank], y.chunk(2)[rank], reduce=True)}


def main() -> None:
    rank, store = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    modes = ("high_precision", "dequantized", "quantized")
    result = {
        "shards": shards(int(rank)),
        "layers": layers(int(rank)),
        **{mode: fsdp(int(rank), mode) for mode in modes},
    }
    dist.barrier()
    print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
