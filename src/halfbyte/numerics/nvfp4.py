"""NVFP4: scales and codes by every rule, and back.

Every line with arithmetic is one float32 rounding of `docs/numerics.md`, in its order; scalars are float32 tensors
so that no double creeps in.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import E2M1_MAX, E4M3_MAX, FLT_MAX, NVFP4
from . import e2m1, e4m3, hadamard, philox, search, tiles

COLUMNS = 16


class Encoded(NamedTuple):
    """What a quantized tensor is made of; shapes for an input (…, K)."""

    packed: Tensor  # (…, K/2) uint8
    block_scale: Tensor  # (…, K/16) float8_e4m3fn
    tensor_scale: Tensor  # S_dec, float32: (), leading dims (per matrix) or (…,) (per row)
    amax: Tensor  # A, float32, of tensor_scale's shape


def quantize(
    x: Tensor,
    fmt: NVFP4,
    *,
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | Tensor | None = None,
    first_block: int = 0,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Encoded:
    """Quantize x (…, K), K % 16 == 0, float32/bfloat16/float16. Arguments as in `halfbyte.quantize`."""
    shape = x.shape
    if fmt.hadamard:
        x = hadamard.transform(x)
    matrix = _as_matrices(x.float(), per_matrix)  # [P, M, K]
    computed = _amax(matrix, fmt) if amax is None else amax.expand(amax_shape(shape, fmt, per_matrix)).clone()
    rows_per_scale = matrix.shape[1] if fmt.scaling == "row" else 1
    a = computed.reshape(matrix.shape[0], rows_per_scale, 1, 1)  # [P, 1 or M, 1, 1]
    encode_scale, decode_scale = tensor_scales(a, fmt)

    blocks = matrix.unflatten(-1, (-1, COLUMNS))  # [P, M, B, 16]
    block_amax = _block_amax(blocks, fmt)  # [P, M, B, 1]
    if fmt.scale_rule == "amax":
        scale = e4m3.encode(_minimum(block_amax * (encode_scale * _f32(1 / 6, x)), FLT_MAX))
        codes = _codes(blocks, scale, decode_scale, _uniform(blocks, fmt, rng, first_block))
    elif fmt.scale_rule == "search":
        scale = search.best_scales(blocks, block_amax, encode_scale, decode_scale, fmt, importance, hessian)
        codes = _codes(blocks, scale, decode_scale)
    else:
        scale, codes = _four_over_six(blocks, block_amax, a, encode_scale, decode_scale, fmt)

    out_amax = computed.reshape(amax_shape(shape, fmt, per_matrix))
    return Encoded(
        packed=e2m1.pack(codes.flatten(-2)).reshape(*shape[:-1], shape[-1] // 2).contiguous(),
        block_scale=scale.reshape(*shape[:-1], shape[-1] // COLUMNS).contiguous(),
        tensor_scale=tensor_scales(out_amax, fmt)[1],
        amax=out_amax,
    )


def amax_shape(shape: torch.Size, fmt: NVFP4, per_matrix: bool) -> torch.Size:
    """Shape of A and S_dec for an input of the given shape."""
    if fmt.scaling == "row":
        return shape[:-1]
    return shape[:-2] if per_matrix else torch.Size(())


def tensor_scales(amax: Tensor, fmt: NVFP4) -> tuple[Tensor, Tensor]:
    """(S_enc, S_dec) of float32 amax, elementwise."""
    assert fmt.e4m3_max is not None  # resolved when the format was built
    encode_scale = _minimum(_f32(E2M1_MAX * fmt.e4m3_max, amax) / amax, FLT_MAX)
    encode_scale = torch.where((amax == 0) | (encode_scale == 0), 1.0, encode_scale)
    return encode_scale, 1.0 / encode_scale


def dequantize(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q · (f32(s) · S_dec) in float32, rounded once to dtype, (…, K); tensor_scale of `amax_shape`."""
    scale = block_scale.float() * _align(tensor_scale, packed.dim())
    return (e2m1.decode(e2m1.unpack(packed)) * scale.repeat_interleave(COLUMNS, -1)).to(dtype).contiguous()


def decode_without_tensor_scale(packed: Tensor, block_scale: Tensor) -> Tensor:
    """q · s as float32 (…, K): at most 6 significant bits, so exact in bfloat16 and float16 too."""
    return e2m1.decode(e2m1.unpack(packed)) * block_scale.float().repeat_interleave(COLUMNS, -1)


def _align(tensor_scale: Tensor, ndim: int) -> Tensor:
    """Append dimensions so that a per-matrix or per-row scale broadcasts against (…, K/16)."""
    return tensor_scale.reshape(*tensor_scale.shape, *(1,) * (ndim - tensor_scale.dim()))


