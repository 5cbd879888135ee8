"""Operands of a matmul: encoded to be kept, decoded to q·s to be multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from .. import ops
from ..errors import FormatError
from ..formats import MXFP8, NVFP4, Format
from ..ops.gradient import quantize_gradient

Sharded = Literal["activations", "weights", "gradients"]
MATMUL_DTYPE = torch.bfloat16  # holds every q·s exactly


class Encoded(NamedTuple):
    """Elements and block scales, and NVFP4's tensor scale."""

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor | None


class Operand(NamedTuple):
    """q·s, or the values themselves where nothing is quantized, and what multiplies them after the matmul."""

    values: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class AmaxGroups:
    """Process groups over which maxima are reduced, so that shards are quantized as the whole tensor would be.

    Attributes:
        activations: for x, sharded over tokens (data or sequence parallel) or over columns (row-parallel layers).
        weights: for w, sharded either way.
        gradients: for dy, sharded over tokens, or over columns (column-parallel layers).
        along_columns: which of the three are sharded over columns. With scaling="row" only a row of those is in many
            shards, and its maximum reduced; of the others each row is whole. With one scale it makes no difference.

    Raises:
        FormatError: along_columns has something else.
    """

    activations: dist.ProcessGroup | None = None
    weights: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup | None = None
    along_columns: tuple[Sharded, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.along_columns, tuple) or set(self.along_columns) - set(get_args(Sharded)):
            raise FormatError(
                f"along_columns={self.along_columns!r}: needs a tuple of {', '.join(map(repr, get_args(Sharded)))}"
            )

    def of(self, operand: Sharded, fmt: Format | None, *, transposed: bool = False) -> dist.ProcessGroup | None:
        """The group that maxima of an operand in fmt, or of its transpose, are reduced over."""
        by_rows = isinstance(fmt, NVFP4) and fmt.scaling == "row"
        return None if by_rows and (operand in self.along_columns) == transposed else getattr(self, operand)

    def __deepcopy__(self, _: object) -> AmaxGroups:
        """Itself: a copied model belongs to the same ranks, and torch copies no process group."""
        return self


