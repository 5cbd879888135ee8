"""Every operation as one opaque operator, for torch.compile: `torch.ops.halfbyte.*`, with fake implementations.

An operator takes plain values only: a format travels as text, random words as a tensor, and the name of the
implementation, already chosen, comes last.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import NVFP4
from ..numerics import nvfp4
from ..numerics.swizzle import swizzled_size
from .backends import backend

Words = tuple[int, int] | Tensor | None


def wanted() -> bool:
    """Whether operators are recorded or replaced here, by torch.compile or by a dispatch mode such as FakeTensorMode.

    torch.compile runs methods of a tensor subclass untraced, in a mode; is_compiling() is False there in torch 2.11.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def spell(fmt: NVFP4) -> str:
    """A format as text that `read` reads."""
    return (
        f"{fmt.block[0]} {fmt.scaling} {fmt.scale_rule} {int(fmt.hadamard)} {fmt.rounding} {fmt.error} "
        f"{fmt.e4m3_max} {fmt.error_arithmetic}"
    )


@functools.cache
def read(text: str) -> NVFP4:
    """What `spell` wrote."""
    rows, scaling, scale_rule, hadamard, rounding, error, e4m3_max, error_arithmetic = text.split()
    values: Any = (
        (int(rows), 16), scaling, scale_rule, hadamard == "1", rounding, None if error == "None" else error,
        int(e4m3_max), error_arithmetic,
    )  # fmt: skip
    return NVFP4(*values)


def random_words(rng: Words) -> Tensor | None:
    """Seed and offset as int64 (2,): the tensor itself; numbers as one on the CPU, with their bits."""
    if rng is None or isinstance(rng, Tensor):
        return rng
    return torch.tensor([word - 2**64 if word >= 2**63 else word for word in rng], dtype=torch.int64, device="cpu")


def _words(rng: Tensor | None, x: Tensor) -> Words:
    """What an implementation takes: a tensor beside x, or two numbers."""
    if rng is None or rng.device == x.device:
        return rng
    seed, offset = rng.tolist()
    return seed % 2**64, offset % 2**64


