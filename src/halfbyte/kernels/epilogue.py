"""What follows a matmul whose operands were q·s: scales, bias, and one rounding, or addition to a float32 buffer.

Fewest bytes per element of the result: 4 read (2 for sums in bfloat16, as a grouped matmul leaves them) and 2 or 4
written, and 4 more read to accumulate; the floor is those over the copy bandwidth. Scales and bias are read through
pointers, also where they are one value, so that nothing waits for the GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _target
from ._primitives import as_float32, jit, round_to_kind
from ._tiles import KINDS

ROWS, COLUMNS, WARPS = 8, 512, 4  # of a tile: 32 elements a thread, of which 4 lie together
FEW_COLUMNS = 64
SUMS = 1 << 28  # elements of the float32 sums that exist at a time


@jit
def _along(ptr, row, column, expert, columns, AXIS: tl.constexpr, row_mask, column_mask):
    """A scale or a bias as float32 that broadcasts against [BM, BN]."""
    if AXIS == "one":
        value = tl.load(ptr)
    elif AXIS == "rows":
        value = tl.load(ptr + row, mask=row_mask, other=0.0)[:, None]
    elif AXIS == "columns":
        value = tl.load(ptr + column, mask=column_mask, other=0.0)[None, :]
    elif AXIS == "experts":
        value = tl.load(ptr + expert, mask=row_mask, other=0.0)[:, None]
    else:  # of each expert's columns
        mask = row_mask[:, None] & column_mask[None, :]
        value = tl.load(ptr + expert[:, None] * columns + column[None, :], mask=mask, other=0.0)
    return value


@jit
def scaled(
    value, a_scale_ptr, b_scale_ptr, bias_ptr, row, column, expert, columns, row_mask, column_mask,
    A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, BIAS_KIND: tl.constexpr,
):  # fmt: skip
    """Float32 sums [BM, BN] · (a_scale · b_scale) + bias, one rounding each; A, B, BIAS: as `_along` takes them."""
    if A != "none":
        alpha = _along(a_scale_ptr, row, column, expert, columns, A, row_mask, column_mask)
        if B != "none":
            alpha *= _along(b_scale_ptr, row, column, expert, columns, B, row_mask, column_mask)
        value *= alpha
    elif B != "none":
        value *= _along(b_scale_ptr, row, column, expert, columns, B, row_mask, column_mask)
    if BIAS != "none":
        bias = _along(bias_ptr, row, column, expert, columns, BIAS, row_mask, column_mask)
        value += as_float32(bias, BIAS_KIND)
    return value


@jit
def store(out, value, mask, OUT: tl.constexpr, NATIVE: tl.constexpr):
    """Float32 rounded to the dtype that OUT is the kind of, and stored where mask holds."""
    if NATIVE == 0 and OUT == 0:  # by bits: the interpreter's cast rounds otherwise, and loses subnormals
        value = tl.where(value == value, round_to_kind(value, OUT), value)
        value = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@jit
def _epilogue(
    total_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, offsets_ptr, out_ptr,
    rows, columns, experts, column_tiles, total_stride, out_stride_m, out_stride_n,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, TOTAL: tl.constexpr, OUT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, BIAS_KIND: tl.constexpr, ADD: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    # TOTAL, OUT, BIAS_KIND: dtypes as KINDS has them. BE: 0, or a power of two from the number of experts on.
    pid = tl.program_id(0)
    row = (pid // column_tiles).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    column = pid % column_tiles * BN + tl.arange(0, BN)  # [BN]
    row_mask, column_mask = row < rows, column < columns
    mask = row_mask[:, None] & column_mask[None, :]
    expert = row
    if BE:
        e = tl.arange(0, BE)
        ends = tl.load(offsets_ptr + e, mask=e < experts, other=0x7FFFFFFF)  # [BE]
        expert = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1).to(tl.int64)  # [BM]
        row_mask &= expert < experts
    total = tl.load(total_ptr + row[:, None] * total_stride + column[None, :], mask=mask, other=0.0)
    value = scaled(
        as_float32(total, TOTAL), a_scale_ptr, b_scale_ptr, bias_ptr, row, column, expert, columns, row_mask,
        column_mask, A, B, BIAS, BIAS_KIND,
    )  # fmt: skip  # [BM, BN]
    if BE:  # what lies past the last expert's end was never computed
        value = tl.where(row_mask[:, None], value, 0.0)
    out = out_ptr + row[:, None] * out_stride_m + column[None, :].to(tl.int64) * out_stride_n
    if ADD:
        value += tl.load(out, mask=mask, other=0.0)
    store(out, value, mask, OUT, NATIVE)


def epilogue(
    total: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    accumulate: bool = False,
    offsets: Tensor | None = None,
) -> Tensor:
    """out ← total · (a_scale · b_scale) + bias, or added to out; as `halfbyte.numerics.matmul.epilogue`, and its bits.

    total: (M, N) float32 or bfloat16, columns contiguous. a_scale: () or (M,). b_scale: () or (N,). bias: (N,), of any
    of the three dtypes. out: (M, N), any strides; may be total itself. offsets: int32 (E,), each expert's last row plus
    one; b_scale is then (), (E,) or (E, N), bias (E, N), and rows past the last end become zero.
    """
    rows, columns = total.shape
    if total.numel() == 0:
        return out
    bn = COLUMNS if columns > FEW_COLUMNS else FEW_COLUMNS
    bm = ROWS * (COLUMNS // bn)
    column_tiles = triton.cdiv(columns, bn)
    experts = 0 if offsets is None else offsets.numel()
    _epilogue[(triton.cdiv(rows, bm) * column_tiles,)](
        total,
        total if a_scale is None else a_scale.contiguous(),
        total if b_scale is None else b_scale.contiguous(),
        total if bias is None else bias.contiguous(),
        total if offsets is None else offsets.contiguous(),
        out, rows, columns, experts, column_tiles, total.stride(0), out.stride(0), out.stride(1),
        BM=bm, BN=bn, BE=triton.next_power_of_2(experts) if experts else 0,
        TOTAL=KINDS[total.dtype], OUT=KINDS[out.dtype],
        A=axis(a_scale, ("one", "rows", "")),
        B=axis(b_scale, ("one", "columns" if offsets is None else "experts", "experts and columns")),
        BIAS=axis(bias, ("one", "columns", "experts and columns")),
        BIAS_KIND=2 if bias is None else KINDS[bias.dtype], ADD=accumulate,
        NATIVE=_target.native_level(total.device), num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def axis(value: Tensor | None, names: tuple[str, str, str]) -> str:
    """What `_along` is told of a scale or bias of no, one or two dimensions."""
    return "none" if value is None else names[value.dim()]


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    """As `halfbyte.ops.scaled_matmul`: cuBLAS, which sums in float32, then `epilogue`.

    The float32 sums are at most 1 GiB at a time: larger results are made of runs of rows.
    """
    rows, columns = a.shape[0], b.shape[0]
    if a_scale is None and b_scale is None and bias is None and accumulate_into is None and out_dtype == a.dtype:
        return torch.mm(a, b.mT)
    step = max(SUMS // max(columns, 1), 1)
    if rows <= step:
        total = _sums(a, b)
        out = accumulate_into
        if out is None:
            out = total if out_dtype == torch.float32 else torch.empty_like(total, dtype=out_dtype)
        return epilogue(total, a_scale, b_scale, bias, out, accumulate=accumulate_into is not None)
    out = accumulate_into
    if out is None:
        out = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scale = a_scale[part] if a_scale is not None and a_scale.dim() else a_scale
        epilogue(_sums(a[part], b), scale, b_scale, bias, out[part], accumulate=accumulate_into is not None)
    return out


def scaled_grouped_matmul(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    """As `halfbyte.ops.scaled_grouped_matmul`: torch's grouped matmul, which rounds its sums to bfloat16."""
    rows, columns = a.shape[0], b.shape[1]
    out = accumulate_into
    if out is None:
        out = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    total = a.new_zeros(out.shape) if a.shape[1] == 0 else torch._grouped_mm(a.contiguous(), b.mT, offs=offsets)
    return epilogue(total, a_scale, b_scale, bias, out, accumulate=accumulate_into is not None, offsets=offsets)


