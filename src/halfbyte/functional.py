"""What users call: tensors in, `QuantizedTensor` out, and conversions beside it. Nothing here carries a gradient.

Every function takes `impl`: "reference" is the specification, "cpu" and "triton" are the fast paths, and "auto", the
default, picks the fastest that runs where the tensor is. All give the same bytes, bitwise as `docs/numerics.md`. Each
works under `torch.compile(fullgraph=True)`, as one operator.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import ops
from .errors import FormatError, ShapeError
from .formats import MXFP8, NVFP4, Format
from .tensor import QuantizedTensor

Words = tuple[int, int] | Tensor | None


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    impl: ops.Impl = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: Words = None,
    first_block: int = 0,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    swizzle: bool = False,
) -> QuantizedTensor:
    """Quantize x to fmt along its last dimension; `quantize(x.mT, fmt)` is what others call column-wise.

    Args:
        x: (…, K) float32, bfloat16 or float16, any strides, K divisible by 16 (NVFP4) or 32 (MXFP8). It is the
            matrix (-1, K): one tensor scale, or one per row.
        fmt: an `NVFP4` or `MXFP8`.
        impl: see above.
        amax: float32 maximum, not negative, to use instead of x's own, shared across tensors or ranks; values beyond
            it saturate.
            With hadamard=True it is the maximum after the transform.
        per_matrix: each leading matrix of x (E, M, K) has its own tensor scale, and no 16×16 block crosses matrices.
        rng: (seed, offset) for stochastic rounding, 64 bits each; required for it and refused otherwise. A tuple, or
            an int64 tensor (2,) with the same bits on x's device, read when the kernel runs: a CUDA graph whose
            replays shall round by new words advances it.
        first_block: for stochastic rounding, the row-major index of x's first 1×16 block in the tensor that it is a
            part of, so that parts round like the whole.
        importance: for scale_rule="search" with error "mse" or "mae": float32 (K,), finite and not negative, the
            weight of each column's error.
        hessian: for error="hessian", required: float32 (K/16, 16, 16), for each 16 columns a symmetric positive
            semidefinite H, such as the mean of activations' outer products; the block's error is dᵀ·H·d.
        swizzle: give block scales in the order that Blackwell's matmul reads; see `QuantizedTensor.swizzle`.

    Raises:
        ShapeError: dtype, shape or amax does not fit.
        FormatError: rng, importance or hessian is missing or has no use; impl or an MXFP8 argument is unknown.
        UnsupportedError: impl cannot run here.

    Numerics: NaN gives NaN block scales, never an exception.
    Source: NVFP4 rules of TransformerEngine 2.20's reference quantizer; MXFP8 of the OCP MX specification with
    TransformerEngine's scale rounding.
    """
    _check_format(fmt)
    if isinstance(fmt, MXFP8):
        if amax is not None or per_matrix or rng is not None or first_block:
            raise FormatError("MXFP8 has no tensor scale and rounds to nearest: leave amax, per_matrix and rng out")
        if importance is not None or hessian is not None:
            raise FormatError("MXFP8 has one rule for its scales: leave importance and hessian out")
        q = QuantizedTensor(*ops.quantize_mxfp8(x, fmt, impl=impl), None, None, fmt, dtype=x.dtype)
    else:
        q = QuantizedTensor(
            *ops.quantize_nvfp4(
                x, fmt, impl=impl, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block,
                importance=importance, hessian=hessian,
            ), fmt, dtype=x.dtype,
        )  # fmt: skip
    return q.swizzle(per_matrix, impl=impl) if swizzle else q


def quantize_transpose(
    x: Tensor,
    fmt: Format,
    transposed_fmt: Format | None = None,
    *,
    impl: ops.Impl = "auto",
    amax: Tensor | None = None,
    transposed_amax: Tensor | None = None,
    rng: Words = None,
    transposed_rng: Words = None,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Quantize x and its transpose at once: what a training step needs, "rowwise" and "columnwise" data.

    The same as `quantize(x, fmt, per_matrix=True)` and `quantize(x.mT, transposed_fmt, per_matrix=True)`.

    Args:
        x: (…, M, K) float32, bfloat16 or float16, both M and K divisible by 16 (NVFP4) or 32 (MXFP8); contiguous x
            is fastest. Each leading matrix has its own tensor scale.
        fmt: format of x.
        transposed_fmt: format of x.mT, for example with hadamard=True; fmt unless given.
        impl: see above.
        amax: float32 maximum to use instead of x's own: (), or one per matrix, or per row.
        transposed_amax: the same for x.mT; after the transform if transposed_fmt has one.
        rng: (seed, offset) if fmt rounds stochastically.
        transposed_rng: the same for transposed_fmt; another offset, if the two are to be independent.

    Returns:
        x quantized, of shape (…, M, K); x.mT quantized, of shape (…, K, M).

    Raises:
        ShapeError, FormatError, UnsupportedError: as `quantize`.

    Source: TransformerEngine's quantize_transpose, whose training recipe transforms the transposed one only.
    """
    transposed_fmt = fmt if transposed_fmt is None else transposed_fmt
    _check_format(fmt)
    _check_format(transposed_fmt, "transposed_fmt")
    if isinstance(fmt, NVFP4) and isinstance(transposed_fmt, NVFP4):
        rows, columns = ops.quantize_transpose(
            x, fmt, transposed_fmt, impl=impl, amax=amax, transposed_amax=transposed_amax, rng=rng,
            transposed_rng=transposed_rng,
        )  # fmt: skip
        return (
            QuantizedTensor(*rows, fmt, dtype=x.dtype),
            QuantizedTensor(*columns, transposed_fmt, dtype=x.dtype),
        )
    if x.dim() < 2:
        raise ShapeError(f"a matrix needs at least 2 dimensions; x has shape {tuple(x.shape)}: use x[None]")
    return (
        quantize(x, fmt, impl=impl, amax=amax, per_matrix=isinstance(fmt, NVFP4), rng=rng),
        quantize(
            x.mT, transposed_fmt, impl=impl, amax=transposed_amax, per_matrix=isinstance(transposed_fmt, NVFP4),
            rng=transposed_rng,
        ),
    )  # fmt: skip