def empty(x: Tensor, fmt: NVFP4, per_matrix: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of quantizing x, of their shapes alone."""
    scales = nvfp4.amax_shape(x.shape, fmt, per_matrix)
    return (
        x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8),
        x.new_empty((*x.shape[:-1], x.shape[-1] // 16), dtype=torch.float8_e4m3fn),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty(scales, dtype=torch.float32),
    )


def apart(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tensors, copied where two share memory, which an operator's results may not."""
    seen = set()
    for tensor in tensors:
        place = tensor.untyped_storage().data_ptr()
        yield tensor.clone() if place in seen and place else tensor
        seen.add(place)


@torch.library.custom_op("halfbyte::quantize_nvfp4", mutates_args=())
def quantize_nvfp4(
    x: Tensor,
    amax: Tensor | None,
    fmt: str,
    per_matrix: bool,
    rng: Tensor | None,
    first_block: int,
    importance: Tensor | None,
    hessian: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.quantize_nvfp4`."""
    options: dict[str, Any] = {"per_matrix": per_matrix, "rng": _words(rng, x), "first_block": first_block}
    options |= {"amax": amax, "importance": importance, "hessian": hessian}
    packed, block_scale, tensor_scale, out_amax = backend(impl).quantize_nvfp4(x, read(fmt), **options)
    return packed, block_scale, tensor_scale, out_amax


@quantize_nvfp4.register_fake
def _(x: Tensor, amax: Tensor | None, fmt: str, per_matrix: bool, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(x, read(fmt), per_matrix)


@torch.library.custom_op("halfbyte::quantize_mxfp8", mutates_args=())
def quantize_mxfp8(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """`ops.quantize_mxfp8`."""
    return backend(impl).quantize_mxfp8(x)


@quantize_mxfp8.register_fake
def _(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // 32), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


@torch.library.custom_op("halfbyte::dequantize_nvfp4", mutates_args=())
def dequantize_nvfp4(
    packed: Tensor, block_scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype, impl: str
) -> Tensor:
    """`ops.dequantize_nvfp4`."""
    return backend(impl).dequantize_nvfp4(packed, block_scale, tensor_scale, dtype)


@dequantize_nvfp4.register_fake
def _(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype, impl: str) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)


@torch.library.custom_op("halfbyte::dequantize_mxfp8", mutates_args=())
def dequantize_mxfp8(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """`ops.dequantize_mxfp8`."""
    return backend(impl).dequantize_mxfp8(elements, block_scale, dtype)


@dequantize_mxfp8.register_fake
def _(elements: Tensor, block_scale: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    return elements.new_empty(elements.shape, dtype=dtype)


@torch.library.custom_op("halfbyte::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor,
    amax: Tensor | None,
    fmt: str,
    unscaled: bool,
    per_matrix: bool,
    rng: Tensor | None,
    first_block: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`ops.fake_quantize`."""
    options = {"amax": amax, "per_matrix": per_matrix, "rng": _words(rng, x), "first_block": first_block}
    return backend(impl).fake_quantize(x, read(fmt), unscaled=unscaled, **options)


@fake_quantize.register_fake
def _(x: Tensor, amax: Tensor | None, fmt: str, unscaled: bool, per_matrix: bool, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), empty(x, read(fmt), per_matrix)[2]


@torch.library.custom_op("halfbyte::quantize_with_values", mutates_args=())
def quantize_with_values(
    x: Tensor,
    amax: Tensor | None,
    fmt: str,
    per_matrix: bool,
    rng: Tensor | None,
    first_block: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.quantize_with_values`, its tensors in a row."""
    options = {"amax": amax, "per_matrix": per_matrix, "rng": _words(rng, x), "first_block": first_block}
    (packed, block_scale, tensor_scale, out_amax), values = backend(impl).quantize_with_values(x, read(fmt), **options)
    return packed, block_scale, tensor_scale, out_amax, values


@quantize_with_values.register_fake
def _(
    x: Tensor, amax: Tensor | None, fmt: str, per_matrix: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*empty(x, read(fmt), per_matrix), x.new_empty(x.shape))


@torch.library.custom_op("halfbyte::quantize_transpose", mutates_args=())
def quantize_transpose(
    x: Tensor,
    amax: Tensor | None,
    transposed_amax: Tensor | None,
    fmt: str,
    transposed_fmt: str,
    rng: Tensor | None,
    transposed_rng: Tensor | None,
    impl: str,
) -> list[Tensor]:
    """`ops.quantize_transpose`, its eight tensors in a row."""
    rows, columns = backend(impl).quantize_transpose(
        x, read(fmt), read(transposed_fmt), amax=amax, transposed_amax=transposed_amax,
        rng=_words(rng, x), transposed_rng=_words(transposed_rng, x),
    )  # fmt: skip
    return list(apart((*rows, *columns)))


@quantize_transpose.register_fake
def _(
    x: Tensor, amax: Tensor | None, transposed_amax: Tensor | None, fmt: str, transposed_fmt: str, *_: Any
) -> list[Tensor]:
    return [*empty(x, read(fmt), True), *empty(x.mT, read(transposed_fmt), True)]


@torch.library.custom_op("halfbyte::quantize_many", mutates_args=())
def quantize_many(xs: Sequence[Tensor], amax: Tensor | None, fmt: str, shared_amax: bool, impl: str) -> list[Tensor]:
    """`ops.quantize_many`, its tensors in a row, four for each."""
    results = backend(impl).quantize_many(xs, read(fmt), amax=amax, shared_amax=shared_amax)
    return list(apart(tensor for result in results for tensor in result))


@quantize_many.register_fake
def _(xs: Sequence[Tensor], amax: Tensor | None, fmt: str, *_: Any) -> list[Tensor]:
    return [tensor for x in xs for tensor in empty(x, read(fmt), False)]


@torch.library.custom_op("halfbyte::swizzle", mutates_args=())
def swizzle(scale: Tensor, impl: str) -> Tensor:
    """`ops.swizzle`."""
    return backend(impl).swizzle(scale)


@swizzle.register_fake
def _(scale: Tensor, impl: str) -> Tensor:
    return scale.new_empty((*scale.shape[:-2], swizzled_size(scale.shape[-2], scale.shape[-1])))


@torch.library.custom_op("halfbyte::unswizzle", mutates_args=())
def unswizzle(swizzled: Tensor, rows: int, columns: int, impl: str) -> Tensor:
    """`ops.unswizzle`."""
    return backend(impl).unswizzle(swizzled, rows, columns)


@unswizzle.register_fake
def _(swizzled: Tensor, rows: int, columns: int, impl: str) -> Tensor:
    return swizzled.new_empty((*swizzled.shape[:-1], rows, columns))


@torch.library.custom_op("halfbyte::scaled_matmul", mutates_args=())
def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """`ops.scaled_matmul`."""
    from .matmul import run

    return run(impl)(a, b, a_scale, b_scale, bias=bias, out_dtype=out_dtype, accumulate_into=None)


@scaled_matmul.register_fake
def _(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, out_dtype: torch.dtype, impl: str) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.custom_op("halfbyte::scaled_matmul_accumulate", mutates_args=("accumulate_into",))
def scaled_matmul_accumulate(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    accumulate_into: Tensor,
    impl: str,
) -> None:
    """`ops.scaled_matmul` with accumulate_into."""
    from .matmul import run

    run(impl)(a, b, a_scale, b_scale, bias=bias, out_dtype=torch.float32, accumulate_into=accumulate_into)


@scaled_matmul_accumulate.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("halfbyte::scaled_grouped_matmul", mutates_args=())
def scaled_grouped_matmul(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """`ops.scaled_grouped_matmul`."""
    from .matmul import run_grouped

    options = {"bias": bias, "out_dtype": out_dtype, "accumulate_into": None}
    return run_grouped(impl)(a, b, offsets, a_scale, b_scale, **options)


@scaled_grouped_matmul.register_fake
def _(
    a: Tensor, b: Tensor, offsets: Any, a_scale: Any, b_scale: Any, bias: Any, out_dtype: torch.dtype, impl: str
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@torch.library.custom_op("halfbyte::scaled_grouped_matmul_accumulate", mutates_args=("accumulate_into",))
def scaled_grouped_matmul_accumulate(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    accumulate_into: Tensor,
    impl: str,
) -> None:
    """`ops.scaled_grouped_matmul` with accumulate_into."""
    from .matmul import run_grouped

    options = {"bias": bias, "out_dtype": torch.float32, "accumulate_into": accumulate_into}
    run_grouped(impl)(a, b, offsets, a_scale, b_scale, **options)


@scaled_grouped_matmul_accumulate.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("halfbyte::block_scaled_matmul", mutates_args=())
def block_scaled_matmul(
    a: Tensor,
    a_block_scale: Tensor,
    b: Tensor,
    b_block_scale: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`ops.block_scaled_matmul`."""
    from .matmul import run_block_scaled

    operands = a, a_block_scale, b, b_block_scale, a_scale, b_scale
    return run_block_scaled()(*operands, bias=bias, out_dtype=out_dtype, accumulate_into=None)


@block_scaled_matmul.register_fake
def _(
    a: Tensor, a_block_scale: Any, b: Tensor, b_block_scale: Any, a_scale: Any, b_scale: Any, bias: Any,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.custom_op("halfbyte::block_scaled_matmul_accumulate", mutates_args=("accumulate_into",))
def block_scaled_matmul_accumulate(
    a: Tensor,
    a_block_scale: Tensor,
    b: Tensor,
    b_block_scale: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    accumulate_into: Tensor,
) -> None:
    """`ops.block_scaled_matmul` with accumulate_into."""
    from .matmul import run_block_scaled

    operands = a, a_block_scale, b, b_block_scale, a_scale, b_scale
    run_block_scaled()(*operands, bias=bias, out_dtype=torch.float32, accumulate_into=accumulate_into)


@block_scaled_matmul_accumulate.register_fake
def _(*_: Any) -> None:
    return None
