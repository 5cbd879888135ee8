"""A decoder without its weights, and one layer of it at a time with them."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.plan import Plan, Planned, decoder_layers
from ..checkpoint.shards import Checkpoint
from ..errors import CheckpointError, UnsupportedError
from .experts import EXPERTS

_LAYERS = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks))\.(\d+)\.(.+)$")
_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
Read = Callable[[str], Tensor | None]


@dataclass(frozen=True, eq=False)
class Decoder:
    """transformers' model of a checkpoint.

    Attributes:
        model: all of it; parameters are on the meta device but for those that were filled.
        body: the module that holds the layers, and calls them in turn.
        layers: the decoder layers.
        items: for each layer, the checkpoint's tensors by their names in the layer.
    """

    model: Any
    body: nn.Module
    layers: nn.ModuleList
    items: tuple[dict[str, Planned], ...]


def open_decoder(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, device: torch.device | str, layers_path: str | None = None
) -> Decoder:
    """Build a checkpoint's model, with nothing but its embeddings and other small parts in memory.

    Raises:
        CheckpointError: transformers does not know the architecture, or where its layers are is not clear.
        UnsupportedError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError as error:
        raise UnsupportedError("calibration runs models with transformers: pip install 'halfbyte[hf]'") from error
    where = checkpoint.directory
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)  # else it asks, and waits
        causal: Any = AutoModelForCausalLM
        if type(config) not in causal._model_mapping and type(config) in AutoModelForImageTextToText._model_mapping:
            causal = AutoModelForImageTextToText  # of which the language model alone will run
        with _weightless():
            model: Any = causal.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{where}: transformers cannot build {checkpoint.config.get('model_type')!r} as a causal language model "
            f"({str(error).splitlines()[0]}); calibration needs an architecture that it knows"
        ) from error
    model.eval()
    if hasattr(config, "_experts_implementation"):
        model.set_experts_implementation(EXPERTS)
    path = _layers_path(model, decoder_layers(checkpoint), layers_path, where)
    layers = model.get_submodule(path)
    body = model.get_submodule(path.rpartition(".")[0])
    prefix, items = _by_layer(plan, len(layers), where)
    decoder = Decoder(model, body, layers, items)
    outer = prefix.rpartition(".")[0]
    everything = {item.name.full: item for item in plan}

    def read(name: str) -> Tensor | None:
        item = everything.get(f"{outer}.{name}" if outer else name)
        return None if item is None else checkpoint.read(item.source, item.index)

    own = path.rpartition(".")[2]
    for name, child in body.named_children():
        if name != own:
            fill(child, name, read, device, dtype, where)
    for name in [*body._parameters, *body._buffers]:
        raise CheckpointError(f"{where}: {type(body).__name__} has {name} beside its layers, which is not understood")
    return decoder


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Modules built meanwhile have parameters on the meta device, one after the other; buffers are real."""
    module_class: Any = nn.Module
    register = module_class.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        register(module, name, parameter)

    module_class.register_parameter = without_memory
    try:
        yield
    finally:
        module_class.register_parameter = register


def _layers_path(model: nn.Module, count: int, wanted: str | None, where: object) -> str:
    """Where the decoder layers are in transformers' model: the one list of as many modules as the config has layers."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [
        f"{name} ({size})" for name, size in lists.items() if not any(part.isdigit() for part in name.split("."))
    ]
    listed = f"its lists of modules are {', '.join(outermost)}" if outermost else "it has no list of modules"
    what = type(model).__name__
    if wanted is not None:
        if lists.get(wanted) != count:
            raise CheckpointError(f"{where}: --layers-path {wanted}: not {count} layers of {what}; {listed}")
        return wanted
    leaves = ("layers", "h", "blocks")
    found: list[str] = [name for name, size in lists.items() if size == count and name.rpartition(".")[2] in leaves]
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: which modules of {what} are its {count} decoder layers is not clear; say so with --layers-path, "
            f"such as --layers-path model.layers; {listed}"
        )
    return found[0]


def _by_layer(plan: Plan, count: int, where: object) -> tuple[str, tuple[dict[str, Planned], ...]]:
    prefixes: defaultdict[str, list[dict[str, Planned]]] = defaultdict(lambda: [{} for _ in range(count)])
    for item in plan:
        found = _LAYERS.match(item.name.full)
        if found and item.name.tower == "decoder" and int(found[2]) < count:
            prefixes[found[1]][int(found[2])][local_name(found[3])] = item
    if len(prefixes) != 1:
        raise CheckpointError(f"{where}: decoder layers under {', '.join(prefixes) or 'no name'}; expected one place")
    ((prefix, items),) = prefixes.items()
    return prefix, tuple(items)


def local_name(name: str) -> str:
    """A tensor's name in its layer, as transformers ≥ 5 spells it."""
    parts = name.replace("block_sparse_moe.", "mlp.").split(".")
    return ".".join(_LEAVES.get(part, part) if "experts" in parts else part for part in parts)


def fill(
    module: nn.Module, name: str, read: Read, device: torch.device | str, dtype: torch.dtype, where: object
) -> None:
    """Give a module its parameters and buffers.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    for key, empty in module.state_dict(keep_vars=True).items():
        data = read(f"{name}.{key}")
        if data is None and isinstance(empty, Tensor) and not empty.is_meta:
            continue  # a buffer that the model makes by itself
        if data is None or data.shape != empty.shape:
            found = "is not in the checkpoint" if data is None else f"has shape {list(data.shape)} there"
            raise CheckpointError(f"{where}: {name}.{key} of shape {list(empty.shape)} {found}; transformers needs it")
        owner, leaf = _owner(module, key)
        data = data.to(device, dtype if data.is_floating_point() else data.dtype, copy=True)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(data, requires_grad=False)
        else:
            owner._buffers[leaf] = data
    module.to(device)


def empty(module: nn.Module) -> None:
    """Let go of a module's parameters."""
    for key, parameter in list(module.named_parameters()):
        owner, leaf = _owner(module, key)
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _owner(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, leaf = key.rpartition(".")
    return module.get_submodule(path), leaf


def layer_reader(checkpoint: Checkpoint, items: dict[str, Planned], layer: nn.Module) -> Read:
    """Reads a layer's tensors, fused experts from their parts."""
    shapes = {key: tensor.shape for key, tensor in layer.state_dict(keep_vars=True).items()}

    def one(name: str) -> Tensor | None:
        item = items.get(name)
        return None if item is None else checkpoint.read(item.source, item.index)

    def read(key: str) -> Tensor | None:
        name = key.partition(".")[2]  # `fill` puts a name in front
        path, _, leaf = name.rpartition(".")
        if name in items or leaf not in ("gate_up_proj", "down_proj"):
            return one(name)
        experts = []
        for expert in range(shapes[name][0]):
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            parts = [one(f"{path}.{expert}.{part}.weight") for part in leaves]
            if any(part is None for part in parts):
                return None
            experts.append(torch.cat([part for part in parts if part is not None]))
        return torch.stack(experts)

    return read


@torch.no_grad()
def set_weight(layer: nn.Module, name: str, data: Tensor) -> None:
    """Replace a weight, by its name in the layer; experts may be fused there."""
    found = dict(layer.named_parameters())
    if name in found:
        found[name].copy_(data)
        return
    path, expert, leaf, _ = name.rsplit(".", 3)
    if leaf == "down_proj":
        found[f"{path}.down_proj"][int(expert)].copy_(data)
        return
    both = found[f"{path}.gate_up_proj"][int(expert)]
    both.unflatten(0, (2, -1))[0 if leaf == "gate_proj" else 1].copy_(data)
