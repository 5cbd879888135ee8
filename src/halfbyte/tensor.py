"""QuantizedTensor, and `quantize` which makes one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .errors import FormatError, ShapeError
from .formats import MXFP8, NVFP4, Format


@dataclass(frozen=True, eq=False)
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
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor | None
    amax: Tensor | None
    format: Format

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

    def dequantize(self, dtype: torch.dtype = torch.float32, *, impl: ops.Impl = "auto") -> Tensor:
        """The decoded values, (…, K), computed in float32 and rounded once to dtype.

        A Hadamard transform is not undone: the values are those that a matmul would see.
        """
        if dtype not in ops.FLOAT_DTYPES:
            raise ShapeError(f"dtype={dtype}: dequantize gives float32, bfloat16 or float16")
        if isinstance(self.format, MXFP8):
            return ops.dequantize_mxfp8(self.packed, self.block_scale, dtype, impl=impl)
        if self.tensor_scale is None:
            raise ShapeError("this NVFP4 tensor has tensor_scale=None; decoding needs S_dec")
        return ops.dequantize_nvfp4(self.packed, self.block_scale, self.tensor_scale, dtype, impl=impl)

    def __repr__(self) -> str:
        return f"QuantizedTensor(shape={tuple(self.shape)}, format={self.format}, device={self.device})"


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    impl: ops.Impl = "auto",
    amax: Tensor | None = None,
    per_matrix: bool = False,
    rng: tuple[int, int] | None = None,
    first_block: int = 0,
) -> QuantizedTensor:
    """Quantize x to fmt along its last dimension; `quantize(x.mT, fmt)` is what others call column-wise.

    The result carries no gradient.

    Args:
        x: (…, K) float32, bfloat16 or float16, any strides, K divisible by 16 (NVFP4) or 32 (MXFP8). It is the
            matrix (-1, K): one tensor scale, or one per row.
        fmt: an `NVFP4` or `MXFP8`.
        impl: "reference" is the specification; "auto" picks the fastest that runs here. All give the same bytes.
        amax: float32 maximum, not negative, to use instead of x's own, shared across tensors or ranks; values beyond
            it saturate.
            With hadamard=True it is the maximum after the transform.
        per_matrix: each leading matrix of x (E, M, K) has its own tensor scale, and no 16×16 block crosses matrices.
        rng: (seed, offset) for stochastic rounding, 64 bits each; required for it and refused otherwise.
        first_block: for stochastic rounding, the row-major index of x's first 1×16 block in the tensor that it is a
            part of, so that parts round like the whole.

    Raises:
        ShapeError: dtype, shape or amax does not fit.
        FormatError: rng is missing or has no use; impl or an MXFP8 argument is unknown.
        UnsupportedError: impl cannot run here.

    Numerics: bitwise as `docs/numerics.md`; NaN gives NaN block scales, never an exception.
    Source: NVFP4 rules of TransformerEngine 2.20's reference quantizer; MXFP8 of the OCP MX specification with
    TransformerEngine's scale rounding.
    """
    if not isinstance(fmt, NVFP4 | MXFP8):
        raise FormatError(f"fmt={fmt!r}: needs an NVFP4(...) or MXFP8() value")
    if isinstance(fmt, MXFP8):
        if amax is not None or per_matrix or rng is not None or first_block:
            raise FormatError("MXFP8 has no tensor scale and rounds to nearest: leave amax, per_matrix and rng out")
        elements, scale = ops.quantize_mxfp8(x, fmt, impl=impl)
        return QuantizedTensor(elements, scale, None, None, fmt)
    encoded = ops.quantize_nvfp4(x, fmt, impl=impl, amax=amax, per_matrix=per_matrix, rng=rng, first_block=first_block)
    return QuantizedTensor(encoded.packed, encoded.block_scale, encoded.tensor_scale, encoded.amax, fmt)
