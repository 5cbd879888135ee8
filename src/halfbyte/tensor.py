"""QuantizedTensor: what `halfbyte.functional` makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .errors import FormatError, ShapeError
from .formats import MXFP8, NVFP4, Format


@dataclass(frozen=True, eq=False, init=False)
class QuantizedTensor:
    """A tensor of shape (…, K) in NVFP4 or MXFP8.

    Attributes:
        packed: NVFP4: (…, K/2) uint8, two E2M1 codes a byte, the even column in the low nibble.
            MXFP8: (…, K) float8_e4m3fn, one element each.
        block_scale: NVFP4: (…, K/16) float8_e4m3fn. MXFP8: (…, K/32) uint8, E8M0.
        tensor_scale: S_dec, the float32 that multiplies on decode: (), or one per matrix, or one per row.
            None for MXFP8.
        amax: the maximum that the scale was derived from, of tensor_scale's shape; None for MXFP8, and None for a
            tensor loaded from a checkpoint, where it is not recorded.
        format: how it was made.
        swizzled: whether block_scale has the order that Blackwell's matmul reads, as `swizzle` returns it: of all
            rows as one matrix, 1-D; or (…, bytes), each matrix by itself.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor | None
    amax: Tensor | None
    format: Format
    swizzled: bool = False

    def __init__(  # what dataclass writes for a frozen class takes twice the time, and lists make hundreds
        self,
        packed: Tensor,
        block_scale: Tensor,
        tensor_scale: Tensor | None,
        amax: Tensor | None,
        format: Format,
        swizzled: bool = False,
    ) -> None:
        self.__dict__.update(
            packed=packed, block_scale=block_scale, tensor_scale=tensor_scale, amax=amax, format=format,
            swizzled=swizzled,
        )  # fmt: skip

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that this stands for."""
        columns = self.packed.shape[-1] * (2 if isinstance(self.format, NVFP4) else 1)
        return torch.Size((*self.packed.shape[:-1], columns))

    @property
    def device(self) -> torch.device:
        """Where the data lies."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of elements and scales together."""
        scale_bytes = 0 if self.tensor_scale is None else self.tensor_scale.nbytes
        return self.packed.nbytes + self.block_scale.nbytes + scale_bytes

    def dequantize(
        self, dtype: torch.dtype = torch.float32, *, unscaled: bool = False, impl: ops.Impl = "auto"
    ) -> Tensor:
        """The decoded values, (…, K), computed in float32 and rounded once to dtype.

        A Hadamard transform is not undone: the values are those that a matmul would see.

        Args:
            dtype: float32, bfloat16 or float16.
            unscaled: leave NVFP4's tensor scale out: q·s, exact in each of the three dtypes.
            impl: as in `halfbyte.quantize`.

        Raises:
            ShapeError: dtype is another, or tensor_scale is missing.
            FormatError: unscaled=True for MXFP8, which has no tensor scale; impl is unknown.
            UnsupportedError: impl cannot run here.
        """
        if dtype not in ops.FLOAT_DTYPES:
            raise ShapeError(f"dtype={dtype}: dequantize gives float32, bfloat16 or float16")
        block_scale = self._plain_block_scale(impl)
        if isinstance(self.format, MXFP8):
            if unscaled:
                raise FormatError("unscaled=True: MXFP8 has no tensor scale to leave out; leave unscaled out")
            return ops.dequantize_mxfp8(self.packed, block_scale, dtype, impl=impl)
        if self.tensor_scale is None and not unscaled:
            raise ShapeError("this NVFP4 tensor has tensor_scale=None; decoding needs S_dec")
        tensor_scale = None if unscaled else self.tensor_scale
        return ops.dequantize_nvfp4(self.packed, block_scale, tensor_scale, dtype, impl=impl)

    def swizzle(self, per_matrix: bool = False, *, impl: ops.Impl = "auto") -> QuantizedTensor:
        """The same with block scales in the order that Blackwell's matmul reads; see `halfbyte.swizzle`.

        All rows are one matrix, whose block_scale becomes 1-D; with per_matrix each leading matrix is swizzled, and
        padded, by itself. A swizzled tensor comes back as it is.
        """
        if self.swizzled:
            return self
        scale = self.block_scale
        if per_matrix and scale.dim() < 2:
            raise ShapeError(f"per_matrix=True needs at least 2 dimensions; the tensor has shape {tuple(self.shape)}")
        if not per_matrix:
            scale = scale.reshape(math.prod(scale.shape[:-1]), scale.shape[-1])
        return replace(self, block_scale=ops.swizzle(scale, impl=impl), swizzled=True)

    def _plain_block_scale(self, impl: ops.Impl) -> Tensor:
        if not self.swizzled:
            return self.block_scale
        columns = self.shape[-1] // self.format.block_columns
        rows = math.prod(self.shape[:-1]) if self.block_scale.dim() == 1 else self.shape[-2]
        return ops.unswizzle(self.block_scale, rows, columns, impl=impl).reshape(*self.shape[:-1], columns)

    def __repr__(self) -> str:
        return f"QuantizedTensor(shape={tuple(self.shape)}, format={self.format}, device={self.device})"
