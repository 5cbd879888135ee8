"""Validate → pick the implementation → run. The only place that dispatches.

Everything here takes and returns plain tensors; `halfbyte.tensor` wraps them. "reference" is `numerics` itself; every
other implementation has functions of the same signatures, and equals it bit for bit. Under torch.compile each call is
one opaque custom operator; otherwise the implementation is called directly, which costs less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .errors import FormatError, ShapeError, UnsupportedError
from .formats import MXFP8, NVFP4, Format
from .numerics import mxfp8, nvfp4

Impl = Literal["auto", "reference", "cpu", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """One implementation of every operation."""

    quantize_nvfp4: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    dequantize_nvfp4: Callable[..., Tensor]
    quantize_mxfp8: Callable[..., tuple[Tensor, Tensor]]
    dequantize_mxfp8: Callable[..., Tensor]


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


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    try:
        from .kernels import _target
    except ImportError:  # Triton is not installed
        return False
    return _target.runs_on(device)


@functools.cache
def _backend(name: str) -> Backend:
    if name == "reference":
        return Backend(nvfp4.quantize, nvfp4.dequantize, mxfp8.quantize, mxfp8.dequantize)
    if name == "cpu":
        from .kernels import cpu

        return Backend(cpu.nvfp4.quantize, cpu.nvfp4.dequantize, cpu.mxfp8.quantize, cpu.mxfp8.dequantize)
    from .kernels import dequantize as triton_dequantize
    from .kernels import mxfp8 as triton_mxfp8
    from .kernels import quantize as triton_quantize

    return Backend(
        triton_quantize.quantize, triton_dequantize.dequantize, triton_mxfp8.quantize, triton_mxfp8.dequantize
    )


def quantize_nvfp4(
    x: Tensor,
    fmt: NVFP4,
    *,
    impl: str = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> nvfp4.Encoded:
    """See `halfbyte.quantize`."""
    _check_input(x, fmt)
    _check_rounding(fmt, rng, first_block)
    if per_matrix and x.dim() < 2:
        raise ShapeError(f"per_matrix=True needs at least 2 dimensions; x has shape {tuple(x.shape)}")
    if amax is not None:
        _check_amax(amax, x, nvfp4.amax_shape(x.shape, fmt, per_matrix))
        amax = amax.detach()
    name = pick(impl, x.device)
    x = x.detach()
    if torch.compiler.is_compiling():
        words = None if rng is None else [_signed(word) for word in rng]
        return nvfp4.Encoded(*_quantize_nvfp4(x, amax, *_spelled(fmt), per_matrix, words, first_block, name))
    run = _backend(name).quantize_nvfp4
    return nvfp4.Encoded(*run(x, fmt, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block))


def quantize_mxfp8(x: Tensor, fmt: MXFP8, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(elements, block_scale); see `halfbyte.quantize`."""
    _check_input(x, fmt)
    name = pick(impl, x.device)
    if torch.compiler.is_compiling():
        return _quantize_mxfp8(x.detach(), name)  # type: ignore[no-any-return]
    return _backend(name).quantize_mxfp8(x.detach())


def dequantize_nvfp4(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype, *, impl: str = "auto"
) -> Tensor:
    """See `halfbyte.QuantizedTensor.dequantize`."""
    name = pick(impl, packed.device)
    if torch.compiler.is_compiling():
        return _dequantize_nvfp4(packed, block_scale, tensor_scale, dtype, name)  # type: ignore[no-any-return]
    return _backend(name).dequantize_nvfp4(packed, block_scale, tensor_scale, dtype)


