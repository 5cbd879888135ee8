"""What a QuantizedTensor does between a GPU and its host: pytest -m gpu tests/test_tensor_gpu.py."""

import time

import pytest
import torch

from halfbyte import MXFP8, NVFP4, QuantizedTensor, quantize, quantize_transpose

from .check import equal, same_bits, true

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
FORMATS = [NVFP4(), NVFP4(scaling="row"), NVFP4(block=(16, 16)), MXFP8()]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_to_the_gpu_and_back(rng: torch.Generator, fmt: NVFP4 | MXFP8) -> None:
    q = quantize(torch.randn(64, 128, generator=rng).bfloat16(), fmt)
    pinned = q.pin_memory()
    true(pinned.is_pinned() and pinned.packed.is_pinned() and not q.is_pinned(), "pinned, by copying")
    for there in (q.cuda(), pinned.to("cuda", non_blocking=True), torch.empty_like(q, device="cuda").copy_(pinned)):
        equal((there.device.type, there.packed.device.type, there.dtype), ("cuda", "cuda", torch.bfloat16))
        true(torch.equal(there.cpu(), q), "other bytes")
        same_bits(there.dequantize().cpu(), q.dequantize())
    there = q.cuda()
    there.record_stream(torch.cuda.current_stream())
    true(torch.equal(quantize(q.dequantize().cuda(), fmt), quantize(q.dequantize(), fmt).cuda()), "one contract")


def test_copy_in_a_cuda_graph(rng: torch.Generator) -> None:
    first, second = (quantize(torch.randn(64, 128, generator=rng).cuda(), NVFP4()) for _ in range(2))
    held, source = torch.zeros_like(first), first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held.copy_(source)
    for q in (first, second):
        source.copy_(q)
        graph.replay()
        true(torch.equal(held, q), "other bytes")


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=repr)
def test_inductor(rng: torch.Generator, fmt: NVFP4) -> None:
    x = torch.randn(64, 128, generator=rng).cuda().bfloat16()

    def step(x: torch.Tensor, q: QuantizedTensor) -> tuple[QuantizedTensor, torch.Tensor]:
        rows, columns = quantize_transpose(x, fmt)
        return rows.with_transposed(columns), q[16:].dequantize(torch.bfloat16) + x[16:]

    q = quantize(x, fmt)
    joined, added = torch.compile(step, fullgraph=True)(x, q)
    expected, sums = step(x, q)
    true(torch.equal(joined, expected), "other bytes")
    same_bits(added, sums)


def test_a_call_takes_little_time() -> None:
    """The Python of a whole quantize, kernels not waited for; the bound is twice what is aimed at."""
    x, fmt = torch.randn(16, 128, device="cuda").bfloat16(), NVFP4(scaling="row")
    best = min(_microseconds(lambda: quantize(x, fmt)) for _ in range(5))
    true(best < 80, f"{best:.1f} µs")


def _microseconds(call: object, count: int = 200) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()  # type: ignore[operator]
    return (time.perf_counter() - start) / count * 1e6
