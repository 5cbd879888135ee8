"""GPTQ on the NVFP4 grid.

The columns of a weight are rounded in blocks of sixteen; what rounding a column does to the layer's output is made up
for by moving the columns that are still to come, as well as the inputs' second moments H = E[x xᵀ] allow. A block's
scale is chosen when its turn comes, from the weights as moved by then. The tensor scale is fixed beforehand, so that
the members of a fused layer share it; head-room in it keeps moved weights from saturating.

Source: Frantar et al., GPTQ (2210.17323), with its lazy updates of 128 columns. The scales under their error are
ours: by Σ e² of the sixteen columns, which is what the output loses once later columns have made up for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import FormatError
from ..formats import NVFP4
from ..functional import quantize
from ..ops.gptq import round_block
from ..tensor import QuantizedTensor

BLOCK = 16
LAZY = 128  # columns whose errors reach the rest of the weight in one matmul
MAX_DAMPING = 1.0


@dataclass(frozen=True)
class GPTQ:
    """How GPTQ runs.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean. Where the Hessian is not positive definite
            it is raised tenfold until it is, up to 1; where that does not help, rounding is to nearest. The summary
            tells.
        activation_order: blocks of columns in order of their inputs' power, the largest first, and columns within
            each block as well. Blocks of sixteen stay together, so nothing changes in the format.
        headroom: the tensor scale is that of the group's maximum times this, so that weights moved beyond the maximum
            still fit.
    """

    damping: float = 0.01
    activation_order: bool = True
    headroom: float = 1.25

    def __post_init__(self) -> None:
        if not 0 < self.damping <= MAX_DAMPING:
            raise FormatError(f"damping={self.damping}: choose a share of the Hessian's diagonal, above 0 and up to 1")
        if not 1 <= self.headroom <= 16:
            raise FormatError(f"headroom={self.headroom}: choose a factor from 1 to 16")


@dataclass(frozen=True, eq=False)
class Factor:
    """A Hessian made ready for rounding, shared by all weights with the same input.

    Attributes:
        upper: (K, K) float32 U with UᵀU = (H + damping)⁻¹, columns in `order`.
        order: (K,) the columns in the order in which they are rounded; blocks of sixteen stay together.
        dead: (K,) columns whose input was always zero.
        damping: as it was needed.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight after GPTQ: the result, blocks that saturated, and Σ e², the expected squared error of its output."""

    quantized: QuantizedTensor
    saturated: int
    loss: float


def factorize(hessian: Tensor, options: GPTQ) -> Factor | None:
    """Invert and factorize a Hessian in float64; None where no damping makes it positive definite.

    Raises:
        FormatError: the Hessian is not a square matrix with sides divisible by 16.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape[0] % BLOCK:
        raise FormatError(f"hessian has shape {tuple(hessian.shape)}; needs (K, K) with K divisible by 16")
    if not bool(hessian.isfinite().all()):
        return None
    h = hessian.double()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    order = _order(diagonal, options.activation_order)
    mean = float(diagonal.mean())
    h = h[order][:, order]
    h.diagonal()[dead[order]] = mean if mean > 0 else 1.0
    damping = options.damping
    while damping <= MAX_DAMPING:
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(upper.isfinite().all()):
                return Factor(upper.float(), order, dead, damping)
        damping *= 10
    return None


def _order(diagonal: Tensor, by_activation: bool) -> Tensor:
    columns = torch.arange(len(diagonal), device=diagonal.device).view(-1, BLOCK)
    if not by_activation:
        return columns.flatten()
    power = diagonal.view(-1, BLOCK)
    blocks = power.sum(1).argsort(descending=True, stable=True)
    within = power[blocks].argsort(dim=1, descending=True, stable=True)
    return columns[blocks].gather(1, within).flatten()


def tensor_amax(maximum: Tensor, options: GPTQ) -> Tensor:
    """The amax from which a fused group's tensor scale follows, given the maximum of its weights."""
    return maximum.float() * options.headroom


def gptq(weight: Tensor, factor: Factor, fmt: NVFP4, amax: Tensor, *, impl: ops.Impl = "auto") -> Rounded:
    """Round weight (N, K) so that its output on the calibration data changes as little as possible.

    Args:
        weight: any float dtype. Members of a fused layer, which share amax and input, can be stacked by rows: rows do
            not influence each other.
        factor: of its input's Hessian.
        fmt: with 1×16 blocks and nearest rounding. scale_rule "search" with error "hessian" (or "mse") tries scales
            under GPTQ's own error; the other rules look at the block alone.
        amax: from `tensor_amax`.

    Raises:
        FormatError: fmt has 16×16 blocks, or anything else that GPTQ cannot keep.
    """
    if fmt.block != (1, BLOCK) or fmt.scaling != "tensor" or fmt.hadamard or fmt.rounding != "nearest":
        raise FormatError(f"{fmt}: GPTQ rounds 1×16 blocks to nearest under one tensor scale; leave the rest out")
    decode_scale = ops.tensor_scales(amax, fmt)[1]
    n, k = weight.shape
    w = weight.float()
    w = torch.where(factor.dead, 0.0, w)[:, factor.order]  # [N, K] in the order of rounding
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    scales = torch.empty(n, k // BLOCK, dtype=torch.uint8, device=w.device)
    saturated = torch.zeros((), dtype=torch.int64, device=w.device)  # on the device: reading one each time would wait
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    for first in range(0, k, LAZY):
        last = min(first + LAZY, k)
        batch = w[:, first:last].contiguous()
        errors = torch.empty_like(batch)
        upper = factor.upper[first:last, first:last]
        for start in range(0, last - first, BLOCK):
            end = start + BLOCK
            block = batch[:, start:end]
            scale = _scale(block, fmt, amax, impl)
            found = round_block(block, upper[start:end, start:end], decode_scale, scale, impl=impl)
            codes[:, first + start : first + end], chosen, error = found
            error = error.contiguous()  # a matmul's rounding depends on how its operands lie
            scales[:, (first + start) // BLOCK] = chosen.view(torch.uint8)
            saturated += (block.abs().amax(1) > amax).sum()
            loss += error.square().sum()
            batch[:, end:].addmm_(error, upper[start:end, end:], alpha=-1)
            errors[:, start:end] = error
        w[:, last:].addmm_(errors, factor.upper[first:last, last:], alpha=-1)
    return Rounded(_assemble(codes, scales, factor.order, fmt, amax, decode_scale), int(saturated), float(loss))


def _scale(block: Tensor, fmt: NVFP4, amax: Tensor, impl: ops.Impl) -> Tensor | None:
    """Block scales by a rule that looks at the block alone; None: by the errors that GPTQ makes under each."""
    if fmt.scale_rule == "search" and fmt.error != "mae":
        return None
    return quantize(block.contiguous(), fmt, amax=amax, impl=impl).block_scale[:, 0]


def _assemble(
    codes: Tensor, scales: Tensor, order: Tensor, fmt: NVFP4, amax: Tensor, decode_scale: Tensor
) -> QuantizedTensor:
    """Codes and scales back in the order of columns."""
    place = order.argsort()
    codes = codes[:, place]
    scales = scales[:, order.view(-1, BLOCK)[:, 0].div(BLOCK, rounding_mode="floor").argsort()].contiguous()
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return QuantizedTensor(packed, scales.view(torch.float8_e4m3fn), decode_scale, amax, fmt)


def unstack(q: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    """The members of a stacked group, each with its own rows."""
    parts = zip(q.packed.split(rows), q.block_scale.split(rows), strict=True)
    return [q.replace(packed=packed, block_scale=scale) for packed, scale in parts]
