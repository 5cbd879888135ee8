"""Matmuls of QuantizedTensors: the same product on every device, on the fastest units that it has.

`docs/matmul.md` has the equation, the rule for scales, and the budget. Nothing here carries a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .errors import FormatError, ShapeError
from .tensor import QuantizedTensor

Operand = QuantizedTensor | Tensor
Shape = tuple[int, ...]


def linear(
    x: Operand,
    w: Operand,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_into: Tensor | None = None,
    batch_invariant: bool = False,
    impl: ops.Impl = "auto",
) -> Tensor:
    """x (…, K) · w (N, K)ᵀ + bias → (…, N), of the values that x and w decode to.

    Args:
        x: NVFP4 of any format, or MXFP8; or float32, bfloat16 or float16, where only w is quantized. Its scales go
            along the rows of the result: one for all, one per leading matrix, or one per row.
        w: the same, of two dimensions; its scales go along the columns of the result: one for all, or one per row of w.
        bias: (N,) float32, bfloat16 or float16.
        out_dtype: float32, bfloat16 or float16; of no effect with accumulate_into.
        accumulate_into: float32 (…, N), to which the float32 result is added in place; it is returned.
        batch_invariant: a row of the result depends on w and on the codes and scales of its row of x alone, bit for
            bit, whatever the other rows are and however many. So that a row's scale does not either, quantize x with
            scaling="row", as MXFP8, or under an amax that is fixed. Not on FP4 tensor cores, whose matmul chooses an
            order by its shape, nor with accumulate_into.
        impl: "auto": FP4 tensor cores where the GPU has them; on other GPUs bfloat16 ones, of exact q·s; on a CPU
            float32. "triton": the second, on any GPU. "cpu", "reference": float32, float64. An operand that is not
            quantized is multiplied in its own dtype.

    Raises:
        ShapeError: x and w do not fit; a scale is missing, or of another dtype, shape or device than its operand's
            format says; bias or accumulate_into does not fit.
        FormatError: one of x and w went through a Hadamard transform and the other did not; neither is quantized;
            MXFP8 with float16, which does not hold its values; batch_invariant with accumulate_into.
        UnsupportedError: impl cannot run here.

    Numerics: float32 sums, in any order; scales, bias and out_dtype one rounding each.
    """
    _check_operands(x, w, 2)
    k, columns, lead = x.shape[-1], w.shape[0], x.shape[:-1]
    rows = math.prod(lead)
    a_scale = _scale(x, "x", ((), lead[:-1]) if len(lead) > 1 else ((),), lead)
    if a_scale is not None and a_scale.dim():  # of matrices or rows: to rows
        a_scale = a_scale.reshape(*a_scale.shape, *(1,) * (len(lead) - a_scale.dim())).expand(lead).reshape(rows)
    b_scale = _scale(w, "w", ((),), w.shape[:-1])
    if accumulate_into is not None:
        accumulate_into = _as_matrix(accumulate_into, (*lead, columns), rows)
    out: dict[str, object] = {"bias": bias, "out_dtype": out_dtype, "accumulate_into": accumulate_into}
    if (
        impl == "auto"
        and not batch_invariant
        and isinstance(x, QuantizedTensor)
        and isinstance(w, QuantizedTensor)
        and x.format_facts.name == w.format_facts.name
        and ops.has_block_scaled_matmul(x.device, rows, columns, k)
    ):
        codes = x.packed.reshape(rows, x.packed.shape[-1]), _swizzled_scale(x), w.packed, _swizzled_scale(w)
        y = ops.block_scaled_matmul(*codes, a_scale, b_scale, **out)  # type: ignore[arg-type]
    else:
        a, b = _values(x, w, impl)
        out["batch_invariant"] = batch_invariant
        y = ops.scaled_matmul(a.reshape(rows, k), b, a_scale, b_scale, impl=impl, **out)  # type: ignore[arg-type]
    return y.view(*lead, columns)


def grouped_linear(
    x: Operand,
    w: Operand,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    impl: ops.Impl = "auto",
) -> Tensor:
    """Rows of x (T, K), sorted by expert, each times its expert's matrix of w (E, N, K): (T, N).

    Args:
        x: as for `linear`, of two dimensions: one scale for all, or one per row.
        w: three dimensions: one scale for all, one per expert (`per_matrix=True`), or one per row of each expert.
        offsets: int32 (E,), each expert's last row plus one, as torch's grouped_mm takes them; not decreasing. An
            expert may have no rows. Rows past the last end give zeros. On a GPU the values are not looked at.
        bias: (E, N) float32, bfloat16 or float16.
        out_dtype: float32, bfloat16 or float16.
        batch_invariant: as for `linear`; which experts other rows go to does not matter either.
        impl: as for `linear`; all GPUs multiply exact q·s on bfloat16 tensor cores.

    Raises:
        ShapeError, FormatError, UnsupportedError: as `linear`.

    Numerics: as `linear`, but that torch's grouped matmul on a GPU rounds the sums to bfloat16 before they are scaled;
        with batch_invariant=True it does not.
    """
    _check_operands(x, w, 3)
    if len(x.shape) != 2:
        raise ShapeError(f"x has shape {tuple(x.shape)}; grouped_linear takes (T, K): use x.reshape(-1, K)")
    a_scale = _scale(x, "x", ((),), x.shape[:-1])
    b_scale = _scale(w, "w", ((), w.shape[:1]), w.shape[:-1])
    a, b = _values(x, w, impl)
    return ops.scaled_grouped_matmul(
        a, b, offsets, a_scale, b_scale, bias=bias, out_dtype=out_dtype, batch_invariant=batch_invariant, impl=impl
    )


def _check_operands(x: Operand, w: Operand, w_dims: int) -> None:
    for name, operand, dims in (("x", x, 1), ("w", w, w_dims)):
        if not isinstance(operand, QuantizedTensor | Tensor):
            raise ShapeError(f"{name} is {type(operand).__name__}; needs a QuantizedTensor, from halfbyte.quantize")
        if len(operand.shape) < dims or (name == "w" and len(operand.shape) != dims):
            raise ShapeError(f"{name} has shape {tuple(operand.shape)}; w is (N, K), or (E, N, K) for grouped_linear")
        if isinstance(operand, QuantizedTensor):
            _check_parts(operand, name)
    if x.shape[-1] != w.shape[-1] or x.device != w.device:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} on {x.device}, w {tuple(w.shape)} on {w.device}; "
            "the last dimensions must be equal, and the devices"
        )
    formats = [operand.format_facts if isinstance(operand, QuantizedTensor) else None for operand in (x, w)]
    if formats[0] is None and formats[1] is None:
        raise FormatError("neither x nor w is quantized: use torch.nn.functional.linear")
    transformed = [fmt is not None and fmt.hadamard for fmt in formats]
    if transformed[0] != transformed[1]:
        which, other = ("x", "w") if transformed[0] else ("w", "x")
        raise FormatError(
            f"{which} went through the Hadamard transform, {other} did not: their product would be another matrix; "
            "quantize both with hadamard=True, or neither"
        )
    plain = [operand for operand in (x, w) if not isinstance(operand, QuantizedTensor)]
    if plain and plain[0].dtype == torch.float16 and any(fmt is not None and fmt.name == "MXFP8" for fmt in formats):
        raise FormatError("MXFP8 with float16, which does not hold its values: convert the other operand to bfloat16")


def _check_parts(q: QuantizedTensor, name: str) -> None:
    """The codes and block scales must be what the format says."""
    fmt = q.format_facts
    codes, scale = (torch.uint8, torch.float8_e4m3fn) if fmt.name == "NVFP4" else (torch.float8_e4m3fn, torch.uint8)
    blocks = q.shape[-1] // fmt.block_columns
    shape = (*q.shape[:-1], blocks)
    good = isinstance(q.block_scale, Tensor) and q.block_scale.dtype == scale and q.block_scale.device == q.device
    if good and not q.swizzled:
        good = tuple(q.block_scale.shape) == shape
    elif good:
        rows = (math.prod(shape[:-1]),) if q.block_scale.dim() == 1 else shape[:-1]
        wanted = (*rows[:-1], ops.swizzled_size(rows[-1], blocks))
        good = tuple(q.block_scale.shape) == wanted
    if not good or q.packed.dtype != codes:
        raise ShapeError(
            f"{name}: codes are {_spell(q.packed)}, block scales {_spell(q.block_scale)}; {fmt.name} "
            f"has {codes} codes and {scale} scales of shape {shape}, or swizzled ones with swizzled=True"
        )


def _scale(operand: Operand, name: str, tensor_shapes: tuple[Shape, ...], row_shape: Shape) -> Tensor | None:
    """The operand's tensor scale: by its format of one of tensor_shapes, or of row_shape."""
    if not isinstance(operand, QuantizedTensor):
        return None
    scale, fmt = operand.tensor_scale, operand.format_facts
    if fmt.name == "MXFP8":
        if scale is not None:
            raise ShapeError(f"{name}.tensor_scale is {_spell(scale)}; MXFP8 has none: make it None")
        return None
    shapes = (row_shape,) if fmt.scaling == "row" else tensor_shapes
    good = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.device == operand.device
    if scale is None or not good or tuple(scale.shape) not in [tuple(shape) for shape in shapes]:
        raise ShapeError(
            f"{name}.tensor_scale is {_spell(scale)}; scaling={fmt.scaling!r} needs torch.float32 on "
            f"{operand.device} of shape {' or '.join(str(tuple(shape)) for shape in shapes)}"
        )
    return scale


