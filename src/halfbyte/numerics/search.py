"""Scale rule `search`: of all E4M3 scales, the one with the smallest error of the block. `docs/search.md` is the proof.

Every candidate is tried, one after the other; fast paths leave out those that cannot win.
"""

import torch
from torch import Tensor

from ..formats import E2M1_MAX, FLT_MAX, NVFP4
from . import e2m1, e4m3, tiles

LAST_CODE = 126  # 448, the largest E4M3 value
ALWAYS = 15  # candidates whatever the maximum: below code 16, half of a value may not be a value
ABOVE = 7  # candidates beyond the smallest scale that clips nothing


def best_scales(
    blocks: Tensor,
    block_amax: Tensor,
    encode_scale: Tensor,
    decode_scale: Tensor,
    fmt: NVFP4,
    importance: Tensor | None,
    hessian: Tensor | None,
) -> Tensor:
    """float8 scales [P, M, B, 1] of blocks [P, M, B, 16].

    Args:
        block_amax: [P, M, B, 1]; of 16×16 blocks, the same on all their rows.
        encode_scale, decode_scale: [P, 1 or M, 1, 1].
        importance: (K,) weights of the columns' errors, or None for ones. hessian: (B, 16, 16), for error="hessian".
    """
    target = blocks * encode_scale  # x in units of the scaled domain
    largest = block_amax * encode_scale  # [P, M, B, 1]
    values = torch.arange(LAST_CODE + 1, dtype=torch.uint8, device=blocks.device).view(torch.float8_e4m3fn).float()
    last = _last_candidate(largest, values) if fmt.error != "hessian" else torch.full_like(largest, LAST_CODE)
    best = torch.full_like(largest, torch.inf)
    code = torch.ones_like(largest)
    for candidate in range(1, LAST_CODE + 1):
        value = values[candidate]
        element_scale = (1.0 / (value * decode_scale)).clamp(max=FLT_MAX)
        q = e2m1.decode(e2m1.encode((blocks * element_scale).clamp(-E2M1_MAX, E2M1_MAX)))
        d = q * value - target
        total = _hessian_error(d, hessian) if hessian is not None else _error(d, fmt, importance)
        if fmt.block == (16, 16):
            total = tiles.sum_tile_rows(total)
        # A tie keeps the smaller code; NaN is never better, nor is an overflow of either sign.
        better = (total < best) & (total > -torch.inf) & (candidate <= last)
        best = torch.where(better, total, best)
        code = torch.where(better, float(candidate), code)
    code = torch.where(block_amax == 0, 0.0, code)
    code = torch.where(largest.isnan(), float(e4m3.NAN_BYTE), code)
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def _last_candidate(largest: Tensor, values: Tensor) -> Tensor:
    """max(15, c0 + 7), where c0 is the smallest code whose grid reaches the block's maximum (126 if none does)."""
    clips_nothing = E2M1_MAX * values[1:] >= largest  # [P, M, B, 126], once true true for the rest
    first = LAST_CODE + 1 - clips_nothing.sum(-1, keepdim=True)
    return (first.clamp(max=LAST_CODE) + ABOVE).clamp(min=ALWAYS)


def _error(d: Tensor, fmt: NVFP4, importance: Tensor | None) -> Tensor:
    """[P, M, B, 16] → [P, M, B, 1]: weighted |d| or d², elements in order."""
    terms = d * d if fmt.error == "mse" else d.abs()
    if importance is not None:
        terms = importance.view(-1, d.shape[-1]) * terms
    return _in_order(terms)


def _hessian_error(d: Tensor, hessian: Tensor) -> Tensor:
    """[P, M, B, 16] → dᵀ·H·d, [P, M, B, 1], from H's upper triangle: each row in order, then the rows in order."""
    terms = []
    for i in range(d.shape[-1]):
        row = torch.cat((hessian[:, i, i : i + 1], 2 * hessian[:, i, i + 1 :]), -1)
        terms.append(d[..., i : i + 1] * _in_order(row * d[..., i:]))
    return _in_order(torch.cat(terms, -1))


def _in_order(terms: Tensor) -> Tensor:
    """Sum over the last axis from element 0 on, starting from 0."""
    total = torch.zeros_like(terms[..., :1])
    for i in range(terms.shape[-1]):
        total = total + terms[..., i : i + 1]
    return total
