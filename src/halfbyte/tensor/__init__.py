"""QuantizedTensor: what `halfbyte.functional` makes; table.py has the torch operators that it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import ops
from ..errors import FormatError, ShapeError, UnsupportedError
from ..formats import MXFP8, NVFP4, Format
from . import shapes  # noqa: F401  # fills the table
from .table import TABLE, lacks_rows, scale_kind

PARTS = ("packed", "block_scale", "tensor_scale", "amax")


class FormatFacts(NamedTuple):
    """What a matmul depends on of a format."""

    name: str
    block_columns: int
    scaling: str | None
    hadamard: bool


class QuantizedTensor(Tensor):
    """A tensor of shape (…, K) in NVFP4 or MXFP8.

    To torch it is a tensor of the high-precision dtype that it stands for. What it can do exactly it does, on the
    bytes (docs/tensor.md lists it); everything else raises UnsupportedError. Its attributes are for reading.

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
        transposed: the transpose (…, K, M) quantized by itself, which matmuls over the rows need ("columnwise"
            data), or None; see `with_transposed`. A tensor may have this alone, as `columns.mT` does: then packed,
            block_scale, tensor_scale and amax are None, and format is that of the transposed data.
        shares_scale: whether elements outside this tensor have its tensor scale too: it is a slice, not a copy.
        dtype: float32, bfloat16 or float16; a name only, no byte depends on it.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor | None
    amax: Tensor | None  # type: ignore[assignment]  # hides a method that has no meaning here
    format: Format
    swizzled: bool
    transposed: QuantizedTensor | None
    shares_scale: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[QuantizedTensor],
        packed: Tensor | None,
        block_scale: Tensor | None,
        tensor_scale: Tensor | None,
        amax: Tensor | None,
        format: Format,
        swizzled: bool = False,
        transposed: QuantizedTensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        shares_scale: bool = False,
    ) -> QuantizedTensor:
        """See the class."""
        strides = None
        if packed is None:
            if transposed is None:
                raise ShapeError("packed and transposed are both None; a QuantizedTensor needs one of them")
            shape, device = list(transposed.shape), transposed.device
            shape[-2:] = shape[:-3:-1]
        else:
            shape, device = list(packed.shape), packed.device
            per_byte = 2 if isinstance(format, NVFP4) else 1
            shape[-1] *= per_byte
            if not packed.is_contiguous():  # a slice of columns: contiguous() must copy it, view() must refuse it
                strides = (*(stride * per_byte for stride in packed.stride()[:-1]), packed.stride(-1))
        make: Any = Tensor._make_wrapper_subclass
        self: Any = make(cls, shape, strides=strides, dtype=dtype, device=device)
        self.packed, self.block_scale, self.tensor_scale, self.amax = packed, block_scale, tensor_scale, amax
        self.format, self.swizzled, self.transposed, self.shares_scale = format, swizzled, transposed, shares_scale
        return cast(QuantizedTensor, self)

    @property
    def format_facts(self) -> FormatFacts:
        """What of format a graph that torch.compile traces may read of a tensor that it made itself.

        There torch knows attributes that are tensors or built-in values, but no dataclass: reading format fails.
        """
        fmt = self.format
        scaling, hadamard = (fmt.scaling, fmt.hadamard) if isinstance(fmt, NVFP4) else (None, False)
        return FormatFacts(type(fmt).__name__, fmt.block_columns, scaling, hadamard)

    @property
    def data(self) -> QuantizedTensor:
        """The same bytes without autograd's history; torch's own setter would change the shape and no byte."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedError("q.data = … on a QuantizedTensor: it would leave the bytes; use q.copy_(…)")

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        """Refuse: there is no one block of memory to give away."""
        raise UnsupportedError(
            "__dlpack__ on a QuantizedTensor: its bytes are in parts; give q.packed, or q.dequantize()"
        )

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same with some attributes changed, like `dataclasses.replace`; nothing is copied."""
        fields: dict[str, Any] = {
            "packed": self.packed, "block_scale": self.block_scale, "tensor_scale": self.tensor_scale,
            "amax": self.amax, "format": self.format, "swizzled": self.swizzled, "transposed": self.transposed,
            "dtype": self.dtype, "shares_scale": self.shares_scale,
        }  # fmt: skip
        return QuantizedTensor(**{**fields, **changes})

    def with_transposed(self, transposed: QuantizedTensor | None) -> QuantizedTensor:
        """The same rows, with the transpose quantized by itself beside them; None leaves it out.

        `rows.with_transposed(columns)` joins what `halfbyte.quantize_transpose` returns.

        Raises:
            ShapeError: transposed is no QuantizedTensor of shape (…, K, M) on this device, or has transposed data
                itself; either lacks its own rows.
        """
        if transposed is not None:
            self._check_rows("with_transposed")
            if not isinstance(transposed, QuantizedTensor) or transposed.transposed is not None:
                raise ShapeError("transposed must be a QuantizedTensor without transposed data: give x.mT quantized")
            wanted = (*self.shape[:-2], *self.shape[-2:][::-1])
            if self.dim() < 2 or tuple(transposed.shape) != wanted:
                raise ShapeError(
                    f"transposed has shape {tuple(transposed.shape)}; a tensor of shape {tuple(self.shape)} needs its "
                    "transpose: use halfbyte.quantize(x.mT, fmt)"
                )
            if transposed.device != self.device:
                raise ShapeError(f"transposed is on {transposed.device}, the rows on {self.device}; move one with .to")
        return self.replace(transposed=transposed)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of elements and scales together, of transposed data too."""
        parts = [
            part for part in (self.packed, self.block_scale, self.tensor_scale, self.transposed) if part is not None
        ]
        return sum(part.nbytes for part in parts)

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
            ShapeError: dtype is another, or tensor_scale is missing, or there is transposed data only.
            FormatError: unscaled=True for MXFP8, which has no tensor scale; impl is unknown.
            UnsupportedError: impl cannot run here.
        """
        if dtype not in ops.FLOAT_DTYPES:
            raise ShapeError(f"dtype={dtype}: dequantize gives float32, bfloat16 or float16")
        self._check_rows("dequantize")
        block_scale = self._plain_block_scale(impl)
        if isinstance(self.format, MXFP8):
            if unscaled:
                raise FormatError("unscaled=True: MXFP8 has no tensor scale to leave out; leave unscaled out")
            return ops.dequantize_mxfp8(self.packed, block_scale, dtype, impl=impl)
        if self.tensor_scale is None and not unscaled:
            raise ShapeError("this NVFP4 tensor has tensor_scale=None; decoding needs S_dec")
        tensor_scale = None if unscaled else self.tensor_scale
        packed = self.packed
        if tensor_scale is not None and tensor_scale.dim() == packed.dim() == 1:  # flattened: scales of equal runs
            runs = tensor_scale.numel()
            packed, block_scale = (part.view(runs, part.numel() // max(runs, 1)) for part in (packed, block_scale))
        return ops.dequantize_nvfp4(packed, block_scale, tensor_scale, dtype, impl=impl).view(self.shape)

    def swizzle(self, per_matrix: bool = False, *, impl: ops.Impl = "auto") -> QuantizedTensor:
        """The same with block scales in the order that Blackwell's matmul reads; see `halfbyte.swizzle`.

        All rows are one matrix, whose block_scale becomes 1-D; with per_matrix each leading matrix is swizzled, and
        padded, by itself. A swizzled tensor comes back as it is. Transposed data is left alone.
        """
        self._check_rows("swizzle")
        if self.swizzled:
            return self
        scale = self.block_scale
        if per_matrix and scale.dim() < 2:
            raise ShapeError(f"per_matrix=True needs at least 2 dimensions; the tensor has shape {tuple(self.shape)}")
        if not per_matrix:
            scale = scale.reshape(math.prod(scale.shape[:-1]), scale.shape[-1])
        return self.replace(block_scale=ops.swizzle(scale, impl=impl), swizzled=True)

    def _plain_block_scale(self, impl: ops.Impl) -> Tensor:
        if not self.swizzled:
            return self.block_scale
        columns = self.shape[-1] // self.format.block_columns
        rows = math.prod(self.shape[:-1]) if self.block_scale.dim() == 1 else self.shape[-2]
        return ops.unswizzle(self.block_scale, rows, columns, impl=impl).reshape(*self.shape[:-1], columns)

    def _check_rows(self, what: str) -> None:
        if lacks_rows(self):
            raise ShapeError(
                f"{what}: this tensor has transposed data only. Use q.mT for the transpose, or join both by "
                "rows.with_transposed(columns), as halfbyte.quantize_transpose returns them"
            )

    def map_parts(self, function: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedTensor:
        """The same with function applied to each plain tensor in it, transposed data too."""
        parts = {name: None if (part := getattr(self, name)) is None else function(part) for name in PARTS}
        transposed = None if self.transposed is None else self.transposed.map_parts(function, **changes)
        return self.replace(**parts, transposed=transposed, **changes)

    def share_memory_(self) -> QuantizedTensor:
        """Move the bytes to shared memory, in place; no operator tells a subclass of this."""
        for name in (*PARTS, "transposed"):
            if getattr(self, name) is not None:
                getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the bytes lie in shared memory, as those on a GPU always do."""
        return all(
            getattr(self, name).is_shared() for name in (*PARTS, "transposed") if getattr(self, name) is not None
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one torch operator on the bytes, or raise UnsupportedError."""
        operator = TABLE.get(func)
        if operator is None:
            raise UnsupportedError(
                f"{func} has no exact meaning on a QuantizedTensor; use q.dequantize() for its values, "
                "or halfbyte.quantize for a new one"
            )
        return operator(func, *args, **(kwargs or {}))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """What torch.compile and others take the tensor apart with."""
        present = [name for name in (*PARTS, "transposed") if getattr(self, name) is not None]
        return present, (self.format, self.swizzled, self.dtype, self.shares_scale)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Any], context: tuple[Any, ...], *_: Any) -> QuantizedTensor:
        """The inverse of `__tensor_flatten__`."""
        fmt, swizzled, dtype, shares_scale = context
        return QuantizedTensor(
            inner.get("packed"), inner.get("block_scale"), inner.get("tensor_scale"), inner.get("amax"), fmt, swizzled,
            inner.get("transposed"), dtype=dtype, shares_scale=shares_scale,
        )  # fmt: skip

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for torch's cache on disk: everything but the bytes."""
        names, context = self.__tensor_flatten__()
        parts = [getattr(self, name) for name in names]
        known = [
            part._stable_hash_for_caching() if isinstance(part, QuantizedTensor)
            else (part.shape, part.stride(), part.storage_offset(), part.dtype, part.device, part.requires_grad)
            for part in parts
        ]  # fmt: skip
        return repr((type(self).__qualname__, self.shape, self.requires_grad, names, known, context))

    def __getstate__(self) -> dict[str, Any]:
        """Attributes for pickle, float8 as bytes: torch reads back no float8 storage that pickle itself wrote."""
        state = dict(self.__dict__)
        for name in ("packed", "block_scale"):
            if state[name] is not None:
                state[name] = state[name].view(torch.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of `__getstate__`."""
        self.__dict__.update(state)
        if not lacks_rows(self):
            name = "block_scale" if isinstance(self.format, NVFP4) else "packed"
            setattr(self, name, getattr(self, name).view(torch.float8_e4m3fn))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor(shape={tuple(self.shape)}, format={self.format}, device={self.device})"

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, Tensor | None] | None]:
        """FSDP2's hook: the bytes of this rank's rows travel, a tensor scale for all rows stays where it is.

        Raises:
            UnsupportedError: the rows do not divide by the ranks, are not sharded along dimension 0, are swizzled, or
                there is transposed data.
        """
        if outer_size[0] % mesh.size() or tuple(outer_size[1:]) != tuple(self.shape[1:]) or len(outer_size) < 2:
            raise UnsupportedError(
                f"FSDP2 of a QuantizedTensor of shape {tuple(outer_size)} over {mesh.size()} ranks: dimension 0 is "
                "sharded, and must be divisible by the ranks; leave this parameter out with ignored_params="
            )
        if self.swizzled or self.transposed is not None:
            raise UnsupportedError(
                "FSDP2 gathers rows in plain order: shard the tensor without swizzle=True and with_transposed(None)"
            )
        whole = scale_kind(self) in ("none", "tensor")
        travel = (self.packed, self.block_scale, *(() if whole else (self.tensor_scale, self.amax)))
        return tuple(part for part in travel if part is not None), (self.tensor_scale, self.amax) if whole else None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], scales: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[QuantizedTensor, tuple[Tensor, ...]] | None:
        """FSDP2's hook: the whole tensor around the gathered bytes; out, made by an earlier call, has them already."""
        if out is not None:
            local: Any = getattr(out, "_local_tensor", out)
            if scales is not None:  # offloaded to the CPU, they were copied anew
                local.tensor_scale, local.amax = scales
            return None
        packed, block_scale, *travelled = gathered
        tensor_scale, amax = scales if scales is not None else (*travelled, None)[:2]
        whole = QuantizedTensor(packed, block_scale, tensor_scale, amax, self.format, dtype=param_dtype)
        return whole, gathered


# What torch.load(weights_only=True) may build.
torch.serialization.add_safe_globals([QuantizedTensor, NVFP4, MXFP8])
