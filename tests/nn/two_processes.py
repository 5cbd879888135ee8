"""One of two processes; `test_parallel` starts them: RANK STORE."""

import json
import sys
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch import distributed as dist

import halfbyte as hb
from halfbyte.nn import AmaxGroups, convert
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
        rows, columns = encode_transposed(x.chunk(2)[rank], hb.NVFP4(), HADAMARD, 16, group)
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
    result = {"shards": shards(int(rank)), **{mode: fsdp(int(rank), mode) for mode in modes}}
    dist.barrier()
    print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
