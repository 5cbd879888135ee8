"""Many Linears in one: rows sorted by expert, with an own tensor scale for each expert's weight.

An expert's tokens are a matrix of their own: with scaling="tensor" each has its own activation scale, whatever the
other experts are given. That is the same as scaling each row by its expert's maximum, and so one row-scaled
quantization serves all. Along the tokens, where backward="quantized" sums, each expert's are filled up with zeros to
whole blocks; a block is then a row by itself, scaled by its expert's maximum, and one quantization serves all again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..errors import UnsupportedError
from ..formats import MXFP8, NVFP4, Format
from ..ops.gradient import Words, advance, current
from ..ops.matmul import scaled_grouped_matmul
from ..ops.wgrad import scaled_grouped_wgrad
from ..recipe.training import LayerRecipe
from .autograd import QuantizedLinear, original_or_decoded, quantize_weight
from .linear import Quantization, main_grad_of
from .operands import (
    MATMUL_DTYPE,
    AmaxGroups,
    Encoded,
    Operand,
    encode_and_decode,
    fake,
    local_amax,
    reduce_amax,
    unscaled,
)


class GroupedFunction(torch.autograd.Function):
    """As `QuantizedLinear`, of sorted rows: apply(x (T, K), weight (E, N, K), offsets (E,), …) → (T, N).

    For backward="high_precision" and "dequantized".
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        main_grad: Tensor | None,
        layer: LayerRecipe,
        groups: AmaxGroups,
    ) -> Tensor:
        """Compute y and save what the recipe's backward needs."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dequantized = layer.backward == "dequantized"
        saved: list[Tensor | None] = [x, None, None]
        if layer.activations is None:
            a = Operand(x, None)
        else:
            fmt, group = by_rows(layer.activations), groups.of("activations", layer.activations)
            amax = rows_amax(x, layer.activations, offsets, group)
            if dequantized and needs_weight:
                encoded, a = encode_and_decode(x, fmt, amax)
                saved = list(encoded)
            else:
                a = fake(x, fmt, amax)
        of_weight: list[Tensor | None] = [weight, None, None]
        if layer.weights is None:
            b = Operand(weight, None)
        else:
            amax = weights_amax(weight, layer.weights, groups)
            if dequantized and needs_x:
                kept, b = encode_and_decode(weight.detach(), layer.weights, amax, per_matrix=True)
                of_weight = list(kept)
            else:
                b = fake(weight.detach(), layer.weights, amax, per_matrix=True)
        ctx.save_for_backward(
            *(saved if needs_weight else [None] * 3), *(of_weight if needs_x else [None] * 3), offsets
        )
        ctx.main_grad = main_grad  # not saved: it is written to, between forward and backward too
        ctx.layer, ctx.weight_dtype = layer, weight.dtype
        values, weights = a.values, b.values
        if values.dtype != weights.dtype:
            dtype = torch.promote_types(values.dtype, weights.dtype)
            values, weights = values.to(dtype), weights.to(dtype)
        return scaled_grouped_matmul(
            values, weights, offsets, a.scale, b.scale, out_dtype=x.dtype, batch_invariant=layer.batch_invariant
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of x and weight."""
        *saved, offsets = ctx.saved_tensors
        layer, main_grad = ctx.layer, ctx.main_grad
        dx = dw = None
        dy = aligned(dy)
        if ctx.needs_input_grad[0]:
            w = original_or_decoded(saved[3:], layer.weights, dy.dtype)
            dx = grouped_rows(dy, w, offsets)
        if ctx.needs_input_grad[1]:
            fmt = None if layer.activations is None else by_rows(layer.activations)
            x = original_or_decoded(saved[:3], fmt, dy.dtype)
            dw = grouped_sums(dy, x, offsets)
            if main_grad is not None:
                main_grad.add_(dw)
            dw = dw.to(ctx.weight_dtype) if main_grad is None else None
        return dx, dw, None, None, None, None


