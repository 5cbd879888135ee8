"""What the operators refuse; each message names the argument, what it is, what is needed, and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..formats import NVFP4, Format

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_input(x: Tensor, fmt: Format, name: str = "x") -> None:
    """Raise ShapeError unless x is a float tensor whose last dimension fmt divides into blocks."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is {type(x).__name__}; quantize takes a torch.Tensor: use torch.as_tensor({name})")
    if x.dtype not in FLOAT_DTYPES:
        raise ShapeError(f"{name} is {x.dtype}; quantize takes float32, bfloat16 or float16: convert it first")
    if x.dim() < 1:
        raise ShapeError(f"{name} is a scalar; quantize needs at least one dimension")
    if x.shape[-1] % fmt.block_columns:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}: the last dimension must be divisible by {fmt.block_columns} "
            f"for {type(fmt).__name__}; pad it, or leave this tensor unquantized"
        )


def check_amax(amax: Tensor, x: Tensor, wanted: torch.Size, name: str = "amax") -> None:
    """Raise ShapeError unless amax is float32 of the wanted shape, or (), beside x."""
    if not isinstance(amax, Tensor):
        raise ShapeError(f"{name} is {type(amax).__name__}; needs a float32 tensor: torch.tensor({amax!r})")
    if amax.dtype != torch.float32 or (amax.dim() and amax.shape != wanted):
        raise ShapeError(
            f"{name} is {amax.dtype} of shape {tuple(amax.shape)}; "
            f"needs torch.float32 of shape {tuple(wanted)}, or one value of shape ()"
        )
    if amax.device != x.device:
        raise ShapeError(f"{name} is on {amax.device}, x on {x.device}; move one with .to(device)")


def check_rounding(fmt: NVFP4, rng: object, first_block: object = 0, name: str = "rng") -> None:
    """Raise FormatError unless random words are given exactly where fmt rounds stochastically."""
    if fmt.rounding == "nearest":
        if rng is not None or first_block != 0:
            raise FormatError(
                f"{name} and first_block are only for rounding='stochastic'; this format rounds to nearest"
            )
        return
    if not isinstance(rng, tuple) or len(rng) != 2 or not all(isinstance(w, int) and 0 <= w < 2**64 for w in rng):
        raise FormatError(f"{name}={rng!r}: rounding='stochastic' needs {name}=(seed, offset), two integers of 64 bits")
    if not isinstance(first_block, int) or not 0 <= first_block < 2**60:
        raise FormatError(f"first_block={first_block!r}: must be an integer from 0 to 2**60")


def check_scale(scale: Tensor, name: str = "scale") -> None:
    """Raise ShapeError unless scale is a tensor of one byte per element."""
    if not isinstance(scale, Tensor) or scale.element_size() != 1:
        kind = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise ShapeError(f"{name} is {kind}; needs a tensor of one byte per scale: float8_e4m3fn or uint8")
