"""convert(): a model's Linear layers and experts swapped in place for those of a training recipe; revert(): back."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import invariant, names
from ..errors import FormatError
from ..experts import is_experts
from ..formats import NVFP4
from ..names import Name
from ..recipe.training import LayerRecipe, TrainingRecipe
from . import experts
from .linear import Linear, Quantization, misfit, quantization_of
from .operands import AmaxGroups


@dataclass(frozen=True)
class Layer:
    """What became of one module: its recipe, None where it was left alone, and why."""

    name: str
    recipe: LayerRecipe | None
    reason: str


@dataclass(frozen=True)
class Report:
    """What `convert` did."""

    layers: tuple[Layer, ...]

    @property
    def converted(self) -> tuple[Layer, ...]:
        """The modules that compute by a recipe now."""
        return tuple(layer for layer in self.layers if layer.recipe is not None)

    @property
    def left(self) -> tuple[Layer, ...]:
        """The Linear layers and experts that stay as they were."""
        return tuple(layer for layer in self.layers if layer.recipe is None)


def convert(
    model: nn.Module,
    recipe: TrainingRecipe,
    *,
    decoder_layers: int | None = None,
    groups: AmaxGroups | None = None,
) -> Report:
    """Swap what the recipe's policy selects: modules keep their identity, parameters, hooks and state_dict.

    Plan, validate, apply: nothing is changed where anything raises.

    Args:
        model: any module. Experts are converted where transformers has them as stacked parameters.
        recipe: what to do. Its seed, with each module's name, gives the random words of that module's gradients: give
            each data-parallel rank another seed, and all ranks of a tensor-parallel group the same one.
        decoder_layers: by default model.config's num_hidden_layers, else the highest layer's index plus one.
        groups: process groups over which maxima are reduced, by default none.

    Raises:
        FormatError: model or recipe is something else, nothing is selected, a pattern matches nothing, or a module is
            converted already.
        UnsupportedError: the recipe is batch-invariant, and the model cannot be.
    """
    if not isinstance(recipe, TrainingRecipe):
        raise FormatError(f"recipe={recipe!r}: needs a TrainingRecipe")
    if not isinstance(model, nn.Module):
        raise FormatError(f"model is {type(model).__name__}; needs a torch.nn.Module")
    found = {name: module for name, module in model.named_modules() if _is_candidate(module)}
    if done := [name for name, module in found.items() if hasattr(module, "quantization")]:
        raise FormatError(f"{done[0]}: converted already; call revert(model) first")
    layers = decoder_layers or _decoder_layers(model, found)
    weights = [weight for name, module in found.items() for weight in _weights(name, module, layers)]
    if unmatched := recipe.policy.unmatched(weights):
        raise FormatError(f"{', '.join(unmatched)}: matches no layer of this model; correct or remove it")
    plan = {name: _plan(name, module, recipe, layers) for name, module in found.items()}
    chosen = {name: layer.recipe for name, layer in plan.items() if layer.recipe is not None}
    if not chosen:
        reasons = sorted({layer.reason for layer in plan.values()})
        raise FormatError(f"nothing to convert: {'; '.join(reasons) or 'the model has no Linear layer'}")
    if recipe.batch_invariant:
        invariant.enable(model)
    partners = _partners(found, chosen) if recipe.share_fused_scales else {}
    for name, layer in chosen.items():
        module = found[name]
        device = next(module.parameters()).device
        quantization = quantization_of(layer, _seeded(recipe, name), device, groups)
        quantization.partners = partners.get(name, ())
        if isinstance(module, nn.Linear):
            module.__class__ = Linear
        module.quantization = quantization
    experts.enable([found[name] for name in chosen if not isinstance(found[name], nn.Linear)])
    return Report(tuple(plan.values()))


def revert(model: nn.Module) -> int:
    """Undo `convert`: the same modules as before, with the parameters that they have now. Returns how many.

    Raises:
        FormatError: nothing in the model is converted.
    """
    found = [module for module in model.modules() if isinstance(module.__dict__.get("quantization"), Quantization)]
    if not found:
        raise FormatError("nothing to revert: convert(model, recipe) converted nothing here")
    experts.disable([module for module in found if not isinstance(module, nn.Linear)])
    for module in found:
        del module.quantization
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    invariant.disable(model)
    return len(found)


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_experts(module)


def _weights(name: str, module: nn.Module, layers: int) -> Iterator[Name]:
    """What the policy decides on: a Linear's weight, or those that a checkpoint has for each expert."""
    if isinstance(module, nn.Linear):
        yield names.parse(f"{name}.weight", layers)
        return
    for expert in range(module.num_experts):  # type: ignore[arg-type]
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield names.parse(f"{name}.{expert}.{part}.weight", layers)


def _plan(full: str, module: nn.Module, recipe: TrainingRecipe, layers: int) -> Layer:
    is_linear = isinstance(module, nn.Linear)
    if is_linear and type(module) is not nn.Linear:
        return Layer(full, None, f"a {type(module).__name__}, which may compute something else than torch's Linear")
    if "forward" in module.__dict__:
        return Layer(full, None, "something has replaced its forward")
    if not is_linear and (reason := experts.unsupported(module)):
        return Layer(full, None, reason)
    decided = []
    for name in _weights(full, module, layers):
        decision = recipe.policy.decide(name, layers)
        layer = recipe.layer(name) if decision.quantize else None
        reason = decision.reason if layer or not decision.quantize else "an override leaves it in high precision"
        decided.append((layer, reason))
    if any(layer != decided[0][0] for layer, _ in decided):
        raise FormatError(
            f"{full}: its experts are computed together, but the recipe tells them apart; select all or none"
        )
    layer, reason = decided[0]
    if layer is None:
        return Layer(full, None, reason)
    for weight in module.parameters(recurse=False):
        if weight.dim() >= 2 and (unfit := misfit(weight, layer)):
            return Layer(full, None, unfit)
    return Layer(full, layer, reason)


def _partners(found: dict[str, nn.Module], chosen: dict[str, LayerRecipe]) -> dict[str, tuple[nn.Module, ...]]:
    """For each module of a group that engines fuse, all of them; a tensor scale can be shared where formats are one."""
    groups: defaultdict[tuple[str, Any], list[str]] = defaultdict(list)
    for name, layer in chosen.items():
        fused = names.parse(f"{name}.weight").fused
        tensor_scaled = isinstance(layer.weights, NVFP4) and layer.weights.scaling == "tensor"
        if fused is not None and tensor_scaled and isinstance(found[name], nn.Linear):
            groups[fused, layer.weights].append(name)
    return {
        name: tuple(found[member] for member in members)
        for members in groups.values()
        for name in members
        if len(members) > 1
    }


def _seeded(recipe: TrainingRecipe, name: str) -> TrainingRecipe:
    """The recipe with a seed of the module's own."""
    digest = hashlib.sha256(f"{recipe.seed} {name}".encode()).digest()
    values = {**recipe.__dict__, "seed": int.from_bytes(digest[:8], "little")}
    return TrainingRecipe(**values)


def _decoder_layers(model: nn.Module, found: dict[str, nn.Module]) -> int:
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(count := getattr(part, "num_hidden_layers", None), int):
            return count
    indexes = [name.layer for full in found if (name := names.parse(f"{full}.weight")).layer is not None]
    return max((index for index in indexes if index is not None), default=-1) + 1
