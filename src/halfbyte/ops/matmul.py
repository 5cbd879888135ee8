"""Matmuls of operands that are already decoded to q·s; `halfbyte.linear` takes QuantizedTensors.

    y[m, n] = (Σ_k a[m, k]·b[n, k]) · (a_scale[m] · b_scale[n]) + bias[n]

q·s has at most 6 significant bits: bfloat16, float16 and TF32 hold it, and every product is exact in float32. Sums are
float32, the scales' product, the multiplication and the bias are one float32 rounding each, and so is out_dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError, UnsupportedError
from ..numerics import matmul as reference
from ..numerics.swizzle import swizzled_size
from . import custom
from .backends import pick
from .checks import FLOAT_DTYPES

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_into: Tensor | None = None,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> Tensor:
    """a (M, K) · b (N, K)ᵀ, scaled: (M, N). It carries no gradient.

    Args:
        a: (M, K) float32, bfloat16 or float16, any strides: a transposed view costs nothing.
        b: (N, K) of a's dtype, any strides.
        a_scale: S_dec of a, float32: () or (M,); None where there is none (MXFP8, or not quantized).
        b_scale: S_dec of b, float32: () or (N,), or None.
        bias: (N,) float32, bfloat16 or float16.
        out_dtype: float32, bfloat16 or float16; of no effect with accumulate_into.
        accumulate_into: float32 (M, N), any strides, to which the float32 result is added in place; it is returned.
        batch_invariant: a row of the result depends on its row of a alone, bit for bit, whatever the others are and
            however many; not with accumulate_into.
        impl: "triton": cuBLAS and one kernel after it. "cpu": torch's float32 matmul. "reference": float64, rounded to
            float32 and then to out_dtype.

    Raises:
        ShapeError: an operand, a scale, the bias or the buffer is missing or of another dtype, shape or device.
        FormatError, UnsupportedError: impl is unknown, or cannot run here; or batch_invariant with accumulate_into.

    Numerics: "cpu" and "triton" differ from "reference" by less than ((K + 2)·|α|·Σ|a·b| + |bias|)·2^-24, the order of
    the sum being theirs, before the last rounding; see `docs/matmul.md`.
    """
    a, b = _operand(a, "a"), _operand(b, "b")
    if b.dtype != a.dtype or b.device != a.device or a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"a is {_spell(a)}, b {_spell(b)}; needs (M, K) and (N, K) of one dtype on one device: "
            "the last dimension is what the matmul sums over"
        )
    rows, columns = a.shape[0], b.shape[0]
    a_scale = _scale(a_scale, "a_scale", a, ((), (rows,)), "() or a's rows (M,)")
    b_scale = _scale(b_scale, "b_scale", a, ((), (columns,)), "() or b's rows (N,)")
    bias = _bias(bias, a, (columns,))
    _check_out_dtype(out_dtype)
    if accumulate_into is not None:
        _check_buffer(accumulate_into, a, (rows, columns))
        if batch_invariant:
            raise FormatError("accumulate_into with batch_invariant=True: add the result to the buffer yourself")
    name = _pick(impl, a.device, batch_invariant)
    if custom.wanted():
        if accumulate_into is None:
            return custom.scaled_matmul(a, b, a_scale, b_scale, bias, out_dtype, name)  # type: ignore[no-any-return]
        custom.scaled_matmul_accumulate(a, b, a_scale, b_scale, bias, accumulate_into, name)
        return accumulate_into
    return run(name)(a, b, a_scale, b_scale, bias=bias, out_dtype=out_dtype, accumulate_into=accumulate_into)


def scaled_grouped_matmul(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Rows of a (T, K), sorted by expert, each times its expert's matrix of b (E, N, K): (T, N). No gradient.

    Args:
        a: (T, K) bfloat16 on a GPU; float32 or float16 too elsewhere.
        b: (E, N, K) of a's dtype.
        offsets: int32 (E,), for each expert its last row plus one; not decreasing, at most T. Rows past the last one
            belong to nobody and give zeros. On a GPU the values are not looked at.
        a_scale: float32 () or (T,), or None.
        b_scale: float32 (), (E,) or (E, N), or None.
        bias: (E, N) float32, bfloat16 or float16.
        out_dtype: float32, bfloat16 or float16.
        batch_invariant, impl: as in `scaled_matmul`.

    Raises:
        ShapeError, FormatError, UnsupportedError: as `scaled_matmul`.

    Numerics: as `scaled_matmul`, but that on a GPU torch's grouped matmul rounds the sums to bfloat16, its only output,
    before they are scaled: one more rounding, of at most 2^-8 of the sum. batch_invariant=True has float32 sums.
    """
    a, b = _operand(a, "a"), _operand(b, "b", 3)
    if b.dtype != a.dtype or b.device != a.device or a.shape[1] != b.shape[2]:
        raise ShapeError(f"a is {_spell(a)}, b {_spell(b)}; needs (T, K) and (E, N, K) of one dtype on one device")
    rows, (experts, columns, _) = a.shape[0], b.shape
    a_scale = _scale(a_scale, "a_scale", a, ((), (rows,)), "() or a's rows (T,)")
    b_scale = _scale(b_scale, "b_scale", a, ((), (experts,), (experts, columns)), "(), (E,) or (E, N)")
    bias = _bias(bias, a, (experts, columns))
    _check_out_dtype(out_dtype)
    _check_offsets(offsets, a, experts)
    name = _pick(impl, a.device, batch_invariant)
    if name == "triton" and a.device.type == "cuda" and a.dtype != torch.bfloat16:
        raise ShapeError(f"a is {_spell(a)}; torch's grouped matmul takes bfloat16, which holds q·s: convert both")
    if custom.wanted():
        return custom.scaled_grouped_matmul(  # type: ignore[no-any-return]
            a, b, offsets, a_scale, b_scale, bias, out_dtype, name
        )
    return run_grouped(name)(a, b, offsets, a_scale, b_scale, bias=bias, out_dtype=out_dtype)


