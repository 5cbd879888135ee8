"""Two processes: FSDP2 gathers the 4-bit bytes; distributed checkpoints hold them, for any number of ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from halfbyte import MXFP8, NVFP4, QuantizedTensor, UnsupportedError, quantize, quantize_transpose

from .check import equal, same_bits, true

RANKS = 2
WEIGHTS: dict[str, tuple[tuple[int, ...], NVFP4 | MXFP8, bool]] = {
    "tensor": ((64, 32), NVFP4(), False),
    "row": ((6, 32), NVFP4(scaling="row", scale_rule="four_over_six"), False),
    "square": ((32, 64), NVFP4(block=(16, 16)), False),
    "experts": ((4, 24, 32), NVFP4(), True),
    "expert rows": ((4, 3, 32), NVFP4(scaling="row"), False),
    "mxfp8": ((6, 64), MXFP8(), False),
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
}


def weight(name: str, seed: int = 0) -> QuantizedTensor:
    shape, fmt, per_matrix = WEIGHTS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
    return quantize(x, fmt, per_matrix=True) if per_matrix else quantize(x, fmt)


class Model(torch.nn.Module):
    """Shows the parameters that its forward sees."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        for name in WEIGHTS:
            self.register_parameter(name, torch.nn.Parameter(weight(name, seed), requires_grad=False))

    def forward(self, x: torch.Tensor) -> tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]:
        return (
            {name: q.clone() for name, q in self.named_parameters()},
            {name: q.dequantize() for name, q in self.named_parameters()},
        )


def check_forward(model: Model, seed: int, device: str, dtype: torch.dtype = torch.float32) -> None:
    seen, decoded = model(torch.ones(1, device=device))
    for name in WEIGHTS:
        expected = weight(name, seed).to(device)
        true(torch.equal(seen[name], expected), f"{name}: other bytes")
        equal((seen[name].dtype, seen[name].format), (dtype, expected.format))
        same_bits(decoded[name], expected.dequantize(), name)
        if expected.amax is not None:
            same_bits(seen[name].amax, expected.amax)


def check_ranks(where: Path, device: str) -> None:
    mesh = init_device_mesh(device, (RANKS,))
    for policy, options in POLICIES.items():
        model = fully_shard(Model().to(device), mesh=mesh, **options)
        shard = model.tensor._local_tensor
        equal((type(shard), tuple(shard.packed.shape)), (QuantizedTensor, (64 // RANKS, 16)))
        dtype = torch.bfloat16 if policy == "mixed" else torch.float32
        check_forward(model, 0, device, dtype)
        check_forward(model, 0, device, dtype)  # the second time into what the first allocated

    dcp.save(dict(model.state_dict()), checkpoint_id=where / "sharded")
    other = fully_shard(Model(1).to(device), mesh=mesh)
    check_forward(other, 1, device)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=where / "sharded")
    other.load_state_dict(state)
    check_forward(other, 0, device)

    whole = {name: torch.zeros_like(weight(name), device=device) for name in WEIGHTS}
    dcp.load(whole, checkpoint_id=where / "sharded")  # from two ranks' shards
    for name, q in whole.items():
        true(torch.equal(q, weight(name).to(device)), f"{name}: other bytes")
    used = {"tensor": weight("tensor", 1)}
    with pytest.raises(BaseException, match="tensor scale other elements share"):
        dcp.load(used, checkpoint_id=where / "sharded")

    dcp.save({name: weight(name, 2) for name in WEIGHTS}, checkpoint_id=where / "whole")
    state = fully_shard(Model().to(device), mesh=mesh).state_dict()
    dcp.load(state, checkpoint_id=where / "whole")  # one tensor to two ranks
    model = fully_shard(Model().to(device), mesh=mesh)
    model.load_state_dict(state)
    check_forward(model, 2, device)


def _rank(rank: int, where: Path, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{where / 'meet'}", rank=rank, world_size=RANKS)
    try:
        check_ranks(where, device)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path, "cpu"), nprocs=RANKS)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path, "cuda"), nprocs=RANKS)


def gather(q: QuantizedTensor, *outer: int, ranks: int = RANKS) -> Any:
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    return q.fsdp_pre_all_gather(mesh, torch.Size(outer), (), None, None)


def test_what_cannot_be_gathered() -> None:
    """Each rank refuses by itself: none waits for the others."""
    q = weight("tensor")
    with pytest.raises(UnsupportedError, match=r"shape \(65, 32\) over 2 ranks: .*divisible by the ranks"):
        gather(q, 65, 32)
    with pytest.raises(UnsupportedError, match="dimension 0 is sharded"):
        gather(q, 64, 64)
    rows, columns = quantize_transpose(torch.ones(32, 32), NVFP4())
    for wrong in (rows.with_transposed(columns), q.swizzle()):
        with pytest.raises(UnsupportedError, match=r"without swizzle=True and with_transposed\(None\)"):
            gather(wrong, 2 * wrong.shape[0], 32)


def test_what_travels() -> None:
    """Of 4.5 bits an element: codes and block scales, and tensor scales that rows or matrices have."""
    for name, scales in {"tensor": 0, "row": 2, "square": 0, "experts": 2, "expert rows": 2, "mxfp8": 0}.items():
        q = weight(name)
        parts, kept = gather(q, 2 * q.shape[0], *q.shape[1:])
        equal(len(parts), 2 + scales, name)
        equal(kept is None, scales == 2, name)
        equal({len(part) for part in parts}, {q.shape[0]}, name)