def _as_matrices(x: Tensor, per_matrix: bool) -> Tensor:
    """(…, K) → [P, M, K]: one matrix of all rows, or one per leading index."""
    matrices = math.prod(x.shape[:-2]) if per_matrix else 1
    rows = x.shape[-2] if per_matrix else math.prod(x.shape[:-1])
    return x.reshape(matrices, rows, x.shape[-1])


def _amax(matrix: Tensor, fmt: NVFP4) -> Tensor:
    """[P, M, K] → [P] or [P, M]; 0 where there is nothing. NaN wins."""
    dims = (2,) if fmt.scaling == "row" else (1, 2)
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-1] if fmt.scaling == "row" else matrix.shape[:1])
    return matrix.abs().amax(dims)


def _block_amax(blocks: Tensor, fmt: NVFP4) -> Tensor:
    """[P, M, B, 16] → [P, M, B, 1]; for 16×16 the same value on all rows of a block."""
    if blocks.numel() == 0:
        return blocks.new_zeros(*blocks.shape[:-1], 1)
    row_amax = blocks.abs().amax(-1, keepdim=True)
    if fmt.block == (1, 16):
        return row_amax
    tiled = tiles.tile_rows(row_amax)  # [P, T, 16, B, 1]
    return tiles.untile_rows(tiled.amax(2, keepdim=True).expand_as(tiled), blocks.shape[1])


def _codes(blocks: Tensor, scale: Tensor, decode_scale: Tensor, u: Tensor | None = None) -> Tensor:
    """E2M1 codes of [P, M, B, 16] for float8 scales [P, M, B, 1]."""
    element_scale = _minimum(1.0 / (scale.float() * decode_scale), FLT_MAX)
    y = (blocks * element_scale).clamp(-E2M1_MAX, E2M1_MAX)
    # A zero block has s = 0 and e = FLT_MAX: its elements are zeros, so are its codes.
    return e2m1.encode(y) if u is None else e2m1.encode_stochastic(y, u)


def _four_over_six(
    blocks: Tensor, block_amax: Tensor, amax: Tensor, encode_scale: Tensor, decode_scale: Tensor, fmt: NVFP4
) -> tuple[Tensor, Tensor]:
    base = (block_amax / _f32(6.0, block_amax)) * encode_scale
    candidates = []
    for base_scale in (base, 1.5 * base):  # the block's maximum becomes 6, or 4
        scale = e4m3.encode(_minimum(base_scale, E4M3_MAX))
        codes = _codes(blocks, scale, decode_scale)
        candidates.append((scale, codes, _error(blocks, codes, scale, amax, encode_scale, fmt)))
    (scale6, codes6, error6), (scale4, codes4, error4) = candidates
    pick4 = error4 < error6  # ties and NaN keep 6
    scale = torch.where(pick4, scale4.view(torch.uint8), scale6.view(torch.uint8)).view(torch.float8_e4m3fn)
    return scale, torch.where(pick4, codes4, codes6)


def _error(blocks: Tensor, codes: Tensor, scale: Tensor, amax: Tensor, encode_scale: Tensor, fmt: NVFP4) -> Tensor:
    """Error of each block, [P, M, B, 1]; for 16×16 summed over its rows and repeated on them."""
    assert fmt.e4m3_max is not None
    product = e2m1.decode(codes) * scale.float()
    if fmt.error_arithmetic == "exact":
        d = (product * amax) / _f32(E2M1_MAX * fmt.e4m3_max, blocks) - blocks
    else:
        d = product.half().float() - blocks * encode_scale  # the product is exact in fp16
    terms = d.abs() if fmt.error == "mae" else d * d
    total = torch.zeros_like(terms[..., :1])
    for i in range(COLUMNS):  # the order of the sum is part of the contract
        total = total + terms[..., i : i + 1]
    return total if fmt.block == (1, 16) else tiles.sum_tile_rows(total)


def _uniform(blocks: Tensor, fmt: NVFP4, rng: tuple[int, int] | Tensor | None, first_block: int) -> Tensor | None:
    if fmt.rounding == "nearest":
        return None
    assert rng is not None  # ops checks it
    seed, offset = rng  # unpacks a tensor (2,) too
    count = blocks.numel() // COLUMNS
    u = philox.uniform_blocks(count, seed=seed, offset=offset, first_block=first_block, device=blocks.device)
    return u.view_as(blocks)


def _f32(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)  # filled there: nothing is copied to a GPU


def _minimum(x: Tensor, bound: float) -> Tensor:
    """min that propagates NaN."""
    return torch.minimum(x, _f32(bound, x))
