"""`batch_invariant()`: torch's functions that add along a dimension, in an order that the batch does not change.

A handler stands in for each of them in the forward pass; gradients are those of the ordinary function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError
from ..ops import invariant as ops
from ..ops.matmul import scaled_matmul


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it torch computes rows that do not depend on how many there are: for log-probabilities, for example.

    Linear layers, matmuls with one matrix, sums, means, softmax, log_softmax, norms and topk along a dimension run in a
    fixed order; on a CPU elementwise functions such as exp too. Models that `halfbyte.load` or `halfbyte.nn.convert`
    made batch-invariant enter it themselves. Autograd works; torch.compile does not.

    Raises:
        UnsupportedError: within it, a function whose order of additions is not known, such as bmm or a convolution.

    Source: Thinking Machines Lab, "Defeating nondeterminism in LLM inference", 2025.
    """
    # The stack is looked at, no count is kept: in backward, where checkpoints are computed again, the mode is off it.
    if any(isinstance(mode, _Mode) for mode in torch.overrides._get_current_function_mode_stack()):
        yield
        return
    with _Mode():
        yield


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))


class _Fixed(torch.autograd.Function):
    """apply(fixed, ordinary, *tensors): fixed(*tensors), with the gradient of ordinary(*tensors)."""

    @staticmethod
    def forward(ctx: Any, fixed: Callable[..., Tensor], ordinary: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.ordinary = ordinary
        ctx.save_for_backward(*tensors)
        return fixed(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
            y = ctx.ordinary(*inputs)
        grads = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy))
        return None, None, *(next(grads) if need else None for need in needed)


