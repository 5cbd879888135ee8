"""Scale rule `search` beside ModelOpt's sweep over all E4M3 scales: its part of the GPU's and of the CPU's table.

Ours gives packed elements and scales, ModelOpt's sweep only each block's best amax.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.numerics import nvfp4
from registry import Build, Call, Case, Shape

OUT = 2 + 0.5625  # bytes per element: bf16 in, NVFP4 out; Hessians are next to nothing beside thousands of rows
MSE, MAE = hb.NVFP4(scale_rule="search"), hb.NVFP4(scale_rule="search", error="mae")
HESSIAN = hb.NVFP4(scale_rule="search", error="hessian")
FORMATS = {"cuda": [MSE, MAE, HESSIAN], "cpu": [MSE]}  # that are measured
SHAPES = {"cuda": (8192, 4096), "cpu": (4096, 4096)}
SWEEP, HESSIAN_SWEEP = "ModelOpt's sweep, mse", "ModelOpt's sweep, hessian"


def hessian(x: Tensor, g: torch.Generator) -> Tensor:
    """Of correlated inputs."""
    blocks = x.shape[-1] // 16
    a = torch.randn(blocks, 256, 16, generator=g, device=x.device)
    a = a + torch.randn(blocks, 256, 1, generator=g, device=x.device)
    return a.mT @ a / 256


def distributions(shape: Shape, g: torch.Generator, device: str) -> list[Tensor]:
    """Blocks of all magnitudes, with few values, near over- and underflow, and with infinities."""
    x = torch.randn(shape, generator=g, device=device)
    sizes = torch.exp2(-26 * torch.rand(shape[0], shape[1] // 16, generator=g, device=device))
    few = torch.randint(-7, 8, shape, generator=g, device=device).float()
    heavy = x * torch.exp(2 * torch.randn(shape, generator=g, device=device))
    odd = x.clone()
    odd.view(-1)[::1003] = torch.inf
    wide = [x * sizes.repeat_interleave(16, 1), few, odd, x * 2.0**-80, x * 2.0**100]
    return [x.bfloat16(), x.half(), x, heavy, heavy.bfloat16(), *wide]


def gate(device: str, full: bool) -> int:
    """Elements whose bytes were compared with the contract's."""
    g = torch.Generator(device=device).manual_seed(0)
    shape = (520, 4096) if full else (130, 1024) if device == "cuda" else (17, 128)
    compared = 0
    for x in distributions(shape, g, device):
        for fmt in FORMATS[device]:
            given = {"hessian": hessian(x, g)} if fmt.error == "hessian" else {}
            for amax in (None, x.abs().amax().float().clamp(max=3e38) * 0.9):
                q, wanted = hb.quantize(x, fmt, amax=amax, **given), nvfp4.quantize(x, fmt, amax=amax, **given)
                for a, e in zip((q.packed, q.block_scale, q.tensor_scale, q.amax), wanted, strict=True):
                    if not torch.equal(a.reshape(-1).view(torch.uint8), e.reshape(-1).view(torch.uint8)):
                        raise SystemExit(f"{fmt}: bytes differ from the contract; nothing was timed")
                compared += x.numel()
    return compared


@functools.cache
def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, its maximum, and a Hessian of its columns."""
    g = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(shape, generator=g, device=device).bfloat16()
    return x, x.abs().amax().float(), hessian(x, g)


def searching(fmt: hb.NVFP4, device: str, given: bool = False) -> Build:
    def build(shape: Shape) -> Call:
        x, amax, h = inputs(shape, device)
        options = {"amax": amax} if given else {}
        return functools.partial(hb.quantize, x, fmt, hessian=h if fmt.error == "hessian" else None, **options)

    return build


def sweeps(device: str) -> Mapping[str, Build]:
    """ModelOpt's: Triton kernels on a GPU, on the CPU what its calibrator does."""

    def mse(shape: Shape) -> Call:
        x, amax, _ = inputs(shape, device)
        if device == "cpu":
            return calibrator(x, amax)
        from modelopt.torch.kernels.quantization.gemm.nvfp4_fp8_sweep import nvfp4_fp8_scale_sweep

        return lambda: nvfp4_fp8_scale_sweep(x.view(-1, 16), amax)

    def hessians(shape: Shape) -> Call:
        x, amax, h = inputs(shape, device)
        from modelopt.torch.kernels.quantization.gemm.nvfp4_fp8_sweep import nvfp4_fp8_scale_sweep_hessian

        return lambda: nvfp4_fp8_scale_sweep_hessian(x.view(-1, 16), amax, h)

    return {SWEEP: mse, HESSIAN_SWEEP: hessians}


def calibrator(x: Tensor, amax: Tensor) -> Call:
    from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    blocks = x.view(-1, 16)

    def fake(values: Tensor, block_amax: Tensor) -> Tensor:
        """Quantize and decode by its own elementwise functions: its kernel for this needs a GPU."""
        scale = block_amax.view(-1, 1) / 6.0
        scaled = values / torch.where(scale == 0, 1.0, scale)
        return NVFP4QTensor.get_e2m1_values(values.device)[NVFP4QTensor._cast_fp4(scaled).long()] * scale

    def sweep() -> object:
        calibration = NVFP4MSECalibrator(blocks.abs().amax(1).float(), amax, axis=0, quant_func=fake)
        calibration.collect(blocks)
        return calibration.compute_amax()

    return sweep


def cases(device: str) -> list[Case]:
    shape, alternatives = SHAPES[device], sweeps(device)
    mse = {SWEEP: alternatives[SWEEP]}
    if device == "cpu":
        return [Case("search, mse", OUT, searching(MSE, device), None, mse, (SWEEP, 20.0), shape=shape)]
    hessians = {HESSIAN_SWEEP: alternatives[HESSIAN_SWEEP]}
    return [
        Case("search mse, amax given", OUT, searching(MSE, device, True), None, mse, (SWEEP, 50.0), shape=shape),
        Case("search mse, amax computed", OUT, searching(MSE, device), None, mse, (SWEEP, 50.0), shape=shape),
        Case("search mae, amax given", OUT, searching(MAE, device, True), shape=shape),
        Case("search hessian, amax given", OUT, searching(HESSIAN, device, True), None, hessians,
             (HESSIAN_SWEEP, 5.0), shape=shape),
    ]  # fmt: skip