class GroupedQuantizedFunction(torch.autograd.Function):
    """The same for backward="quantized": apply(x (T, K), weight (E, N, K), offsets, main_grad, state, …) → (T, N).

    As many launches as for one expert. The formats' blocks along tokens are 1×16 or 1×32, none 16×16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        main_grad: Tensor | None,
        state: Tensor,
        layer: LayerRecipe,
        groups: AmaxGroups,
    ) -> Tensor:
        """Compute y and save x's columns and, where its blocks are square, the weight's codes."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        assert layer.activations is not None  # checked when the recipe was built
        assert layer.weights is not None
        amax = rows_amax(x, layer.activations, offsets, groups.of("activations", layer.activations))
        a = fake(x, by_rows(layer.activations), amax)
        columns: list[Tensor | None] = [None] * 3
        if needs_weight:
            filled = fill(offsets, x.shape[0], layer.token_block)
            pieces, maxima = pieces_of(x, layer.wgrad_activations, filled, offsets, groups.activations)
            columns = list(encode_pieces(pieces, layer.wgrad_activations, filled, maxima))
        amax = weights_amax(weight, layer.weights, groups)
        of_weight: list[Tensor | None] = [weight, None, None] if needs_x else [None] * 3
        if needs_x and isinstance(layer.weights, NVFP4) and layer.weights.block == (16, 16):  # dgrad's blocks too
            kept, b = encode_and_decode(weight.detach(), layer.weights, amax, per_matrix=True)
            of_weight = list(kept)
        else:
            b = fake(weight.detach(), layer.weights, amax, per_matrix=True)
        ctx.save_for_backward(*columns, *of_weight, offsets)
        ctx.main_grad, ctx.state = main_grad, state  # not saved: both are written to, between forward and backward too
        ctx.layer, ctx.groups, ctx.weight_dtype = layer, groups, weight.dtype
        return scaled_grouped_matmul(
            a.values, b.values, offsets, a.scale, b.scale, out_dtype=x.dtype, batch_invariant=layer.batch_invariant
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of x and weight."""
        *saved, offsets = ctx.saved_tensors
        layer, groups, state = ctx.layer, ctx.groups, ctx.state
        dx = dw = None
        rng, transposed_rng = current(state, dy) if layer.stochastic else (None, None)
        if ctx.needs_input_grad[0]:
            amax = rows_amax(dy, layer.gradients, offsets, groups.of("gradients", layer.gradients))
            g = _fake(dy, by_rows(layer.gradients), amax, rng)
            w = _dgrad_weights(saved[3:], layer, groups)
            dx = scaled_grouped_matmul(g.values, w.values, offsets, g.scale, w.scale, out_dtype=dy.dtype)
        if ctx.needs_input_grad[1]:
            fmt = layer.wgrad_gradients
            filled = fill(offsets, dy.shape[0], layer.token_block)
            pieces, maxima = pieces_of(dy, fmt, filled, offsets, groups.gradients)
            values, scale = _fake_pieces(pieces, fmt, filled, maxima, transposed_rng)
            x = unscaled(Encoded(*saved[:3]), layer.wgrad_activations)
            into = {"out_dtype": ctx.weight_dtype, "accumulate_into": ctx.main_grad}
            dw = scaled_grouped_wgrad(values, x.values, filled.ends, scale, x.scale, **into)
            dw = dw if ctx.main_grad is None else None
        if layer.stochastic:
            advance(state)
        return dx, dw, *(None,) * 5


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, quantization: Quantization) -> Tensor:
    """Rows of x (T, K), sorted by expert, times their expert's matrix of weight (E, N, K), transposed: (T, N).

    offsets: int32 (E,), each expert's last row plus one. Rows past the last one give zeros.

    Raises:
        UnsupportedError: backward="quantized" with 16×16 blocks of activations or gradients goes expert by expert, by
            counts that a compiled graph does not know.
    """
    layer, groups = quantization.layer, quantization.groups
    x = x.contiguous()
    main_grad = main_grad_of(weight) if quantization.main_grad and torch.is_grad_enabled() else None
    if layer.backward != "quantized":
        y: Tensor = GroupedFunction.apply(  # type: ignore[no-untyped-call]
            x, weight, offsets, main_grad, layer, groups
        )
        return y
    state = quantization.state_on(x.device)
    if not any(isinstance(fmt, NVFP4) and fmt.block == (16, 16) for fmt in (layer.activations, layer.gradients)):
        quantized: Tensor = GroupedQuantizedFunction.apply(  # type: ignore[no-untyped-call]
            x, weight, offsets, main_grad, state, layer, groups
        )
        return quantized
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            "experts with 16×16 blocks of activations or gradients go one by one, by counts that a compiled graph does "
            "not know: leave them out of torch.compile, or use 1×16 blocks"
        )
    return one_by_one(x, weight, offsets, main_grad, state, layer, groups)


def one_by_one(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    main_grad: Tensor | None,
    state: Tensor,
    layer: LayerRecipe,
    groups: AmaxGroups,
) -> Tensor:
    """`grouped_linear` for backward="quantized" as a Linear for each expert; waits for the counts."""
    assert layer.weights is not None
    amaxes = weights_amax(weight, layer.weights, groups)
    parts, start = [], 0
    for expert, (w, end) in enumerate(zip(weight.unbind(0), offsets.tolist(), strict=True)):
        amax = None if amaxes is None else amaxes[expert]
        seen = quantize_weight(w.detach(), layer, amax)
        encoded = (None, None) if seen.encoded is None else seen.encoded[:2]
        into = None if main_grad is None else main_grad[expert]
        parts.append(
            QuantizedLinear.apply(  # type: ignore[no-untyped-call]
                x[start:end], w, None, *seen.operand, *encoded, seen.amax, into, state, layer, groups
            )
        )
        start = end
    parts.append(x.new_zeros((x.shape[0] - start, weight.shape[1])))
    return torch.cat(parts)


class Filled(NamedTuple):
    """Tokens in whole blocks of 16 or 32, none of which crosses experts.

    Attributes:
        rows: int64 (T,), where each token goes; nobody's go behind the last expert's.
        size: how many rows there are, whatever the counts: what all experts could need.
        ends: int32 (E,), each expert's last row plus one.
        experts: int64 (size / 16,), whose each 16 rows are; E behind the last expert.
    """

    rows: Tensor
    size: int
    ends: Tensor
    experts: Tensor


def fill(offsets: Tensor, tokens: int, block: int) -> Filled:
    """Where the tokens go; computed on their device, without a look at the counts."""
    experts = offsets.shape[0]
    starts = nn.functional.pad(offsets[:-1], (1, 0))
    sizes = (offsets - starts + (block - 1)) // block * block
    ends = sizes.cumsum(0, dtype=torch.int32)
    shifts = torch.cat((ends - sizes - starts, ends[-1:] - offsets[-1:]))
    rows = torch.arange(tokens, device=offsets.device) + shifts[expert_of(offsets, tokens, 1)]
    size = -(-(tokens + experts * (block - 1)) // block) * block
    return Filled(rows, size, ends, expert_of(ends, size // 16, 16))


def expert_of(ends: Tensor, count: int, step: int) -> Tensor:
    """int64 (count,): to whom the rows 0, step, 2·step, … belong; E past the last one's end."""
    rows = torch.arange(0, count * step, step, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, rows, right=True)


def maxima_by_expert(values: Tensor, experts: Tensor, offsets: Tensor, group: Any) -> Tensor:
    """(E + 1,): the largest of an expert's values, over the group; the last one is nobody's."""
    maxima = values.new_zeros(offsets.shape[0] + 1).scatter_reduce(0, experts, values, "amax")
    return maxima if group is None else reduce_amax(maxima, group)


def rows_amax(x: Tensor, fmt: Format, offsets: Tensor, group: Any) -> Tensor | None:
    """(T,): for scaling="tensor" each row's expert's maximum; None where each row's own will do."""
    if isinstance(fmt, MXFP8):
        return None
    if fmt.scaling == "row":
        return None if group is None else reduce_amax(local_amax(x, fmt), group)
    experts = expert_of(offsets, x.shape[0], 1)
    return maxima_by_expert(local_amax(x, NVFP4(scaling="row")), experts, offsets, group)[experts]


def pieces_of(x: Tensor, fmt: Format, filled: Filled, offsets: Tensor, group: Any) -> tuple[Tensor, Tensor | None]:
    """xᵀ (K, size) of x (T, K), filled up with zeros, and its experts' maxima (E + 1,), after fmt's transform."""
    placed = x.new_zeros((filled.size, x.shape[1])).index_copy(0, filled.rows, x)
    pieces = placed.mT.contiguous()
    if isinstance(fmt, MXFP8):
        return pieces, None
    if fmt.hadamard:
        maxima = local_amax(pieces.view(-1, 16), replace(fmt, scaling="row")).view(x.shape[1], -1).amax(0)
        return pieces, maxima_by_expert(maxima, filled.experts, offsets, group)
    rows = local_amax(x, NVFP4(scaling="row"))
    return pieces, maxima_by_expert(rows, expert_of(offsets, x.shape[0], 1), offsets, group)


def encode_pieces(pieces: Tensor, fmt: Format, filled: Filled, maxima: Tensor | None) -> Encoded:
    """xᵀ (K, size) along the tokens, its tensor scale that of each expert, (E,)."""
    if isinstance(fmt, MXFP8):
        return Encoded(*ops.quantize_mxfp8(pieces, fmt), None)
    rows, amax, scale = _as_rows(pieces, fmt, filled, maxima)
    q = ops.quantize_nvfp4(rows, replace(fmt, scaling="row"), amax=amax)
    return Encoded(q.packed.view(len(pieces), -1), q.block_scale.view(len(pieces), -1), scale)


def _fake_pieces(pieces: Tensor, fmt: Format, filled: Filled, maxima: Tensor | None, rng: Any) -> Operand:
    if isinstance(fmt, MXFP8):
        return unscaled(encode_pieces(pieces, fmt, filled, maxima), fmt)
    rows, amax, scale = _as_rows(pieces, fmt, filled, maxima)
    return Operand(_fake(rows, by_rows(fmt), amax, rng).values.view_as(pieces), scale)


def _as_rows(pieces: Tensor, fmt: NVFP4, filled: Filled, maxima: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each block as a row with its expert's maximum; and the experts' decode scales (E,)."""
    assert maxima is not None  # NVFP4's
    amax = maxima[filled.experts].expand(len(pieces), -1).reshape(-1)
    return pieces.view(-1, 16), amax, ops.tensor_scales(maxima[:-1], fmt)[1]


def _fake(x: Tensor, fmt: Format, amax: Tensor | None, rng: Tensor | Words | None) -> Operand:
    """`fake`, with random words where fmt needs them."""
    if rng is None or isinstance(fmt, MXFP8):
        return fake(x, fmt, amax)
    if x.dtype == MATMUL_DTYPE:
        return Operand(*ops.fake_quantize(x, fmt, unscaled=True, amax=amax, rng=rng))
    return unscaled(Encoded(*ops.quantize_nvfp4(x, fmt, amax=amax, rng=rng)[:3]), fmt)


def _dgrad_weights(saved: list[Tensor | None], layer: LayerRecipe, groups: AmaxGroups) -> Operand:
    """ŵ₂ᵀ (E, K, N): what forward saw where that was saved, as 16×16 blocks are; else wᵀ quantized by itself."""
    fmt, (data, block_scale, tensor_scale) = layer.weights, saved
    assert fmt is not None
    assert data is not None  # saved where x needs a gradient
    if block_scale is not None:
        values, scale = unscaled(Encoded(data, block_scale, tensor_scale), fmt)
        return Operand(values.mT, scale)
    weight = data.detach().mT
    return fake(weight, fmt, weights_amax(weight, fmt, groups, transposed=True), per_matrix=True)


def by_rows(fmt: Format) -> Format:
    """The format whose rows each have a scale."""
    return fmt if isinstance(fmt, MXFP8) else replace(fmt, scaling="row")


def weights_amax(weight: Tensor, fmt: Format, groups: AmaxGroups, *, transposed: bool = False) -> Tensor | None:
    """(E,) or (E, N), reduced over the group; None where the weights' own will do."""
    group = groups.of("weights", fmt, transposed=transposed)
    if group is None or isinstance(fmt, MXFP8):
        return None
    dims = (-1,) if fmt.scaling == "row" else (-2, -1)
    return reduce_amax(weight.detach().abs().amax(dims).float(), group)


def grouped_rows(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """dy (T, N) times each row's expert's weight (E, N, K): (T, K), with a gradient where one is wanted."""
    if dy.dtype == MATMUL_DTYPE and dy.shape[0]:  # torch's takes no matrix without rows
        dx: Tensor = nn.functional.grouped_mm(dy, weight, offs=offsets)
        return _zero_after(dx, offsets)
    dx = dy.new_zeros((dy.shape[0], weight.shape[2]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        dx[start:end] = dy[start:end] @ weight[expert]
        start = end
    return dx


def grouped_sums(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """For each expert dyᵀ·x over its rows: (E, N, K)."""
    if dy.dtype == MATMUL_DTYPE and dy.shape[0]:
        dw: Tensor = nn.functional.grouped_mm(dy.mT, x, offs=offsets)
        return dw
    dw = dy.new_zeros((offsets.shape[0], dy.shape[1], x.shape[1]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        dw[expert] = dy[start:end].mT @ x[start:end]
        start = end
    return dw


def aligned(rows: Tensor) -> Tensor:
    """Rows as torch's grouped matmul takes them: each by itself, a multiple of 16 bytes after the one before."""
    columns = rows.shape[1]
    missing = -columns % 8
    return nn.functional.pad(rows, (0, missing))[:, :columns] if missing else rows.contiguous()


def _zero_after(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows past the last expert's, which the grouped matmul leaves as they were, as zeros."""
    owned = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype) < offsets[-1]
    return torch.where(owned[:, None], rows, 0.0)
