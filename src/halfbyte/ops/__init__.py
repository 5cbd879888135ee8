"""Validate → pick the implementation → run. The only place that dispatches.

Everything here takes and returns plain tensors; `halfbyte.functional` wraps them. "reference" is `numerics` itself;
every other implementation has functions of the same signatures, and equals it bit for bit. Under torch.compile, or a
dispatch mode, each call is one opaque operator (custom.py); otherwise the implementation is called directly, which
costs less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..formats import MXFP8, NVFP4
from ..numerics import nvfp4
from ..numerics.nvfp4 import Encoded
from ..numerics.swizzle import swizzled_size
from . import custom
from .backends import Impl, backend, pick
from .checks import (
    FLOAT_DTYPES,
    check_amax,
    check_error_weights,
    check_input,
    check_inputs,
    check_rounding,
    check_scale,
)
from .matmul import block_scaled_matmul, has_block_scaled_matmul, scaled_grouped_matmul, scaled_matmul
from .wgrad import scaled_grouped_wgrad

__all__ = [
    "FLOAT_DTYPES",
    "Encoded",
    "Impl",
    "block_scaled_matmul",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "fake_quantize",
    "has_block_scaled_matmul",
    "pick",
    "quantize_many",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_transpose",
    "quantize_with_values",
    "scaled_grouped_matmul",
    "scaled_grouped_wgrad",
    "scaled_matmul",
    "swizzle",
    "swizzled_size",
    "tensor_scales",
    "unswizzle",
]

Words = tuple[int, int] | Tensor | None


def quantize_nvfp4(
    x: Tensor,
    fmt: NVFP4,
    *,
    impl: str = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: Words = None,
    first_block: int = 0,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Encoded:
    """See `halfbyte.quantize`."""
    x, amax = _checked(x, fmt, amax, per_matrix, rng, first_block, importance=importance, hessian=hessian)
    name = pick(impl, x.device)
    if custom.wanted():
        words = custom.random_words(rng)
        return Encoded(
            *custom.quantize_nvfp4(
                x, amax, custom.spell(fmt), per_matrix, words, first_block, importance, hessian, name
            )
        )
    weights = {} if importance is None and hessian is None else {"importance": importance, "hessian": hessian}
    run = backend(name).quantize_nvfp4
    return Encoded(*run(x, fmt, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block, **weights))


def quantize_mxfp8(x: Tensor, fmt: MXFP8, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(elements, block_scale); see `halfbyte.quantize`."""
    check_input(x, fmt)
    name = pick(impl, x.device)
    if custom.wanted():
        return custom.quantize_mxfp8(x.detach(), name)  # type: ignore[no-any-return]
    return backend(name).quantize_mxfp8(x.detach())


def dequantize_nvfp4(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype, *, impl: str = "auto"
) -> Tensor:
    """See `halfbyte.QuantizedTensor.dequantize`; tensor_scale None leaves it out."""
    name = pick(impl, packed.device)
    if custom.wanted():
        return custom.dequantize_nvfp4(packed, block_scale, tensor_scale, dtype, name)  # type: ignore[no-any-return]
    return backend(name).dequantize_nvfp4(packed, block_scale, tensor_scale, dtype)


