"""What the operators refuse; each message names the argument, what it is, what is needed, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..formats import NVFP4, Format

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_input(x: Tensor, fmt: Format, name: str = "x") -> None:
    """Raise ShapeError unless x is a float tensor whose last dimension fmt divides into blocks."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is {type(x).__name__}; quantize takes a torch.Tensor: use torch.as_tensor({name})")
    if type(x) is not Tensor and hasattr(type(x), "__tensor_flatten__"):  # around other tensors, without memory itself
        raise ShapeError(
            f"{name} is {type(x).__name__}; quantize takes plain tensors: use {name}.dequantize(), or .to_local()"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise ShapeError(f"{name} is {x.dtype}; quantize takes float32, bfloat16 or float16: convert it first")
    if x.dim() < 1:
        raise ShapeError(f"{name} is a scalar; quantize needs at least one dimension")
    if x.shape[-1] % fmt.block_columns:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}: the last dimension must be divisible by {fmt.block_columns} "
            f"for {type(fmt).__name__}; pad it, or leave this tensor unquantized"
        )


def check_inputs(xs: Sequence[Tensor], fmt: Format) -> None:
    """`check_input` of each; raise ShapeError too where one is on another device than the first."""
    known: set[object] = set()  # of a hundred experts most are alike
    compiling = torch.compiler.is_compiling()  # shapes may be symbols, which no set takes
    for i, x in enumerate(xs):
        if not compiling and isinstance(x, Tensor):
            facts = (type(x), x.shape, x.dtype, x.device)
            if facts in known:
                continue
            known.add(facts)
        check_input(x, fmt, f"xs[{i}]")
        if x.device != xs[0].device:
            raise ShapeError(f"xs[{i}] is on {x.device}, xs[0] on {xs[0].device}; move one with .to(device)")


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


def check_rounding(x: Tensor, fmt: NVFP4, rng: object, first_block: object = 0, name: str = "rng") -> None:
    """Raise FormatError unless random words are given exactly where fmt rounds stochastically, fit for x."""
    if fmt.rounding == "nearest":
        if rng is not None or first_block != 0:
            raise FormatError(
                f"{name} and first_block are only for rounding='stochastic'; this format rounds to nearest"
            )
        return
    if isinstance(rng, Tensor):
        if rng.dtype != torch.int64 or tuple(rng.shape) != (2,) or rng.device != x.device:
            raise FormatError(
                f"{name} is {rng.dtype} of shape {tuple(rng.shape)} on {rng.device}; needs torch.int64 (2,), seed and "
                "offset, on x's device"
            )
    elif not isinstance(rng, tuple) or len(rng) != 2 or not all(isinstance(w, int) and 0 <= w < 2**64 for w in rng):
        raise FormatError(f"{name}={rng!r}: rounding='stochastic' needs {name}=(seed, offset), two integers of 64 bits")
    if not isinstance(first_block, int) or not 0 <= first_block < 2**60:
        raise FormatError(f"first_block={first_block!r}: must be an integer from 0 to 2**60")


def check_error_weights(x: Tensor | None, fmt: NVFP4, importance: Tensor | None, hessian: Tensor | None) -> None:
    """Raise unless importance and hessian are given where fmt has a use for them, float32 and of x's columns."""
    if hessian is None and fmt.error == "hessian":
        raise FormatError(
            "error='hessian' needs hessian=, a float32 tensor (K/16, 16, 16), which halfbyte.quantize takes; "
            "use error='mse' where there is none"
        )
    if importance is not None and (fmt.scale_rule != "search" or fmt.error == "hessian"):
        raise FormatError("importance is for scale_rule='search' with error='mse' or 'mae': leave it out")
    if hessian is not None and fmt.error != "hessian":
        raise FormatError("hessian is for scale_rule='search' with error='hessian': leave it out")
    if x is None or (importance is None and hessian is None):
        return
    columns = x.shape[-1]
    wanted = {"importance": (columns,), "hessian": (columns // 16, 16, 16)}
    for name, value in (("importance", importance), ("hessian", hessian)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != wanted[name]:
            kind = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"{name} is {kind}; needs torch.float32 of shape {wanted[name]} for x of {columns} columns"
            )
        # On a GPU a look at the values would wait for it, under torch.compile it would break the graph.
        look = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and name == "importance" and not bool(((value >= 0) & value.isfinite()).all()):
            raise FormatError("importance has a negative, infinite or NaN weight; the search needs them from 0 up")
        if look and name == "hessian" and not bool(value.isfinite().all()):
            raise FormatError("hessian has an infinite or NaN entry, under which every scale is as bad as any other")
        if value.device != x.device:
            raise ShapeError(f"{name} is on {value.device}, x on {x.device}; move one with .to(device)")


def check_scale(scale: Tensor, name: str = "scale") -> None:
    """Raise ShapeError unless scale is a tensor of one byte per element."""
    if not isinstance(scale, Tensor) or scale.element_size() != 1:
        kind = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise ShapeError(f"{name} is {kind}; needs a tensor of one byte per scale: float8_e4m3fn or uint8")