def quantize_many(
    xs: Sequence[Tensor],
    fmt: Format,
    *,
    shared_amax: bool = False,
    amax: Tensor | None = None,
    impl: ops.Impl = "auto",
) -> list[QuantizedTensor]:
    """Quantize a list of tensors of any shapes, such as experts or the members of a fused layer.

    The same as `[quantize(x, fmt, amax=…) for x in xs]`; on a GPU in few launches instead of some for each.

    Args:
        xs: tensors as `quantize` takes them, all on one device; none is fine.
        fmt: an `NVFP4` that rounds to nearest, or `MXFP8`.
        shared_amax: one maximum for all, the largest (NaN wins), so that all have the same tensor scale; for
            scaling="tensor" only. False: each tensor its own, or each of its rows.
        amax: float32 maximum to use instead: (), or (len(xs),), one for each tensor.
        impl: see above.

    Raises:
        ShapeError, FormatError, UnsupportedError: as `quantize`; ShapeError too where xs is not a list, FormatError
            where rounding is stochastic or shared_amax has no meaning.
    """
    _check_format(fmt)
    if not isinstance(xs, list | tuple):
        raise ShapeError(f"xs is {type(xs).__name__}; quantize_many takes a list of tensors: use list(xs)")
    if isinstance(fmt, MXFP8):
        if amax is not None or shared_amax:
            raise FormatError("MXFP8 has no tensor scale: leave amax and shared_amax out")
        return [quantize(x, fmt, impl=impl) for x in xs]
    made = ops.quantize_many(xs, fmt, impl=impl, amax=amax, shared_amax=shared_amax)
    return [QuantizedTensor(*q, fmt, dtype=x.dtype) for q, x in zip(made, xs, strict=True)]


def fake_quantize(
    x: Tensor,
    fmt: Format,
    *,
    impl: ops.Impl = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: Words = None,
    first_block: int = 0,
) -> Tensor:
    """The values that x decodes to once it is quantized: `quantize(x, …).dequantize(x.dtype)`, in one pass on a GPU.

    Arguments and errors are those of `quantize`. A Hadamard transform is not undone.

    Returns:
        x's shape and dtype, contiguous.
    """
    _check_format(fmt)
    if isinstance(fmt, MXFP8):
        q = quantize(x, fmt, impl=impl, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block)
        return q.dequantize(x.dtype, impl=impl)
    options = {"per_matrix": per_matrix, "rng": rng, "first_block": first_block}
    return ops.fake_quantize(x, fmt, impl=impl, amax=amax, **options)[0]  # type: ignore[arg-type]


def fake_quantize_unscaled(
    x: Tensor,
    fmt: NVFP4,
    *,
    impl: ops.Impl = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: Words = None,
    first_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """(q·s, tensor_scale): what x decodes to but for the tensor scale, exact in x's dtype.

    A matmul on bf16 tensor cores takes such values and multiplies by α = S_dec(x)·S_dec(w) at the end; see
    "Decoding" in `docs/numerics.md`. Arguments and errors are those of `quantize`, for NVFP4 only.

    Returns:
        values: x's shape and dtype, contiguous.
        tensor_scale: S_dec, float32: (), or one per matrix, or one per row.
    """
    if not isinstance(fmt, NVFP4):
        raise FormatError(f"fmt={fmt!r}: needs an NVFP4(...) value; use fake_quantize for MXFP8")
    options = {"per_matrix": per_matrix, "rng": rng, "first_block": first_block}
    return ops.fake_quantize(x, fmt, unscaled=True, impl=impl, amax=amax, **options)  # type: ignore[arg-type]


def swizzle(block_scale: Tensor, *, impl: ops.Impl = "auto") -> Tensor:
    """Block scales in the order that Blackwell's scaled matmul reads: tiles of 128 rows by 4 scales.

    It is cuBLAS's 128×4 layout, torch's `SwizzleType.SWIZZLE_32_4_4` and torchao's `to_blocked`, for NVFP4 and MXFP8.

    Args:
        block_scale: (…, R, C), one byte each (float8_e4m3fn or uint8), any strides; each matrix by itself.
        impl: see above.

    Returns:
        (…, ⌈R/128⌉·⌈C/4⌉·512) of block_scale's dtype, padded with zeros.

    Raises:
        ShapeError: block_scale is not of one byte per scale, or has fewer than two dimensions.
        FormatError, UnsupportedError: as `quantize`.
    """
    return ops.swizzle(block_scale, impl=impl)


def unswizzle(swizzled: Tensor, rows: int, columns: int, *, impl: ops.Impl = "auto") -> Tensor:
    """The inverse of `swizzle`: (…, bytes) → (…, rows, columns), without the padding.

    Raises:
        ShapeError: the last dimension is not what rows × columns scales take.
        FormatError, UnsupportedError: as `quantize`.
    """
    return ops.unswizzle(swizzled, rows, columns, impl=impl)


def _check_format(fmt: Format, name: str = "fmt") -> None:
    if not isinstance(fmt, Format):
        raise FormatError(f"{name}={fmt!r}: needs an NVFP4(...) or MXFP8() value")