def scaled_grouped_wgrad(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    g_scale: Tensor | None,
    x_scale: Tensor | None,
    *,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    """As `halfbyte.ops.wgrad.scaled_grouped_wgrad`; the epilogue sees the matrices of all experts as one."""
    experts, n, k = offsets.shape[0], g.shape[0], x.shape[0]
    if accumulate_into is None:
        out = torch.empty((experts, n, k), dtype=out_dtype, device=g.device)
    elif accumulate_into.is_contiguous():
        out = accumulate_into
    else:
        result = scaled_grouped_wgrad(g, x, offsets, g_scale, x_scale, out_dtype=torch.float32, accumulate_into=None)
        return accumulate_into.add_(result)
    if out.numel() == 0:
        return out
    empty = g.shape[1] == 0  # torch's grouped matmul takes no matrix without columns
    total = g.new_zeros(out.shape) if empty else torch._grouped_mm(g, x.mT, offs=offsets)
    scales = [s for s in (g_scale, x_scale) if s is not None]
    alpha = None
    if scales:
        alpha = scales[0] if len(scales) == 1 else scales[0] * scales[1]
        alpha = alpha.expand(experts)[:, None].expand(experts, n).reshape(-1)
    accumulate = accumulate_into is not None
    epilogue(total.view(-1, k), alpha, None, None, out.view(-1, k), accumulate=accumulate)
    return out


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) · b (N, K)ᵀ, (M, N) float32."""
    if a.numel() == 0 or b.numel() == 0:
        return torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.device)
    if a.dtype == torch.float32 or _target.INTERPRETING:
        return torch.mm(a.float(), b.float().mT)
    return torch.mm(a, b.mT, out_dtype=torch.float32)
