"""Which implementation runs, and what each consists of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError, UnsupportedError
from ..formats import NVFP4
from ..numerics import hadamard, mxfp8, nvfp4, swizzle

Impl = Literal["auto", "reference", "cpu", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
Quantized = tuple[Tensor, Tensor, Tensor, Tensor]
"""(packed, block_scale, tensor_scale, amax)."""


class Backend(NamedTuple):
    """One implementation of every operation; the four of a format first, the others can be composed of them."""

    quantize_nvfp4: Callable[..., Quantized]
    dequantize_nvfp4: Callable[..., Tensor]
    quantize_mxfp8: Callable[..., tuple[Tensor, Tensor]]
    dequantize_mxfp8: Callable[..., Tensor]
    fake_quantize: Callable[..., tuple[Tensor, Tensor]]
    quantize_with_values: Callable[..., tuple[Quantized, Tensor]]
    quantize_transpose: Callable[..., tuple[Quantized, Quantized]]
    quantize_many: Callable[..., list[Quantized]]
    swizzle: Callable[[Tensor], Tensor]
    unswizzle: Callable[[Tensor, int, int], Tensor]


def pick(impl: str, device: torch.device) -> str:
    """Name of the implementation that will run: "reference", "cpu" or "triton".

    Raises:
        FormatError: impl is unknown.
        UnsupportedError: impl cannot run on this device. Only "auto" ever chooses.
    """
    if impl == "auto":
        if device.type == "cpu":
            return "cpu"
        return "triton" if device.type == "cuda" and _triton_runs_on(device) else "reference"
    if impl not in IMPLEMENTATIONS:
        raise FormatError(f"impl={impl!r}: choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "cpu" and device.type != "cpu":
        raise UnsupportedError(f"impl='cpu' with a tensor on {device}: use impl='auto', or move it with .cpu()")
    if impl == "triton" and not _triton_runs_on(device):
        raise UnsupportedError(
            f"impl='triton' with a tensor on {device}: needs Triton and an NVIDIA GPU from sm_80 on; use impl='auto'"
        )
    return impl


def _triton_runs_on(device: torch.device) -> bool:
    return _can_run_triton(device)


# Dynamo warns where it traces a cache. torch.compiler.assume_constant_result does this too, and imports Dynamo for it.
_triton_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _can_run_triton(device: torch.device) -> bool:
    try:
        from ..kernels import _target
    except ImportError:  # Triton is not installed
        return False
    return _target.runs_on(device)


@functools.cache
def backend(name: str) -> Backend:
    """The implementation of that name, imported when first asked for."""
    if name == "reference":
        return _composed(nvfp4.quantize, _decode, mxfp8.quantize, mxfp8.dequantize)
    if name == "cpu":
        from ..kernels import cpu

        return _composed(cpu.nvfp4.quantize, cpu.nvfp4.dequantize, cpu.mxfp8.quantize, cpu.mxfp8.dequantize)
    return _triton()


def _decode(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if tensor_scale is None:
        return nvfp4.decode_without_tensor_scale(packed, block_scale).to(dtype).contiguous()
    return nvfp4.dequantize(packed, block_scale, tensor_scale, dtype)


def _triton() -> Backend:
    from ..kernels import dequantize, fake_quantize, mxfp8, quantize, swizzle

    own = _composed(quantize.quantize, dequantize.dequantize, mxfp8.quantize, mxfp8.dequantize)
    return own._replace(
        fake_quantize=fake_quantize.fake_quantize,
        quantize_with_values=fake_quantize.quantize_with_values,
        quantize_transpose=functools.partial(_triton_transpose, own.quantize_transpose),
        quantize_many=functools.partial(_triton_many, own.quantize_many),
        swizzle=swizzle.swizzle,
        unswizzle=swizzle.unswizzle,
    )


def _triton_transpose(
    otherwise: Callable[..., tuple[Quantized, Quantized]],
    x: Tensor,
    fmt: NVFP4,
    transposed_fmt: NVFP4,
    *,
    amax: Tensor | None,
    transposed_amax: Tensor | None,
    rng: tuple[int, int] | Tensor | None,
    transposed_rng: tuple[int, int] | Tensor | None,
) -> tuple[Quantized, Quantized]:
    from ..kernels import transposed

    if not transposed.supports(x, transposed_fmt):
        options = {"amax": amax, "transposed_amax": transposed_amax, "rng": rng, "transposed_rng": transposed_rng}
        return otherwise(x, fmt, transposed_fmt, **options)
    columns, rows = transposed.quantize(
        x, transposed_fmt, amax=transposed_amax, rng=transposed_rng, rowwise=fmt, rowwise_amax=amax, rowwise_rng=rng
    )
    assert rows is not None  # rowwise was given
    return rows, columns


def _triton_many(
    otherwise: Callable[..., list[Quantized]], xs: Sequence[Tensor], fmt: NVFP4, **options: Any
) -> list[Quantized]:
    from ..kernels import many

    try:
        return many.quantize_many(xs, fmt, **options)
    except UnsupportedError:  # raised before anything is done: these tensors go one by one
        return otherwise(xs, fmt, **options)


def _composed(
    quantize: Callable[..., Quantized],
    dequantize: Callable[..., Tensor],
    quantize_mxfp8: Callable[..., tuple[Tensor, Tensor]],
    dequantize_mxfp8: Callable[..., Tensor],
) -> Backend:
    """A backend whose other operations are made of these four."""

    def fake_quantize(x: Tensor, fmt: NVFP4, *, unscaled: bool, **options: Any) -> tuple[Tensor, Tensor]:
        packed, block_scale, tensor_scale, _ = quantize(x, fmt, **options)
        return dequantize(packed, block_scale, None if unscaled else tensor_scale, x.dtype), tensor_scale

    def quantize_with_values(x: Tensor, fmt: NVFP4, **options: Any) -> tuple[Quantized, Tensor]:
        q = quantize(x, fmt, **options)
        return q, dequantize(q[0], q[1], None, x.dtype)

    def quantize_transpose(
        x: Tensor,
        fmt: NVFP4,
        transposed_fmt: NVFP4,
        *,
        amax: Tensor | None,
        transposed_amax: Tensor | None,
        rng: tuple[int, int] | Tensor | None,
        transposed_rng: tuple[int, int] | Tensor | None,
    ) -> tuple[Quantized, Quantized]:
        return (
            quantize(x, fmt, amax=amax, per_matrix=True, rng=rng),
            quantize(x.mT, transposed_fmt, amax=transposed_amax, per_matrix=True, rng=transposed_rng),
        )

    def quantize_many(xs: Sequence[Tensor], fmt: NVFP4, *, amax: Tensor | None, shared_amax: bool) -> list[Quantized]:
        if shared_amax:
            amax = _largest(xs, fmt)
        amaxes = [None] * len(xs) if amax is None else amax.expand(len(xs))
        return [quantize(x, fmt, amax=a) for x, a in zip(xs, amaxes, strict=True)]

    return Backend(
        quantize,
        dequantize,
        quantize_mxfp8,
        dequantize_mxfp8,
        fake_quantize,
        quantize_with_values,
        quantize_transpose,
        quantize_many,
        swizzle.swizzle,
        swizzle.unswizzle,
    )


def _largest(xs: Sequence[Tensor], fmt: NVFP4) -> Tensor:
    """max |x| over all tensors, float32 (), after the Hadamard transform if fmt has one; NaN wins."""
    transformed = (hadamard.transform(x) if fmt.hadamard else x for x in xs if x.numel())
    maxima = [x.abs().amax().float() for x in transformed]
    return torch.stack(maxima).amax() if maxima else xs[0].new_zeros((), dtype=torch.float32)