def dequantize_mxfp8(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
    """See `halfbyte.QuantizedTensor.dequantize`."""
    name = pick(impl, elements.device)
    if torch.compiler.is_compiling():
        return _dequantize_mxfp8(elements, block_scale, dtype, name)  # type: ignore[no-any-return]
    return _backend(name).dequantize_mxfp8(elements, block_scale, dtype)


def tensor_scales(amax: Tensor, fmt: NVFP4) -> tuple[Tensor, Tensor]:
    """(S_enc, S_dec) that belong to a float32 amax, elementwise."""
    return nvfp4.tensor_scales(amax, fmt)


def _check_rounding(fmt: NVFP4, rng: object, first_block: object) -> None:
    if fmt.rounding == "nearest":
        if rng is not None or first_block != 0:
            raise FormatError("rng and first_block are only for rounding='stochastic'; this format rounds to nearest")
        return
    if not isinstance(rng, tuple) or len(rng) != 2 or not all(isinstance(w, int) and 0 <= w < 2**64 for w in rng):
        raise FormatError(f"rng={rng!r}: rounding='stochastic' needs rng=(seed, offset), two integers of 64 bits")
    if not isinstance(first_block, int) or not 0 <= first_block < 2**60:
        raise FormatError(f"first_block={first_block!r}: must be an integer from 0 to 2**60")


def _check_input(x: Tensor, fmt: Format) -> None:
    if not isinstance(x, Tensor):
        raise ShapeError(f"x is {type(x).__name__}; quantize takes a torch.Tensor: use torch.as_tensor(x)")
    if x.dtype not in FLOAT_DTYPES:
        raise ShapeError(f"x is {x.dtype}; quantize takes float32, bfloat16 or float16: convert it first")
    if x.dim() < 1:
        raise ShapeError("x is a scalar; quantize needs at least one dimension")
    if x.shape[-1] % fmt.block_columns:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}: the last dimension must be divisible by {fmt.block_columns} "
            f"for {type(fmt).__name__}; pad it, or leave this tensor unquantized"
        )


def _check_amax(amax: Tensor, x: Tensor, wanted: torch.Size) -> None:
    if not isinstance(amax, Tensor):
        raise ShapeError(f"amax is {type(amax).__name__}; needs a float32 tensor: torch.tensor({amax!r})")
    if amax.dtype != torch.float32 or amax.shape not in (torch.Size(()), wanted):
        raise ShapeError(
            f"amax is {amax.dtype} of shape {tuple(amax.shape)}; "
            f"needs torch.float32 of shape {tuple(wanted)}, or one value of shape ()"
        )
    if amax.device != x.device:
        raise ShapeError(f"amax is on {amax.device}, x on {x.device}; move one with .to(device)")


# ------------------------------------------------------------------------------------------------- under torch.compile
# A custom operator takes plain values only: a format travels as its fields, 64-bit words as signed integers.


def _spelled(fmt: NVFP4) -> tuple[Any, ...]:
    (rows, _), scaling, scale_rule, hadamard, rounding, error, e4m3_max, error_arithmetic = astuple(fmt)
    return rows, scaling, scale_rule, hadamard, rounding, error, e4m3_max, error_arithmetic


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@torch.library.custom_op("halfbyte::quantize_nvfp4", mutates_args=())
def _quantize_nvfp4(
    x: Tensor,
    amax: Tensor | None,
    block_rows: int,
    scaling: str,
    scale_rule: str,
    hadamard: bool,
    rounding: str,
    error: str | None,
    e4m3_max: int,
    error_arithmetic: str,
    per_matrix: bool,
    rng: list[int] | None,
    first_block: int,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values: Any = ((block_rows, 16), scaling, scale_rule, hadamard, rounding, error, e4m3_max, error_arithmetic)
    words = None if rng is None else (rng[0] % 2**64, rng[1] % 2**64)
    run = _backend(name).quantize_nvfp4
    return tuple(run(x, NVFP4(*values), amax=amax, per_matrix=per_matrix, rng=words, first_block=first_block))  # type: ignore[return-value]


@_quantize_nvfp4.register_fake
def _(
    x: Tensor, amax: Tensor | None, block_rows: int, scaling: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_matrix = rest[-4]
    scales = x.shape[:-1] if scaling == "row" else x.shape[:-2] if per_matrix else ()
    return (
        x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8),
        x.new_empty((*x.shape[:-1], x.shape[-1] // 16), dtype=torch.float8_e4m3fn),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty(scales, dtype=torch.float32),
    )


@torch.library.custom_op("halfbyte::quantize_mxfp8", mutates_args=())
def _quantize_mxfp8(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return _backend(name).quantize_mxfp8(x)


@_quantize_mxfp8.register_fake
def _(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // 32), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


@torch.library.custom_op("halfbyte::dequantize_nvfp4", mutates_args=())
def _dequantize_nvfp4(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype, name: str
) -> Tensor:
    return _backend(name).dequantize_nvfp4(packed, block_scale, tensor_scale, dtype)


@_dequantize_nvfp4.register_fake
def _(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)


@torch.library.custom_op("halfbyte::dequantize_mxfp8", mutates_args=())
def _dequantize_mxfp8(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    return _backend(name).dequantize_mxfp8(elements, block_scale, dtype)


@_dequantize_mxfp8.register_fake
def _(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    return elements.new_empty(elements.shape, dtype=dtype)
