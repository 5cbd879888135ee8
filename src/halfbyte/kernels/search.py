"""Quantize by the scale rule `search` with importances or Hessians; without them it is `quantize`'s kernels that run.

Fewest bytes: those of `quantize`, and K weights or 16·K floats of Hessians, that every tile finds in the cache. That is
far below the arithmetic: with n candidates, about 14·n operations an element, and 17·n more for the products with a
Hessian's upper triangle; n is about 13, with a Hessian 30 to 60. The floor is those over the issue rate.

A program takes 16 rows of N blocks, or with a Hessian 16·T rows of one block: all its threads read the same numbers.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..formats import NVFP4
from . import _target
from ._curvature import curvature, doubled
from ._fp8 import e4m3_code
from ._launch import cdiv
from ._launch import launch as launch_kernel
from ._maxima import block_abs_max, reduce_max
from ._primitives import element_scale, jit_varying, tensor_scales
from ._rules import hadamard, store_elements
from ._search import code_value, codes
from ._tiles import Matrices, load_blocks


@jit_varying("rows", "blocks_per_row", "row_tiles", "column_tiles", "amax_stride_p", "amax_stride_m")
def _search(
    x_ptr, out_ptr, scale_ptr, amax_ptr, tensor_scale_ptr, amax_out_ptr, w_ptr, h_ptr, mu_ptr,
    rows, blocks_per_row, row_tiles, column_tiles, amax_stride_p, amax_stride_m, stride_p, stride_m, stride_k,
    NB: tl.constexpr, T: tl.constexpr, DENSE: tl.constexpr, WEIGHTED: tl.constexpr,
    KIND: tl.constexpr, OUT: tl.constexpr, F: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    p = (pid // (row_tiles * column_tiles)).to(tl.int64)
    row0 = pid // column_tiles % row_tiles * (16 * T)
    column0 = pid % column_tiles * NB
    local_row = tl.arange(0, T)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]  # [T, 16, 1]
    local_column = tl.arange(0, NB)[None, None, :]  # [1, 1, NB]
    mask = (row0 + local_row < rows) & (column0 + local_column < blocks_per_row)
    pairs = tl.arange(0, 8)[None, None, None, :]
    if DENSE:
        base = ((p * rows + row0) * blocks_per_row + column0) * 16
        offsets = (local_row * blocks_per_row + local_column)[:, :, :, None] * 8 + pairs  # [T, 16, NB, 8]
    else:
        base = p * stride_p + row0.to(tl.int64) * stride_m + column0.to(tl.int64) * 16 * stride_k
        offsets = local_row.to(tl.int64)[:, :, :, None] * stride_m
        offsets += (local_column[:, :, :, None] * 8 + pairs).to(tl.int64) * 2 * stride_k
    words, lo, hi = load_blocks(x_ptr, base, offsets, mask[:, :, :, None], stride_k, DENSE, KIND)
    if F.hadamard:
        lo, hi = hadamard(lo, hi, KIND)
    if F.scaling == "row":
        row = row0 + local_row
        amax = tl.load(amax_ptr + p * amax_stride_p + row * amax_stride_m, mask=row < rows, other=0.0)  # [T, 16, 1]
    else:
        amax = tl.load(amax_ptr + p * amax_stride_p)
    encode_scale, decode_scale = tensor_scales(amax, F.e4m3_max, NATIVE)
    block_amax = block_abs_max(words, lo, hi, KIND, DENSE and not F.hadamard, NATIVE)  # [T, 16, NB]
    if F.block[0] == 16:
        block_amax = reduce_max(block_amax, 1, NATIVE).expand_dims(1)  # [T, 1, NB]
    if WEIGHTED:
        column = (column0 + local_column)[:, :, :, None] * 16 + 2 * pairs
        inside = (column0 + local_column < blocks_per_row)[:, :, :, None]
        w_lo = tl.load(w_ptr + column, mask=inside, other=0.0)  # [1, 1, NB, 8]
        w_hi = tl.load(w_ptr + column + 1, mask=inside, other=0.0)
        w_lo, w_hi = tl.broadcast(w_lo, lo)[0], tl.broadcast(w_hi, hi)[0]
    else:
        w_lo, w_hi = lo, hi
    h_ptr += column0 * 256
    mu_ptr += column0 * 16
    code = codes(lo, hi, block_amax, encode_scale, decode_scale, w_lo, w_hi, h_ptr, mu_ptr, WEIGHTED, F, NATIVE)
    scale = tl.where(code == 0x7F, float("nan"), code_value(code))
    element = element_scale(scale, decode_scale, NATIVE)
    first = (p * rows + row0) * blocks_per_row + column0
    local = local_row * blocks_per_row + local_column  # [T, 16, NB]
    store_elements(
        out_ptr, first, local[:, :, :, None] * 8 + pairs, mask[:, :, :, None], lo, hi, scale, element, encode_scale,
        decode_scale, local, 0, 0, OUT, F, KIND, NATIVE,
    )  # fmt: skip
    if OUT == "packed":
        tl.store(scale_ptr + first + local, tl.broadcast_to(e4m3_code(scale), (T, 16, NB)), mask=mask)
        if F.scaling == "row":
            if column0 == 0:
                tl.store(tensor_scale_ptr + p * rows + row, decode_scale, mask=row < rows)
                tl.store(amax_out_ptr + p * rows + row, amax, mask=row < rows)
        elif (row0 == 0) & (column0 == 0):
            tl.store(tensor_scale_ptr + p, decode_scale)
            tl.store(amax_out_ptr + p, amax)


def launch(
    m: Matrices,
    fmt: NVFP4,
    amax: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    importance: Tensor | None,
    hessian: Tensor | None,
    mode: str = "packed",
) -> None:
    """Quantize with a known amax: one value, or one per matrix or row."""
    packed, scale, tensor_scale, amax_out = out
    shared = amax.dim() == 0 or amax.numel() == 1
    if not shared:
        amax = amax.contiguous()
    w = h = mu = amax  # what is not read
    if importance is not None:
        w = importance.float().contiguous()
    if hessian is not None:
        h = hessian.float()
        mu = curvature(h).contiguous()
        h = doubled(h)
    nb, t = (1, 4) if hessian is not None else (16, 1)
    blocks_per_row = m.columns // 16
    row_tiles, column_tiles = cdiv(m.rows, 16 * t), cdiv(blocks_per_row, nb)
    stride_p = 0 if shared else m.rows if fmt.scaling == "row" else 1
    launch_kernel(
        _search, row_tiles * column_tiles * m.matrices,
        (m.x, packed, scale, amax, tensor_scale, amax_out, w, h, mu),
        (m.rows, blocks_per_row, row_tiles, column_tiles, stride_p, 0 if shared else 1, m.stride_p, m.stride_m,
         m.stride_k),
        NB=nb, T=t, DENSE=m.dense, WEIGHTED=importance is not None, KIND=m.kind, OUT=mode, F=fmt,
        NATIVE=_target.native_level(m.x.device),
        num_warps=1 if hessian is not None else 4,
    )  # fmt: skip