def has_block_scaled_matmul(device: torch.device, rows: int, columns: int, k: int) -> bool:
    """Whether `block_scaled_matmul` of these sizes runs on this device, without decoding."""
    if device.type != "cuda" or pick("auto", device) != "triton":
        return False
    from ..kernels import block_scaled

    return block_scaled.supports(device, rows, columns, k)


def block_scaled_matmul(
    a: Tensor,
    a_block_scale: Tensor,
    b: Tensor,
    b_block_scale: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """`scaled_matmul` of codes with swizzled block scales, on tensor cores that take them: no q·s is made.

    Args:
        a: (M, K/2) uint8, NVFP4's packed codes; or (M, K) float8_e4m3fn, MXFP8's elements.
        a_block_scale: one byte each, 1-D, as `swizzle` gives them for a's rows as one matrix.
        b: (N, K/2) or (N, K), as a. b_block_scale: as a's.
        a_scale, b_scale, bias, out_dtype, accumulate_into: as in `scaled_matmul`.

    Raises:
        ShapeError: as `scaled_matmul`.
    """
    if a.dtype != b.dtype or a.dtype not in (torch.uint8, torch.float8_e4m3fn) or a.shape[1:] != b.shape[1:]:
        raise ShapeError(f"a is {_spell(a)}, b {_spell(b)}; needs codes of one format: uint8 or float8_e4m3fn, 2-D")
    rows, columns = a.shape[0], b.shape[0]
    blocks = a.shape[1] // (8 if a.dtype == torch.uint8 else 32)
    for name, scale, along in (("a_block_scale", a_block_scale, rows), ("b_block_scale", b_block_scale, columns)):
        if tuple(scale.shape) != (swizzled_size(along, blocks),) or scale.element_size() != 1:
            raise ShapeError(f"{name} is {_spell(scale)}; needs {swizzled_size(along, blocks)} bytes from swizzle")
    a, b = a.contiguous(), b.contiguous()
    a_scale = _scale(a_scale, "a_scale", a, ((), (rows,)), "() or a's rows (M,)")
    b_scale = _scale(b_scale, "b_scale", a, ((), (columns,)), "() or b's rows (N,)")
    bias = _bias(bias, a, (columns,))
    _check_out_dtype(out_dtype)
    if accumulate_into is not None:
        _check_buffer(accumulate_into, a, (rows, columns))
    operands = a, a_block_scale, b, b_block_scale, a_scale, b_scale
    if custom.wanted():
        if accumulate_into is None:
            return custom.block_scaled_matmul(*operands, bias, out_dtype)  # type: ignore[no-any-return]
        custom.block_scaled_matmul_accumulate(*operands, bias, accumulate_into)
        return accumulate_into
    return run_block_scaled()(*operands, bias=bias, out_dtype=out_dtype, accumulate_into=accumulate_into)


INVARIANT = "invariant "
"""What precedes the name of an implementation whose rows do not depend on the batch."""


def _pick(impl: str, device: torch.device, batch_invariant: bool) -> str:
    name = pick(impl, device)
    if not batch_invariant:
        return name
    if name == "reference":
        raise UnsupportedError(
            f"batch_invariant=True with impl={impl!r} on {device}: needs impl='cpu', or 'triton' on an NVIDIA GPU"
        )
    return INVARIANT + name


@functools.cache
def run(name: str) -> Callable[..., Tensor]:
    """`scaled_matmul` of that implementation, without its checks."""
    if name == INVARIANT + "triton":
        from ..kernels import invariant

        return _without_autocast(functools.partial(_alone, invariant.scaled_matmul))
    if name == INVARIANT + "cpu":
        from ..kernels.cpu import invariant as on_cpu

        return _without_autocast(functools.partial(_plain, on_cpu.matmul))
    if name == "triton":
        from ..kernels import epilogue

        return _without_autocast(epilogue.scaled_matmul)
    return _without_autocast(functools.partial(_plain, _sums32 if name == "cpu" else _sums64))


@functools.cache
def run_grouped(name: str) -> Callable[..., Tensor]:
    """`scaled_grouped_matmul` of that implementation, without its checks."""
    if name == INVARIANT + "triton":
        from ..kernels import invariant

        return _without_autocast(invariant.scaled_grouped_matmul)
    if name == INVARIANT + "cpu":
        from ..kernels.cpu import invariant as on_cpu

        return _without_autocast(functools.partial(_plain_grouped, on_cpu.matmul))
    if name == "triton":
        from ..kernels import epilogue

        return _without_autocast(epilogue.scaled_grouped_matmul)
    return _without_autocast(functools.partial(_plain_grouped, _sums32 if name == "cpu" else _sums64))


@functools.cache
def run_block_scaled() -> Callable[..., Tensor]:
    """`block_scaled_matmul` without its checks."""
    from ..kernels import block_scaled

    return _without_autocast(block_scaled.block_scaled_matmul)


def _without_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Autocast would round float32 operands, and the sums."""

    def call(a: Tensor, *args: object, **options: object) -> Tensor:
        if not torch.is_autocast_enabled(a.device.type):
            return function(a, *args, **options)
        with torch.autocast(a.device.type, enabled=False):
            return function(a, *args, **options)

    return call


def _alone(function: Callable[..., Tensor], *args: object, accumulate_into: None, **options: object) -> Tensor:
    """A function that knows no accumulate_into."""
    return function(*args, **options)


def _sums32(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.float(), b.float().mT)


def _sums64(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.double(), b.double().mT)


def _plain(
    sums: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    total = sums(a, b)
    if total.dtype == torch.float32:
        return reference.epilogue(total, a_scale, b_scale, bias, out_dtype, accumulate_into)
    result = reference.epilogue(total, a_scale, b_scale, bias, torch.float32)
    return result.to(out_dtype) if accumulate_into is None else accumulate_into.add_(result)


def _plain_grouped(
    sums: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    out = torch.zeros((a.shape[0], b.shape[1]), dtype=out_dtype, device=a.device)
    start = 0
    for e, end in enumerate(offsets.tolist()):
        rows = slice(start, end)
        out[rows] = _plain(
            sums, a[rows], b[e],
            a_scale[rows] if a_scale is not None and a_scale.dim() else a_scale,
            b_scale[e] if b_scale is not None and b_scale.dim() else b_scale,
            bias=None if bias is None else bias[e], out_dtype=out_dtype, accumulate_into=None,
        )  # fmt: skip
        start = end
    return out


def _spell(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _operand(x: Tensor, name: str, dims: int = 2) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES or x.dim() != dims:
        shape = "(rows, K)" if dims == 2 else "(E, N, K)"
        raise ShapeError(f"{name} is {_spell(x)}; needs float32, bfloat16 or float16 of shape {shape}")
    return x.detach() if x.requires_grad else x


def _scale(
    scale: Tensor | None, name: str, like: Tensor, shapes: tuple[tuple[int, ...], ...], wanted: str
) -> Tensor | None:
    if scale is None:
        return None
    good = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.device == like.device
    if not good or tuple(scale.shape) not in shapes:
        raise ShapeError(
            f"{name} is {_spell(scale)}; needs torch.float32 on {like.device} of shape {wanted}: "
            f"{' or '.join(map(str, shapes))}; its operand's role says which axis it scales"
        )
    return scale.detach() if scale.requires_grad else scale


def _bias(bias: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if bias is None:
        return None
    good = isinstance(bias, Tensor) and bias.dtype in FLOAT_DTYPES and bias.device == like.device
    if not good or tuple(bias.shape) != shape:
        raise ShapeError(f"bias is {_spell(bias)}; needs a float tensor on {like.device} of shape {shape}")
    return bias.detach() if bias.requires_grad else bias


def _check_out_dtype(out_dtype: object) -> None:
    if out_dtype not in OUT_DTYPES:
        raise ShapeError(f"out_dtype={out_dtype}: choose torch.bfloat16, torch.float16 or torch.float32")


def _check_buffer(buffer: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    good = isinstance(buffer, Tensor) and buffer.dtype == torch.float32 and buffer.device == like.device
    if not good or tuple(buffer.shape) != shape:
        raise ShapeError(f"accumulate_into is {_spell(buffer)}; needs torch.float32 on {like.device} of shape {shape}")
    if buffer.requires_grad:
        raise FormatError("accumulate_into requires a gradient, and is written in place: give its .data or main_grad")


def _check_offsets(offsets: Tensor, like: Tensor, experts: int) -> None:
    good = isinstance(offsets, Tensor) and offsets.dtype == torch.int32 and offsets.device == like.device
    if not good or tuple(offsets.shape) != (experts,):
        raise ShapeError(f"offsets is {_spell(offsets)}; needs torch.int32 on {like.device} of shape ({experts},)")
    if offsets.device.type == "cpu" and experts and not torch.compiler.is_compiling():
        ends = [0, *offsets.tolist()]
        if ends != sorted(ends) or ends[-1] > like.shape[0]:
            raise ShapeError(
                f"offsets={ends[1:]}: each expert's last row plus one, not decreasing, at most {like.shape[0]} rows"
            )