def _values(x: Operand, w: Operand, impl: ops.Impl) -> tuple[Tensor, Tensor]:
    """What is multiplied, both in one dtype; the dtype of an operand that is not quantized, where there is one."""
    plain = [operand.dtype for operand in (x, w) if not isinstance(operand, QuantizedTensor)]
    on_tensor_cores = ops.pick(impl, x.device) == "triton"
    dtype = plain[0] if plain else torch.bfloat16 if on_tensor_cores else torch.float32
    if plain and plain[0] not in ops.FLOAT_DTYPES:
        raise ShapeError(f"an operand that is not quantized is {plain[0]}; needs float32, bfloat16 or float16")
    return _decode(x, dtype, impl), _decode(w, dtype, impl)


def _decode(operand: Operand, dtype: torch.dtype, impl: ops.Impl) -> Tensor:
    if not isinstance(operand, QuantizedTensor):
        return operand
    return operand.dequantize(dtype, unscaled=operand.format_facts.name == "NVFP4", impl=impl)


def _swizzled_scale(q: QuantizedTensor) -> Tensor:
    """Block scales of all rows as one matrix, in the order that the hardware reads."""
    if q.swizzled and q.block_scale.dim() == 1:
        return q.block_scale
    blocks = q.shape[-1] // q.format_facts.block_columns
    scale = ops.unswizzle(q.block_scale, q.shape[-2], blocks) if q.swizzled else q.block_scale
    return ops.swizzle(scale.reshape(math.prod(q.shape[:-1]), blocks))


def _as_matrix(buffer: Tensor, shape: tuple[int, ...], rows: int) -> Tensor:
    """The buffer (…, N) as the matrix (M, N), in place."""
    if not isinstance(buffer, Tensor) or tuple(buffer.shape) != shape:
        raise ShapeError(f"accumulate_into is {_spell(buffer)}; needs torch.float32 of shape {shape}")
    try:
        return buffer.view(rows, shape[-1])
    except RuntimeError as error:
        raise ShapeError(
            f"accumulate_into of shape {shape} and strides {buffer.stride()} is no matrix: make it contiguous"
        ) from error


def _spell(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
