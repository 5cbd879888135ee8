"""A loaded model's quantized modules, made to multiply as training does: what `load(batch_invariant=True)` needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint.dequantize import read_weight
from .checkpoint.schema import weight_names
from .checkpoint.verify import Contents
from .errors import UnsupportedError
from .formats import MXFP8, NVFP4, Format
from .names import Name
from .served import Input, serve_experts, serve_linear
from .tensor import QuantizedTensor

Activations = Literal["stored", "none", "row"]
PART = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def serve(model: Any, contents: Contents, activations: Activations) -> None:
    """Swap the quantized modules for those of `served`.

    Raises:
        UnsupportedError: a quantized weight is neither a Linear's nor an expert's, or belongs to a second module too,
            or a layer's experts are not all of one format, or a gate and its up have different scales.
    """
    modules = dict(model.named_modules())
    shared: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)].append(name)
    experts: defaultdict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name in contents.quantized:
        module = modules.get(name.module)
        if name.tower == "mtp":
            continue
        if isinstance(module, nn.Linear):
            if len(owners := shared[id(module.weight)]) > 1:
                raise UnsupportedError(f"{' and '.join(owners)} are one tensor, of which only one is quantized")
            fmt = _format(contents, name.module, activations)
            quantize_input = Input(fmt, _amax(contents, [name.module], fmt, activations))
            serve_linear(module, read_weight(contents, name.module, "cpu"), quantize_input)
        elif name.expert is not None and (path := experts_of(name, modules)) is not None:
            experts[path][name.expert, PART.get(name.leaf, name.leaf)] = name.module
        else:
            raise UnsupportedError(
                f"{name.module}: not a Linear of {type(model).__name__}; it cannot be batch-invariant"
            )
    for path, found in experts.items():
        _serve_experts(path, modules[path], found, contents, activations)


def _serve_experts(
    path: str, module: Any, found: dict[tuple[int, str], str], contents: Contents, activations: Activations
) -> None:
    weights: dict[str, QuantizedTensor] = {}
    inputs: dict[str, Input] = {}
    for weight, parts in _PARTS.items():
        names = [found.get((expert, part)) for expert in range(module.num_experts) for part in parts]
        known = [name for name in names if name is not None]
        formats = {_format(contents, name, activations) for name in known}
        kinds = {type(contents.formats[name]) for name in known}
        if len(known) != len(names) or len(formats) > 1 or len(kinds) > 1:
            raise UnsupportedError(f"{path}.{weight}: its experts are not all quantized in one format")
        weights[weight] = _stack([read_weight(contents, name, "cpu") for name in known], len(parts), f"{path}.{weight}")
        fmt = formats.pop()
        inputs[weight] = Input(fmt, _amax(contents, known[:: len(parts)], fmt, activations))
    serve_experts(module, weights, inputs)


def _stack(parts: list[QuantizedTensor], each: int, name: str) -> QuantizedTensor:
    """Weights of experts, `each` of them a matrix of the result, below one another: (E, N, K)."""

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat(tensors[i : i + each]) for i in range(0, len(tensors), each)])

    scale = None
    if all(part.tensor_scale is not None for part in parts):
        scales = torch.stack([part.tensor_scale for part in parts]).view(-1, each)  # type: ignore[misc]
        if not torch.equal(scales, scales[:, :1].expand_as(scales)):
            raise UnsupportedError(f"{name}: gate and up of an expert have different tensor scales")
        scale = scales[:, 0].contiguous()
    packed, block_scale = join([part.packed for part in parts]), join([part.block_scale for part in parts])
    return QuantizedTensor(packed, block_scale, scale, None, parts[0].format)


def _format(contents: Contents, module: str, activations: Activations) -> Format | None:
    """What a module's input is quantized to."""
    fmt = contents.formats[module]
    if activations == "none":
        return None
    if isinstance(fmt, MXFP8):
        return MXFP8()
    return NVFP4(scaling="row") if activations == "row" or contents.quantization.activations else None


def _amax(contents: Contents, modules: list[str], fmt: Format | None, activations: Activations) -> Tensor | None:
    if not isinstance(fmt, NVFP4) or activations == "row":
        return None
    amaxes = torch.stack([static_amax(contents, module) for module in modules])
    return amaxes[0] if len(modules) == 1 else amaxes


def static_amax(contents: Contents, module: str) -> Tensor:
    """The amax, (), whose S_dec is the module's stored input scale."""
    parameters = weight_names(contents.quantization.layout, contents.formats[module])
    scale = contents.checkpoint.read(f"{module}.{parameters.input_scale}").reshape(()).clone()
    amax: Tensor = (1.0 / scale if parameters.divisors else scale) * 2688.0  # 6 · 448
    return amax


def experts_of(name: Name, modules: Mapping[str, nn.Module]) -> str | None:
    """The module that holds a routed expert; transformers ≥ 5 calls block_sparse_moe mlp."""
    path = name.experts_module or ""
    return next((p for p in (path, path.replace(".block_sparse_moe.", ".mlp.")) if p in modules and p), None)
