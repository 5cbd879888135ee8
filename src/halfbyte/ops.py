"""Validate → pick the implementation → run. The only place that dispatches.

Everything here takes and returns plain tensors; `halfbyte.tensor` wraps them. An implementation is a module with the
functions of `numerics`: "reference" is `numerics` itself, and every other one equals it bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .errors import FormatError, ShapeError, UnsupportedError
from .formats import MXFP8, NVFP4, Format
from .numerics import mxfp8, nvfp4

Impl = Literal["auto", "reference"]
IMPLEMENTATIONS = ("auto", "reference")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_nvfp4(
    x: Tensor,
    fmt: NVFP4,
    *,
    impl: Impl = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> nvfp4.Encoded:
    """See `halfbyte.quantize`."""
    _check_input(x, fmt)
    _check_impl(impl)
    _check_rounding(fmt, rng, first_block)
    if per_matrix and x.dim() < 2:
        raise ShapeError(f"per_matrix=True needs at least 2 dimensions; x has shape {tuple(x.shape)}")
    if amax is not None:
        if not isinstance(amax, Tensor):
            raise ShapeError(f"amax is {type(amax).__name__}; needs a float32 tensor: torch.tensor({amax!r})")
        wanted = nvfp4.amax_shape(x.shape, fmt, per_matrix)
        if amax.dtype != torch.float32 or amax.shape not in (torch.Size(()), wanted):
            raise ShapeError(
                f"amax is {amax.dtype} of shape {tuple(amax.shape)}; "
                f"needs torch.float32 of shape {tuple(wanted)}, or one value of shape ()"
            )
        if amax.device != x.device:
            raise ShapeError(f"amax is on {amax.device}, x on {x.device}; move one with .to(device)")
    amax = None if amax is None else amax.detach()
    return nvfp4.quantize(x.detach(), fmt, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block)


def quantize_mxfp8(x: Tensor, fmt: MXFP8, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """(elements, block_scale); see `halfbyte.quantize`."""
    _check_input(x, fmt)
    _check_impl(impl)
    return mxfp8.quantize(x.detach())


def dequantize_nvfp4(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype, *, impl: Impl = "auto"
) -> Tensor:
    """See `halfbyte.QuantizedTensor.dequantize`."""
    _check_impl(impl)
    return nvfp4.dequantize(packed, block_scale, tensor_scale).to(dtype)


def dequantize_mxfp8(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, *, impl: Impl = "auto") -> Tensor:
    """See `halfbyte.QuantizedTensor.dequantize`."""
    _check_impl(impl)
    return mxfp8.dequantize(elements, block_scale).to(dtype)


def _check_rounding(fmt: NVFP4, rng: object, first_block: object) -> None:
    if fmt.rounding == "nearest":
        if rng is not None or first_block != 0:
            raise FormatError("rng and first_block are only for rounding='stochastic'; this format rounds to nearest")
        return
    is_pair = isinstance(rng, tuple) and len(rng) == 2
    if not is_pair or not all(isinstance(word, int) and 0 <= word < 2**64 for word in rng):  # type: ignore[attr-defined]
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


def _check_impl(impl: str) -> None:
    if impl in ("cpu", "triton"):
        raise UnsupportedError(f"impl={impl!r} is not in this version; use impl='auto' or 'reference'")
    if impl not in IMPLEMENTATIONS:
        raise FormatError(f"impl={impl!r}: choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")


def tensor_scales(amax: Tensor, fmt: NVFP4) -> tuple[Tensor, Tensor]:
    """(S_enc, S_dec) that belong to a float32 amax, elementwise."""
    return nvfp4.tensor_scales(amax, fmt)
