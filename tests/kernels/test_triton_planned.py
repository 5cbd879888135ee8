"""Tensors quantized again and again into the same places, against the contract; run as `test_triton_kernels.py` is."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte.formats import NVFP4
from halfbyte.kernels import planned
from halfbyte.numerics import nvfp4
from halfbyte.ops.prepared import Into, places

from ..check import equal, same_bits, true
from .test_triton_kernels import DEVICE, INTERPRETING, poisoned_memory, pytestmark  # noqa: F401

FORMATS = [NVFP4(), NVFP4(hadamard=True), NVFP4(scale_rule="four_over_six")]
SHAPES = [(40, 32), (16, 48), (16, 48), (3, 5, 16), (16,), (33, 64)]
GROUPS = [0, 1, 1, 2, 1, 0]  # neither consecutive nor in order
if not INTERPRETING:
    SHAPES += [(700, 1040), (2048, 1024), (2048, 1024), (1, 65536)] + [(16, 32)] * 300
    GROUPS += [3, 4, 3, 3, *range(5, 305)]
    SHAPES += [(2049, 8192), (16, 16)]  # more tiles of a maximum than there is a word for each
    GROUPS += [305, 305]


def into(xs: list[Tensor], fmt: NVFP4) -> Into:
    _, blocks = places(xs, fmt)
    packed = torch.full((8 * blocks,), 0xA5, dtype=torch.uint8, device=DEVICE)
    scale = torch.full((blocks,), 0xA5, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    return Into(packed, scale, *(torch.full((len(xs),), float("nan"), device=DEVICE) for _ in range(2)))


def compare(xs: list[Tensor], fmt: NVFP4, out: Into, amaxes: list[Tensor]) -> None:
    firsts, blocks = places(xs, fmt)
    used = torch.zeros(blocks, dtype=torch.bool)
    for i, (x, first) in enumerate(zip(xs, firsts, strict=True)):
        wanted = nvfp4.quantize(x, fmt, amax=amaxes[i])
        count = x.numel() // 16
        used[first : first + count] = True
        same_bits(out.elements[8 * first : 8 * (first + count)].cpu(), wanted.packed.view(-1), f"codes of {i}")
        found = out.block_scale[first : first + count].view(torch.uint8).cpu()
        same_bits(found, wanted.block_scale.view(torch.uint8).view(-1), f"scales of {i}")
        equal(out.tensor_scale[i].cpu(), wanted.tensor_scale, f"S_dec of {i}")
        equal(out.amax[i].cpu(), wanted.amax, f"A of {i}")
    true((out.block_scale.view(torch.uint8).cpu()[~used] == 0xA5).all(), "a byte between tensors was written")


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_again_and_again(fmt: NVFP4, nan: bool, rng: torch.Generator) -> None:
    if fmt.hadamard and nan:
        pytest.skip("what the transform makes of NaN is outside the contract")
    dtype = (torch.bfloat16, torch.float16, torch.float32)[FORMATS.index(fmt)]
    on_device = [torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in SHAPES]
    out = into(on_device, fmt)
    prepared = planned.Prepared(on_device, GROUPS, places(on_device, fmt)[0], fmt, out)
    for step in range(2):
        xs = [torch.randn(s, generator=rng).mul(2.0 ** (7 - i % 9 - step)).to(dtype) for i, s in enumerate(SHAPES)]
        if nan and step == 0:
            xs[1][3, 5] = float("nan")
        for x, new in zip(on_device, xs, strict=True):
            x.copy_(new)
        own = torch.stack([nvfp4.quantize(x, fmt).amax for x in xs])
        of = torch.tensor(GROUPS)
        maxima = torch.stack([own[of == group].amax() for group in range(max(GROUPS) + 1)])  # NaN wins
        prepared.run()
        compare(xs, fmt, out, list(maxima[of]))
        if INTERPRETING and step:  # it is slow
            continue
        equal(prepared.maxima().cpu(), maxima)
        given = maxima.nan_to_num(1.0) * 1.5
        prepared.run(given.to(DEVICE))
        compare(xs, fmt, out, list(given[of]))


@pytest.mark.skipif(INTERPRETING, reason="CUDA only")
def test_graph_capture(rng: torch.Generator) -> None:
    xs = [torch.randn(shape, generator=rng).bfloat16().to(DEVICE) for shape in SHAPES]
    out = into(xs, NVFP4())
    prepared = planned.Prepared(xs, list(range(len(xs))), places(xs, NVFP4())[0], NVFP4(), out)
    prepared.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()
    for _ in range(2):
        for x in xs:
            x.normal_()
        graph.replay()
        cpu = [x.cpu() for x in xs]
        compare(cpu, NVFP4(), out, [x.abs().amax().float() for x in cpu])