def autocasted(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes in, where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def encode(x: Tensor, fmt: Format, amax: Tensor | None = None, *, per_matrix: bool = False) -> Encoded:
    """x (…, K) encoded."""
    if isinstance(fmt, MXFP8):
        return Encoded(*ops.quantize_mxfp8(x, fmt), None)
    return Encoded(*ops.quantize_nvfp4(x, fmt, amax=amax, per_matrix=per_matrix)[:3])


def decode(encoded: Encoded, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Values, scaled, rounded once to dtype."""
    if isinstance(fmt, MXFP8):
        return ops.dequantize_mxfp8(encoded.packed, encoded.block_scale, dtype)
    return ops.dequantize_nvfp4(encoded.packed, encoded.block_scale, encoded.tensor_scale, dtype)


def unscaled(encoded: Encoded, fmt: Format) -> Operand:
    """What goes into the matmul."""
    if isinstance(fmt, MXFP8):
        return Operand(ops.dequantize_mxfp8(encoded.packed, encoded.block_scale, MATMUL_DTYPE), None)
    values = ops.dequantize_nvfp4(encoded.packed, encoded.block_scale, None, MATMUL_DTYPE)
    return Operand(values, encoded.tensor_scale)


def fake(x: Tensor, fmt: Format, amax: Tensor | None = None, *, per_matrix: bool = False) -> Operand:
    """The same of x at once, where nothing is to be kept."""
    if isinstance(fmt, NVFP4) and x.dtype == MATMUL_DTYPE:
        return Operand(*ops.fake_quantize(x, fmt, unscaled=True, amax=amax, per_matrix=per_matrix))
    return unscaled(encode(x, fmt, amax, per_matrix=per_matrix), fmt)


def encode_and_decode(
    x: Tensor, fmt: Format, amax: Tensor | None = None, *, per_matrix: bool = False
) -> tuple[Encoded, Operand]:
    """x encoded, to be saved, and what goes into the matmul; from one read of x on a GPU."""
    if isinstance(fmt, NVFP4) and x.dtype == MATMUL_DTYPE:
        q, values = ops.quantize_with_values(x, fmt, amax=amax, per_matrix=per_matrix)
        return Encoded(*q[:3]), Operand(values, q.tensor_scale)
    encoded = encode(x, fmt, amax, per_matrix=per_matrix)
    return encoded, unscaled(encoded, fmt)


def shared_amax(x: Tensor, fmt: Format | None, group: dist.ProcessGroup | None) -> Tensor | None:
    """The maximum over all of a group's shards, that x is to be quantized with; None where x's own will do."""
    return None if group is None or not isinstance(fmt, NVFP4) else reduce_amax(local_amax(x, fmt), group)


def local_amax(x: Tensor, fmt: NVFP4) -> Tensor:
    """x's own: (), or one per row; after the transform if fmt has one."""
    if fmt.hadamard:
        return ops.quantize_nvfp4(x, NVFP4(scaling=fmt.scaling, hadamard=True)).amax
    if x.numel() == 0:
        return x.new_zeros(x.shape[:-1] if fmt.scaling == "row" else (), dtype=torch.float32)
    return (x.abs().amax(-1) if fmt.scaling == "row" else x.abs().amax()).float()


def reduce_amax(amax: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest over the group; NaN wins, since bits of floats that are not negative are in the floats' order."""
    bits = amax.clone().view(torch.int32)
    dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
    return bits.view(torch.float32)


def encode_transposed(
    x: Tensor, fmt: Format, transposed_fmt: Format, block: int, groups: AmaxGroups, operand: Sharded
) -> tuple[Encoded, Encoded]:
    """x (M, K) and x.mT with M, a count of tokens, filled up with zeros to whole blocks, which changes no scale."""
    x = whole_blocks(x, block)
    amax, transposed_amax = _both_amaxes(x, fmt, transposed_fmt, groups, operand)
    if isinstance(fmt, NVFP4) and isinstance(transposed_fmt, NVFP4):
        rows, columns = ops.quantize_transpose(x, fmt, transposed_fmt, amax=amax, transposed_amax=transposed_amax)
        return Encoded(*rows[:3]), Encoded(*columns[:3])
    return encode(x, fmt, amax), encode(x.mT, transposed_fmt, transposed_amax)


def _both_amaxes(
    x: Tensor, fmt: Format, transposed_fmt: Format, groups: AmaxGroups, operand: Sharded
) -> tuple[Tensor | None, Tensor | None]:
    transposed_group = groups.of(operand, transposed_fmt, transposed=True)
    return shared_amax(x, fmt, groups.of(operand, fmt)), shared_amax(x.mT, transposed_fmt, transposed_group)


def encode_columns(x: Tensor, transposed_fmt: Format, block: int, groups: AmaxGroups, operand: Sharded) -> Encoded:
    """The second of `encode_transposed` alone."""
    x = whole_blocks(x, block)
    group = groups.of(operand, transposed_fmt, transposed=True)
    return encode(x.mT, transposed_fmt, shared_amax(x.mT, transposed_fmt, group))


def encode_gradient(
    dy: Tensor, fmt: Format, transposed_fmt: Format, block: int, groups: AmaxGroups, state: Tensor
) -> tuple[Encoded, Encoded]:
    """As `encode_transposed`, with state's random words where fmt rounds stochastically."""
    if not (isinstance(fmt, NVFP4) and isinstance(transposed_fmt, NVFP4) and fmt.rounding == "stochastic"):
        return encode_transposed(dy, fmt, transposed_fmt, block, groups, "gradients")
    dy = whole_blocks(dy, block)
    amax, transposed_amax = _both_amaxes(dy, fmt, transposed_fmt, groups, "gradients")
    rows, columns = quantize_gradient(dy, fmt, transposed_fmt, state, amax=amax, transposed_amax=transposed_amax)
    return Encoded(*rows[:3]), Encoded(*columns[:3])


def whole_blocks(x: Tensor, block: int) -> Tensor:
    """x (M, K) with rows of zeros appended until M is a multiple of block."""
    missing = -x.shape[0] % block
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def first_rows(operand: Operand, rows: int) -> Operand:
    """Without the rows that `whole_blocks` appended."""
    scale = operand.scale
    return Operand(operand.values[:rows], scale[:rows] if scale is not None and scale.dim() else scale)
