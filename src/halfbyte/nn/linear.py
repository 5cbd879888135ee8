"""Linear: torch's, computing with quantized operands."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import ShapeError, UnsupportedError
from ..formats import NVFP4
from ..ops.gradient import new_state
from ..recipe.training import LayerRecipe, TrainingRecipe
from .autograd import QuantizedLinear, Weight, quantize_weight
from .operands import AmaxGroups, autocasted, local_amax, reduce_amax
from .statistics import Statistics


@dataclass
class Quantization:
    """What a converted module knows beside its parameters.

    Attributes:
        layer: what it quantizes, and how.
        reuse: keep the quantized weight until the parameter changes.
        main_grad: add the weight's gradient to `weight.main_grad`.
        groups: process groups over which maxima are reduced.
        state: random words of its gradients, which every backward pass advances; see `ops.gradient`.
        partners: modules whose weights, with its own, share one tensor scale; itself among them. Empty: its own.
        statistics: what is counted in its forward pass, if anything.
        kept: of `reuse`: the parameters that a quantized weight depends on, their versions, and that weight.
        config: of transformers' experts: the one that they had.
    """

    layer: LayerRecipe
    reuse: bool = False
    main_grad: bool = False
    groups: AmaxGroups = AmaxGroups()  # noqa: RUF009  frozen
    state: Tensor = field(default_factory=lambda: new_state(0))
    partners: tuple[nn.Module, ...] = ()
    statistics: Statistics | None = None
    kept: tuple[tuple[Tensor, ...], tuple[int, ...], Weight] | None = None
    config: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Attributes for copies and pickle: a copied parameter counts its versions anew."""
        return {**self.__dict__, "kept": None}

    def state_on(self, device: torch.device) -> Tensor:
        """The state, moved to where gradients are computed; a traced graph, which could not advance it then, takes it
        where it is.
        """
        if self.state.device != device and device.type != "meta" and not torch.compiler.is_compiling():
            with torch.inference_mode(False):  # a backward pass advances what an evaluation moved
                self.state = self.state.to(device)
        return self.state


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same parameters and state_dict, whose matmuls are those of a training recipe.

    Args:
        in_features, out_features, bias, device, dtype: as torch's.
        recipe: the layer's recipe; of a `TrainingRecipe` policy and overrides are left to `convert`.

    Raises:
        ShapeError: a side does not fit the recipe's blocks.

    Numerics: `docs/training.md`. The weight is quantized from the parameter's own dtype, also under autocast, which
    decides the dtype of x and y. N-D inputs are matrices of tokens; a tensor-scaled input has one scale for all.
    """

    quantization: Quantization

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        recipe: LayerRecipe | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        recipe = recipe or TrainingRecipe()
        if reason := misfit(self.weight, recipe):
            raise ShapeError(f"Linear({in_features}, {out_features}): {reason}")
        self.quantization = quantization_of(recipe, recipe, self.weight.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "quantization" in self.__dict__:
            self.quantization.kept = None  # FSDP puts in another parameter, whose version says nothing about its data
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        q = self.quantization
        if not self.training and q.layer.evaluation == "high_precision":
            return nn.functional.linear(x, self.weight, self.bias)
        x = autocasted(x)
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; this layer takes (…, {self.in_features})")
        if hasattr(self.weight, "to_local"):
            raise UnsupportedError(
                "the weight is a DTensor, no plain tensor: call the module that fully_shard wrapped, not its layers; "
                "for tensor parallelism shard the weight yourself and give AmaxGroups to convert"
            )
        weight = self.quantized_weight()
        main_grad = main_grad_of(self.weight) if q.main_grad and torch.is_grad_enabled() else None
        if q.statistics is not None and q.statistics.enabled:
            q.statistics.count(x, self.weight, q.layer, weight.amax)
        encoded = (None, None) if weight.encoded is None else weight.encoded[:2]
        y = QuantizedLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features), self.weight, self.bias, *weight.operand, *encoded, weight.amax, main_grad,
            q.state_on(x.device), q.layer, q.groups,
        )  # fmt: skip
        result: Tensor = y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)
        return result

    def quantized_weight(self) -> Weight:
        """The weight as the forward pass multiplies it; the kept one where `reuse` has one that still holds."""
        q = self.quantization
        if not q.reuse or torch.compiler.is_compiling():  # a graph cannot look at versions
            return self._quantize_weight()
        _count_steps()
        weights: tuple[Tensor, ...] = tuple(module.weight for module in q.partners or (self,))  # type: ignore[misc]
        versions = Steps.taken, *(weight._version for weight in weights)
        if q.kept is None or q.kept[1] != versions or any(a is not b for a, b in zip(q.kept[0], weights, strict=True)):
            with torch.inference_mode(False):  # a training step saves what an evaluation kept
                q.kept = weights, versions, self._quantize_weight()
        return q.kept[2]

    @torch.no_grad()
    def _quantize_weight(self) -> Weight:
        return quantize_weight(self.weight.detach(), self.quantization.layer, weight_amax(self))

    def extra_repr(self) -> str:
        """As torch's, and the recipe."""
        return f"{super().extra_repr()}, {self.quantization.layer}"


