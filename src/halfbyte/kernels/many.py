"""Quantize a list of tensors, each with its own maximum or all with one: experts, or the partners of a fused layer.

Fewest bytes, for bf16: 2 read and 0.5625 written per element; the second read comes from the L2 cache where every
tensor has its own maximum, and from device memory where one is shared. The floor is those bytes over the copy
bandwidth.

Addresses travel as kernel arguments: a first, tiny launch writes them into a table in device memory, zeroes the state
and decides the order of the tiles; the second one works by the table. A table copied from pinned memory would have to
outlive every replay of a CUDA graph; arguments are part of the graph.

The order: the maximum's tiles of tensor i come before the quantization of tensor m if they begin less than `ahead`
tiles after the last tile of m's maximum (`stacked.py` says why). Where the maximum is shared, `ahead` is without end.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..errors import UnsupportedError
from ..formats import NVFP4
from . import _target, quantize
from ._launch import cdiv, launch
from ._primitives import jit, jit_varying
from ._tiles import KINDS
from ._waiting import publish, wait
from .stacked import AHEAD, AMAX_BLOCKS, AMAX_STEPS, amax_tile, tile_blocks

SIZES = (4, 16, 64, 128)  # tensors of a table: each size is compiled once
ALIGNED = tl.constexpr(16)  # blocks: each tensor's part of the outputs begins at a multiple
ENDLESS = 1 << 30
Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


@jit_varying("begins", "ends")
def _fill_table(
    table_ptr, state_ptr, amax_bb, bb, ahead, begins, ends,
    N: tl.constexpr, BYTES: tl.constexpr, MAXIMA: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Rows of the table, [N] each: address, blocks, first block of the output, first program of the maximum's tiles and
    of the quantization's, tiles of the maximum. BYTES: of a block. Unused places have no blocks."""
    i = tl.arange(0, N)
    address = tl.zeros((N,), tl.int64)
    end = tl.zeros((N,), tl.int64)
    for k in tl.static_range(N):
        address = tl.where(i == k, begins[k], address)
        end = tl.where(i == k, ends[k], end)
    blocks = (end - address) // BYTES
    place = (blocks + (ALIGNED - 1)) // ALIGNED * ALIGNED
    amax_tiles = ((blocks + amax_bb - 1) // amax_bb).to(tl.int32) if MAXIMA else tl.zeros((N,), tl.int32)
    tiles = ((blocks + bb - 1) // bb).to(tl.int32) if VALUES else tl.zeros((N,), tl.int32)
    amax_until, until = tl.cumsum(amax_tiles, 0), tl.cumsum(tiles, 0)
    tl.store(table_ptr + i, address)
    tl.store(table_ptr + N + i, blocks)
    tl.store(table_ptr + 2 * N + i, tl.cumsum(place, 0) - place)
    amax_first = (amax_until - amax_tiles)[:, None] < (amax_until + ahead)[None, :]  # [of a maximum, of a quantization]
    between = tl.sum(tl.where(amax_first, 0, tiles[None, :]), 1)
    tl.store(table_ptr + 3 * N + i, amax_until - amax_tiles + between)
    between = tl.sum(tl.where(amax_first, amax_tiles[:, None], 0), 0)
    tl.store(table_ptr + 4 * N + i, until - tiles + between)
    tl.store(table_ptr + 5 * N + i, amax_tiles)
    tl.store(state_ptr + i, tl.zeros((N,), tl.int32))
    tl.store(state_ptr + N + i, tl.zeros((N,), tl.int32))


@jit
def _find(table_ptr, row: tl.constexpr, N: tl.constexpr):
    """The tensor whose tiles this program would be among, by their first programs in a row of the table; the tile."""
    first = tl.load(table_ptr + row * N + tl.arange(0, N))
    i = tl.maximum(tl.sum((first <= tl.program_id(0)).to(tl.int32), 0) - 1, 0)
    return i, tl.program_id(0) - tl.load(table_ptr + row * N + i).to(tl.int32)


@jit
def _entry(table_ptr, i, N: tl.constexpr, DTYPE: tl.constexpr):
    """Address and blocks of a tensor."""
    x_ptr = tl.multiple_of(tl.load(table_ptr + i).to(tl.pointer_type(DTYPE)), 16)
    return x_ptr, tl.load(table_ptr + N + i).to(tl.int32)


@jit
def _quantize(
    table_ptr, state_ptr, amax_ptr, out_ptr, scale_ptr, tensor_scale_ptr, amax_out_ptr, amax_stride,
    N: tl.constexpr, SHARED: tl.constexpr, MAXIMA: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr,
    AMAX_BB: tl.constexpr, AMAX_STEPS: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    # state: maxima as bit patterns [N], finished tiles of each maximum [N]; where the maximum is shared, the first only
    i, tile = _find(table_ptr, 4, N)
    x_ptr, blocks = _entry(table_ptr, i, N, DTYPE)
    first = tl.multiple_of(tl.load(table_ptr + 2 * N + i), ALIGNED)
    out_ptr += first * 8
    scale_ptr += first
    tensor_scale_ptr += i
    amax_out_ptr += i
    zero = tl.zeros((), tl.int64)
    if MAXIMA:  # what either branch needs is loaded before: one wait for memory instead of two
        amax_i, amax_tile_number = _find(table_ptr, 3, N)
        amax_x_ptr, amax_blocks = _entry(table_ptr, amax_i, N, DTYPE)
        amax_tiles = tl.load(table_ptr + 5 * N + amax_i)
        if SHARED:
            wanted = tl.sum(tl.load(table_ptr + 5 * N + tl.arange(0, N)), 0)
            slot_ptr, amax_slot_ptr = state_ptr, state_ptr
        else:
            wanted = tl.load(table_ptr + 5 * N + i)
            slot_ptr, amax_slot_ptr = state_ptr + i, state_ptr + amax_i
        if amax_tile_number < amax_tiles:
            bits = amax_tile(
                amax_x_ptr, zero, amax_tile_number, amax_blocks, 1, AMAX_BB, AMAX_STEPS, KIND, F.hadamard, NATIVE
            )
            tl.atomic_max(amax_slot_ptr, bits, sem="relaxed")
            publish(amax_slot_ptr + N)
        else:
            wait(slot_ptr + N, wanted, NATIVE)
            quantize.quantize_tile(
                x_ptr, out_ptr, scale_ptr, slot_ptr.to(tl.pointer_type(tl.float32)), tensor_scale_ptr, amax_out_ptr,
                None, None, None, zero, tile * BB, blocks, 1, 0, 0, 0, 0, 1, zero, zero, zero,
                BB, EVEN, True, KIND, "packed", F, NATIVE, not SHARED,
            )  # fmt: skip
    else:
        quantize.quantize_tile(
            x_ptr, out_ptr, scale_ptr, amax_ptr + i * amax_stride, tensor_scale_ptr, amax_out_ptr,
            None, None, None, zero, tile * BB, blocks, 1, 0, 0, 0, 0, 1, zero, zero, zero,
            BB, EVEN, True, KIND, "packed", F, NATIVE, False,
        )  # fmt: skip


def supports(xs: Sequence[Tensor], fmt: NVFP4) -> bool:
    """Whether `quantize_many` takes these: of one dtype on one device, contiguous, aligned to 16 bytes, none empty;
    1×16 blocks, tensor scaling, rounding to nearest."""
    if fmt.block != (1, 16) or fmt.scaling != "tensor" or fmt.rounding != "nearest":
        return False
    if len(xs) == 0 or xs[0].dtype not in KINDS:
        return False
    shapes = {(x.shape, x.dtype, x.device) for x in xs}
    if any(shape[1:] != (xs[0].dtype, xs[0].device) for shape in shapes):
        return False
    if any(len(shape) == 0 or 0 in shape or shape[-1] % 16 for shape, _, _ in shapes):
        return False
    return not any(x.data_ptr() % 16 or not x.is_contiguous() for x in xs)


def quantize_many(
    xs: Sequence[Tensor], fmt: NVFP4, *, amax: Tensor | None = None, shared_amax: bool = False
) -> list[Quantized]:
    """(packed, block_scale, tensor_scale, amax) of each x, as `numerics.nvfp4.quantize(x, fmt, amax=…)` gives them.

    amax: float32, one for each x, or one for all; None computes it, of each x, or of all together where shared_amax.
    The results are parts of one allocation for each kind. Two launches for each 128 tensors; nothing synchronises.

    Raises:
        UnsupportedError: `supports(xs, fmt)` is False.
    """
    if not supports(xs, fmt):
        raise UnsupportedError(f"{len(xs)} tensors, {fmt}: quantize them one by one instead")
    blocks = [x.numel() // 16 for x in xs]
    places = [cdiv(b, ALIGNED.value) * ALIGNED.value for b in blocks]
    device = xs[0].device
    packed = torch.empty(sum(places) * 8, dtype=torch.uint8, device=device)
    scale = torch.empty(sum(places), dtype=torch.float8_e4m3fn, device=device)
    tensor_scale = torch.empty(len(xs), dtype=torch.float32, device=device)
    amax_out = torch.empty(len(xs), dtype=torch.float32, device=device)
    chunks = [slice(at, at + SIZES[-1]) for at in range(0, len(xs), SIZES[-1])]
    if amax is None and shared_amax and len(chunks) > 1:
        amax = torch.stack([_launch(xs[c], blocks[c], fmt, None, True, None)[0] for c in chunks]).amax()
    first = 0
    for c in chunks:
        given = amax if amax is None or amax.numel() == 1 else amax.contiguous()[c]
        out = packed[first * 8 :], scale[first:], tensor_scale[c], amax_out[c]
        _launch(xs[c], blocks[c], fmt, given, shared_amax, out)
        first += sum(places[c])
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby([x.shape for x in xs])]
    parts = _views(packed, runs, 2), _views(scale, runs, 16), tensor_scale.unbind(), amax_out.unbind()
    return list(zip(*parts, strict=True))


def _launch(
    xs: Sequence[Tensor], blocks: list[int], fmt: NVFP4, amax: Tensor | None, shared: bool, out: Quantized | None
) -> Tensor:
    """Quantize at most 128 tensors into out; without out, only their maximum. Returns the maxima."""
    x = xs[0]
    n = next(size for size in SIZES if size >= len(xs))
    itemsize = x.element_size()
    begins = [x.data_ptr() for x in xs]
    ends = [begin + 16 * itemsize * b for begin, b in zip(begins, blocks, strict=True)]
    unused = [ends[-1]] * (n - len(xs))
    table = torch.empty(6 * n, dtype=torch.int64, device=x.device)
    state = torch.empty(2 * n, dtype=torch.int32, device=x.device)
    maxima = state[:n].view(torch.float32)
    bb, amax_bb = tile_blocks(fmt), AMAX_BLOCKS * AMAX_STEPS
    ahead = ENDLESS if shared else cdiv(AHEAD, amax_bb * 16 * itemsize)
    launch(
        _fill_table, 1, (table, state), (amax_bb, bb, ahead), (tuple(begins + unused), tuple(ends + unused)),
        N=n, BYTES=16 * itemsize, MAXIMA=amax is None, VALUES=out is not None,
    )  # fmt: skip
    counts = Counter(blocks)
    programs = sum(times * cdiv(b, amax_bb) for b, times in counts.items()) if amax is None else 0
    programs += sum(times * cdiv(b, bb) for b, times in counts.items()) if out is not None else 0
    packed, scale, tensor_scale, amax_out = out if out is not None else (state, table, maxima, maxima)
    launch(
        _quantize, programs,
        (table, state, maxima if amax is None else amax, packed, scale, tensor_scale, amax_out),
        (int(amax is not None and amax.numel() > 1),),
        N=n, SHARED=shared, MAXIMA=amax is None, BB=bb, EVEN=all(b % bb == 0 for b in counts),
        AMAX_BB=AMAX_BLOCKS, AMAX_STEPS=AMAX_STEPS, DTYPE=_DTYPES[x.dtype], KIND=KINDS[x.dtype], F=fmt,
        NATIVE=_target.native_level(x.device),
    )  # fmt: skip
    return maxima


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _views(flat: Tensor, runs: list[tuple[torch.Size, int]], columns: int) -> list[Tensor]:
    """Each x's part of an output with a value for each `columns` elements; one operation for each run of equals."""
    views: list[Tensor] = []
    at = 0
    for shape, count in runs:
        place = cdiv(shape.numel() // 16, ALIGNED.value) * ALIGNED.value * (16 // columns)
        size = (*shape[:-1], shape[-1] // columns)
        strides = [math.prod(size[d + 1 :]) for d in range(len(size))]
        views += flat.as_strided((count, *size), (place, *strides), at).unbind()
        at += count * place
    return views