class _FixedSum(torch.autograd.Function):
    """apply(fixed, ordinary, x): fixed(x), with the gradient of ordinary(x), a sum or mean.

    That depends on x's shape alone. x is not saved: models divide it by its sum in place.
    """

    @staticmethod
    def forward(ctx: Any, fixed: Callable[..., Tensor], ordinary: Callable[..., Tensor], x: Tensor) -> Tensor:
        ctx.ordinary, ctx.shape, ctx.options = ordinary, x.shape, {"dtype": x.dtype, "device": x.device}
        return fixed(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.enable_grad():
            x = torch.zeros((), **ctx.options).expand(ctx.shape).requires_grad_()
            y = ctx.ordinary(x)
        return None, None, *torch.autograd.grad(y, x, dy)


def fixed_forward(fixed: Callable[..., Tensor], ordinary: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """fixed(*tensors), with the gradient of ordinary(*tensors)."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        result: Tensor = _Fixed.apply(fixed, ordinary, *tensors)  # type: ignore[no-untyped-call]
        return result
    return fixed(*tensors)


class _Linear(torch.autograd.Function):
    """F.linear: apply(x (M, K), weight (N, K), bias) → (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dy @ weight if needs_x else None
        dw = dy.mT @ x if needs_weight else None
        return dx, dw, dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return scaled_matmul(x, weight, None, None, bias=bias, out_dtype=x.dtype, batch_invariant=True)


# --- handlers: the function, then its own arguments -----------------------------------------------------------------


def _linear(_: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
    x = input.reshape(-1, input.shape[-1])
    given = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        y = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    else:
        y = _multiply(x, weight, bias)
    result: Tensor = y.reshape(*input.shape[:-1], weight.shape[0])
    return result


def _matmul(func: Any, input: Tensor, other: Tensor, **options: Any) -> Tensor:
    if not input.is_floating_point():
        return _plain(func, input, other, **options)
    if input.dim() > 1 and other.dim() > 1 and input.shape[-1] == 1:
        return input * other  # an outer product adds nothing
    if options or other.dim() != 2 or not input.dim():
        raise _error(func)
    return _linear(None, input, other.mT)


def _sum(func: Any, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if dim is None or not input.is_floating_point() or not input.dim():
        given = {} if dtype is None else {"dtype": dtype}
        return _plain(func, input, **given) if dim is None else _plain(func, input, dim, keepdim, **given)
    mean = func in _MEANS

    def fixed(x: Tensor) -> Tensor:
        return _along(x, _dims(x, dim), keepdim, dtype or x.dtype, mean)

    def ordinary(x: Tensor) -> Tensor:
        total: Tensor = func(x, dim, keepdim, dtype=dtype)
        return total

    if torch.is_grad_enabled() and input.requires_grad:
        result: Tensor = _FixedSum.apply(fixed, ordinary, input)  # type: ignore[no-untyped-call]
        return result
    return fixed(input)


def _dims(x: Tensor, dim: int | Sequence[int]) -> list[int]:
    return sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))


def _along(x: Tensor, dims: list[int], keepdim: bool, dtype: torch.dtype, mean: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    last = wide.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))
    total = ops.row_sum(last)
    if mean:
        total = total / last.shape[-1]
    if keepdim:
        for d in dims:
            total = total.unsqueeze(d)
    return total.to(dtype)


def _softmax_like(func: Any, input: Tensor, dim: Any = None, *args: Any, dtype: Any = None, **_: Any) -> Tensor:
    if dim is None or not input.is_floating_point():
        raise _error(func)
    if args and isinstance(args[-1], torch.dtype):  # after F.softmax's _stacklevel
        dtype = args[-1]
    if dtype is None:
        dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    log = func.__name__ == "log_softmax"

    def fixed(x: Tensor) -> Tensor:
        x = x.to(dtype) if dtype in (torch.float32, torch.float64) else x.float()
        y = (ops.log_softmax if log else ops.softmax)(x.movedim(dim, -1)).movedim(-1, dim)
        return y.to(dtype)

    def ordinary(x: Tensor) -> Tensor:
        return (torch.log_softmax if log else torch.softmax)(x, dim, dtype=dtype)

    return fixed_forward(fixed, ordinary, input)


def _rms_norm(
    _: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return _norm(
        F.rms_norm, input, normalized_shape, weight, None, torch.finfo(input.dtype).eps if eps is None else eps
    )


def _layer_norm(
    _: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _norm(F.layer_norm, input, normalized_shape, weight, bias, eps)


def _norm(function: Any, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dims = list(range(-len(shape), 0))
    centred = function is F.layer_norm

    def fixed(x: Tensor, *parameters: Tensor) -> Tensor:
        wide = x.float()
        places = _dims(wide, dims)
        if centred:
            wide = wide - _along(wide, places, True, torch.float32, True)
        wide = wide * torch.rsqrt(_along(wide * wide, places, True, torch.float32, True) + eps)
        given = iter(parameters)
        if weight is not None:
            wide = wide * next(given).float()
        if bias is not None:
            wide = wide + next(given).float()
        return wide.to(x.dtype)

    def ordinary(x: Tensor, *parameters: Tensor) -> Tensor:
        given = iter(parameters)
        weights = {"weight": None if weight is None else next(given), "eps": eps}
        if bias is not None:
            weights["bias"] = next(given)
        result: Tensor = function(x, shape, **weights)
        return result

    return fixed_forward(fixed, ordinary, x, *[t for t in (weight, bias) if t is not None])


def _topk(_: Any, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Of equal values those that come first, whatever algorithm torch would choose."""
    values, indices = torch.sort(input, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def _elementwise(func: Any, input: Tensor, *args: Any, inplace: bool = False, **options: Any) -> Tensor:
    if inplace or not isinstance(input, Tensor) or any(isinstance(a, Tensor) for a in args):
        raise _error(func)

    def ordinary(x: Tensor) -> Tensor:
        y: Tensor = func(x, *args, **options)
        return y

    square = func in _POWERS and args == (2,)  # a product: exact, and in every norm
    if input.device.type != "cpu" or square:  # CUDA runs one code for all elements
        return ordinary(input)
    return fixed_forward(lambda x: ops.elementwise(ordinary, x), ordinary, input)


def _add(func: Any, input: Tensor, other: Any, *args: Any, **options: Any) -> Tensor:
    if args or (options.get("alpha", 1) != 1 and (not isinstance(input, Tensor) or input.is_floating_point())):
        raise _error(func)  # a product and a sum, which are rounded once or twice
    return _plain(func, input, other, **options)


def _plain(func: Any, *args: Any, **options: Any) -> Tensor:
    result: Tensor = func(*args, **options)
    return result


def _refuse(func: Any, input: Any, *args: Any, **options: Any) -> Any:
    if isinstance(input, Tensor) and not input.is_floating_point():
        return func(input, *args, **options)
    raise _error(func)


def _error(func: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{getattr(func, '__name__', func)} with these arguments is not known to be batch-invariant: what calls it "
        "cannot run under batch_invariant"
    )


def _functions(*names: str) -> Iterator[Any]:
    """torch's functions and methods of these names."""
    for name in names:
        for place in (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg):
            function = getattr(place, name, None)
            if callable(function):
                yield function


_POWERS = frozenset(_functions("pow", "__pow__"))
_MEANS = frozenset(_functions("mean"))
_ELEMENTWISE = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "sigmoid", "expit", "erf",
    "silu", "gelu", "softplus", "mish", "elu", "selu", "celu", "logsigmoid", "pow", "__pow__",
    "__rpow__", "float_power", "sinh", "cosh", "rsqrt", "asin", "acos", "atan", "asinh", "acosh", "atanh", "erfc",
    "atan2", "arctan2", "logaddexp", "logaddexp2",
)  # fmt: skip
_REFUSED = (
    "bmm", "baddbmm", "addbmm", "addmm", "addmv", "mv", "dot", "inner", "einsum", "tensordot", "bilinear", "conv1d",
    "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "scaled_dot_product_attention",
    "multi_head_attention_forward", "grouped_mm", "scaled_mm", "cumsum", "cumprod", "logcumsumexp", "logsumexp",
    "nansum", "nanmean", "var", "std", "var_mean", "std_mean", "norm", "vector_norm", "matrix_norm", "vecdot",
    "multi_dot", "normalize", "cosine_similarity",
    "prod", "group_norm", "batch_norm", "instance_norm", "index_add", "index_add_", "scatter_add", "scatter_add_",
    "embedding_bag", "exp_", "sigmoid_", "tanh_", "silu_",
)  # fmt: skip
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_functions(*_REFUSED), _refuse),
    **dict.fromkeys(_functions(*_ELEMENTWISE), _elementwise),
    **dict.fromkeys(_functions("add", "add_", "sub", "sub_", "subtract", "subtract_", "rsub"), _add),
    **dict.fromkeys(_functions("linear"), _linear),
    **dict.fromkeys(_functions("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(_functions("sum", "mean"), _sum),
    **dict.fromkeys(_functions("softmax", "log_softmax"), _softmax_like),
    **dict.fromkeys(_functions("rms_norm"), _rms_norm),
    **dict.fromkeys(_functions("layer_norm"), _layer_norm),
    **dict.fromkeys(_functions("topk"), _topk),
}