class Steps:
    """How many steps optimizers have taken: fused ones write weights and leave their versions alone."""

    taken = 0


@functools.cache
def _count_steps() -> None:
    """Begin to count, once."""

    def count(*_: object) -> None:
        Steps.taken += 1

    register_optimizer_step_post_hook(count)


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Where a weight's gradient is added up; None where it needs none.

    Raises:
        ShapeError: it is missing, or not float32 of the weight's shape.
    """
    if not weight.requires_grad:
        return None
    main_grad = getattr(weight, "main_grad", None)
    if not isinstance(main_grad, Tensor) or main_grad.dtype != torch.float32 or main_grad.shape != weight.shape:
        kind = f"{main_grad.dtype} {tuple(main_grad.shape)}" if isinstance(main_grad, Tensor) else repr(main_grad)
        raise ShapeError(
            f"weight.main_grad is {kind}; main_grad=True needs float32 {tuple(weight.shape)}: set "
            "weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)"
        )
    return main_grad


def quantization_of(
    layer: LayerRecipe, recipe: LayerRecipe, device: torch.device, groups: AmaxGroups | None = None
) -> Quantization:
    """A module's, for its layer's recipe and the model's; device: where its weight is."""
    q = Quantization(layer.to_layer(), groups=groups or AmaxGroups())
    seed = 0
    if isinstance(recipe, TrainingRecipe):
        q.reuse, q.main_grad, seed = recipe.reuse_weights, recipe.main_grad, recipe.seed
    q.state = new_state(seed, "cpu" if device.type == "meta" else device)
    return q


def weight_amax(module: nn.Module) -> Tensor | None:
    """The maximum that a module's weight is quantized with; None where it is the weight's own."""
    q: Quantization = module.quantization  # type: ignore[assignment]
    fmt = q.layer.weights
    group = q.groups.of("weights", fmt)
    if not isinstance(fmt, NVFP4) or (group is None and len(q.partners) < 2):
        return None
    weights: list[Tensor] = [partner.weight.detach() for partner in q.partners or (module,)]  # type: ignore[operator]
    if any(hasattr(weight, "to_local") for weight in weights):
        raise UnsupportedError(
            "a partner of this layer (q/k/v, gate/up) is sharded apart from it, so their shared scale cannot be had: "
            "give fully_shard a module that holds them all, or use share_fused_scales=False"
        )
    maxima = [local_amax(weight, fmt) for weight in weights]
    amax = maxima[0] if len(maxima) == 1 else torch.stack(maxima).amax(0)
    return amax if group is None else reduce_amax(amax, group)


def misfit(weight: Tensor, layer: LayerRecipe) -> str | None:
    """Why a weight (…, N, K) cannot be quantized by a recipe, or None."""
    rows, columns = weight.shape[-2:]
    formats = [fmt for fmt in (layer.activations, layer.weights) if fmt is not None]
    block = max(fmt.block_columns for fmt in formats)
    if columns % block:
        return f"in_features={columns} is not divisible by {block}"
    if layer.backward == "quantized":
        formats = [fmt for fmt in (layer.gradients, layer.weights) if fmt is not None]
        block = max(fmt.block_columns for fmt in formats)
        if rows % block:
            return f"out_features={rows} is not divisible by {block}, which dgrad needs"
    return None