def dequantize_mxfp8(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
    """See `halfbyte.QuantizedTensor.dequantize`."""
    name = pick(impl, elements.device)
    if custom.wanted():
        return custom.dequantize_mxfp8(elements, block_scale, dtype, name)  # type: ignore[no-any-return]
    return backend(name).dequantize_mxfp8(elements, block_scale, dtype)


def fake_quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    unscaled: bool = False,
    impl: str = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: Words = None,
    first_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """(values, tensor_scale); see `halfbyte.fake_quantize` and `halfbyte.fake_quantize_unscaled`."""
    x, amax = _checked(x, fmt, amax, per_matrix, rng, first_block)
    name = pick(impl, x.device)
    if custom.wanted():
        words = custom.random_words(rng)
        return custom.fake_quantize(  # type: ignore[no-any-return]
            x, amax, custom.spell(fmt), unscaled, per_matrix, words, first_block, name
        )
    run = backend(name).fake_quantize
    return run(x, fmt, unscaled=unscaled, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block)


def quantize_with_values(
    x: Tensor,
    fmt: NVFP4,
    *,
    impl: str = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: Words = None,
    first_block: int = 0,
) -> tuple[Encoded, Tensor]:
    """(what `quantize_nvfp4` gives, q·s in x's dtype): what to save for backward and what to multiply, in one pass.

    Arguments and errors are those of `halfbyte.quantize`. The values are contiguous, and exact in x's dtype.
    """
    x, amax = _checked(x, fmt, amax, per_matrix, rng, first_block)
    name = pick(impl, x.device)
    if custom.wanted():
        *parts, values = custom.quantize_with_values(
            x, amax, custom.spell(fmt), per_matrix, custom.random_words(rng), first_block, name
        )
        return Encoded(*parts), values
    run = backend(name).quantize_with_values
    q, values = run(x, fmt, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block)
    return Encoded(*q), values


def quantize_transpose(
    x: Tensor,
    fmt: NVFP4,
    transposed_fmt: NVFP4,
    *,
    impl: str = "auto",
    amax: Tensor | None = None,
    transposed_amax: Tensor | None = None,
    rng: Words = None,
    transposed_rng: Words = None,
) -> tuple[Encoded, Encoded]:
    """x and x.mT quantized; see `halfbyte.quantize_transpose`."""
    x, amax = _checked(x, fmt, amax, True, rng, 0)
    _, transposed_amax = _checked(x.mT, transposed_fmt, transposed_amax, True, transposed_rng, 0, "x.mT", "transposed_")
    name = pick(impl, x.device)
    if custom.wanted():
        formats, words = (custom.spell(fmt), custom.spell(transposed_fmt)), custom.random_words(rng)
        parts = custom.quantize_transpose(
            x, amax, transposed_amax, *formats, words, custom.random_words(transposed_rng), name
        )
        return Encoded(*parts[:4]), Encoded(*parts[4:])
    rows, columns = backend(name).quantize_transpose(
        x, fmt, transposed_fmt, amax=amax, transposed_amax=transposed_amax, rng=rng, transposed_rng=transposed_rng
    )
    return Encoded(*rows), Encoded(*columns)


def quantize_many(
    xs: Sequence[Tensor], fmt: NVFP4, *, impl: str = "auto", amax: Tensor | None = None, shared_amax: bool = False
) -> list[Encoded]:
    """See `halfbyte.quantize_many`."""
    if fmt.rounding == "stochastic":
        raise FormatError("quantize_many rounds to nearest: for rounding='stochastic' call quantize, each with its rng")
    if shared_amax and (amax is not None or fmt.scaling == "row"):
        other = "amax given" if amax is not None else "scaling='row', where every row has its own"
        raise FormatError(f"shared_amax=True with {other}: leave shared_amax out")
    check_error_weights(xs[0] if xs else None, fmt, None, None)
    check_inputs(xs, fmt)
    if not xs:
        return []
    if amax is not None:
        check_amax(amax, xs[0], torch.Size((len(xs),)))
        amax = amax.detach()
    xs = [x.detach() if x.requires_grad else x for x in xs]
    name = pick(impl, xs[0].device)
    if custom.wanted():
        parts = custom.quantize_many(xs, amax, custom.spell(fmt), shared_amax, name)
        return [Encoded(*parts[i : i + 4]) for i in range(0, len(parts), 4)]
    return [*map(Encoded._make, backend(name).quantize_many(xs, fmt, amax=amax, shared_amax=shared_amax))]


def swizzle(scale: Tensor, *, impl: str = "auto") -> Tensor:
    """See `halfbyte.swizzle`."""
    check_scale(scale)
    if scale.dim() < 2:
        raise ShapeError(f"scale has shape {tuple(scale.shape)}; needs (…, rows, columns): use scale[None]")
    name = pick(impl, scale.device)
    if custom.wanted():
        return custom.swizzle(scale, name)  # type: ignore[no-any-return]
    return backend(name).swizzle(scale)


def unswizzle(swizzled: Tensor, rows: int, columns: int, *, impl: str = "auto") -> Tensor:
    """See `halfbyte.unswizzle`."""
    check_scale(swizzled, "swizzled")
    size = swizzled_size(rows, columns)
    if swizzled.dim() < 1 or swizzled.shape[-1] != size:
        raise ShapeError(
            f"swizzled has shape {tuple(swizzled.shape)}; {rows}×{columns} scales take {size} in the last dimension: "
            "give the rows and columns that were swizzled"
        )
    name = pick(impl, swizzled.device)
    if custom.wanted():
        return custom.unswizzle(swizzled, rows, columns, name)  # type: ignore[no-any-return]
    return backend(name).unswizzle(swizzled, rows, columns)


def tensor_scales(amax: Tensor, fmt: NVFP4) -> tuple[Tensor, Tensor]:
    """(S_enc, S_dec) that belong to a float32 amax, elementwise."""
    return nvfp4.tensor_scales(amax, fmt)


def _checked(
    x: Tensor,
    fmt: NVFP4,
    amax: Tensor | None,
    per_matrix: bool,
    rng: Words,
    first_block: int,
    name: str = "x",
    prefix: str = "",
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x and amax as constants, after all that can be refused about them."""
    check_input(x, fmt, name)
    check_rounding(x, fmt, rng, first_block, f"{prefix}rng")
    check_error_weights(x, fmt, importance, hessian)
    if per_matrix and x.dim() < 2:
        raise ShapeError(f"a matrix needs at least 2 dimensions; {name} has shape {tuple(x.shape)}: use {name}[None]")
    x = x.detach() if x.requires_grad else x
    if amax is None:
        return x, None
    check_amax(amax, x, nvfp4.amax_shape(x.shape, fmt, per_matrix), f"{prefix}amax")
    return x, amax.detach() if amax.requires_grad else amax
