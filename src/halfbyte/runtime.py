"""load(): a runnable transformers model from a quantized checkpoint, on any machine; save_quantized(): the way back."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import invariant, names, serving
from .checkpoint.convert import Report, convert
from .checkpoint.dequantize import decode
from .checkpoint.options import Options
from .checkpoint.plan import decoder_layers
from .checkpoint.schema import SCALE_PARAMETERS
from .checkpoint.shards import copy_companions
from .checkpoint.verify import Contents, open_quantized
from .errors import CheckpointError, HalfbyteError, UnsupportedError
from .formats import MXFP8, NVFP4
from .functional import fake_quantize, quantize
from .ops import FLOAT_DTYPES
from .serving import PART, Activations, experts_of, static_amax

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(weight|bias)$")
_EXPERTS_FUNCTION = "halfbyte_quantized_inputs"
FakeQuantize = Callable[[Tensor], Tensor]
_UNCHANGED: Mapping[tuple[int, str], FakeQuantize] = defaultdict(lambda: lambda x: x)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    activations: Activations = "stored",
    batch_invariant: bool = False,
) -> nn.Module:
    """A transformers model that computes with the checkpoint's quantized weights.

    The weights are decoded once to dtype, so that any machine can run them, dense or MoE, in both layouts. Where an
    engine would quantize activations (NVFP4 W4A4, and always MXFP8), the inputs of quantized Linears are quantized
    and decoded on the fly, so that the model computes what the engine does. An FP8 KV cache is not imitated.

    Args:
        path: a directory that `halfbyte convert` wrote, or one like it.
        dtype: what weights decode to, and what the model computes in.
        device: where the model goes.
        activations: "stored": as the checkpoint says. "none": inputs stay as they are, to see what the weights alone
            cost. "row": inputs of quantized layers are row-scaled, each token by itself, as engines do that compute
            activation scales as they go; MXFP8 as ever.
        batch_invariant: what is computed for a token depends on its sequence up to it alone, bit for bit: decoding
            token by token, in any batch, is one forward pass over the sequence, and is what a trainer with the same
            `TrainingRecipe(batch_invariant=True)` computes. Quantized weights are then QuantizedTensors, whose bytes
            a weight sync may write to; q·s is kept beside them in bfloat16. See `docs/rl.md`.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete for its architecture, or of an unknown kind.
        UnsupportedError: transformers is not installed, or has no place to quantize a layer's activations; device is
            not here; or the model cannot be batch-invariant.
    """
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype={dtype}: choose torch.bfloat16, torch.float16 or torch.float32")
    if activations not in ("stored", "none", "row"):
        raise CheckpointError(f"activations={activations!r}: choose 'stored', 'none' or 'row'")
    _check_device(device)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UnsupportedError("loading a model needs transformers: pip install 'halfbyte[hf]'") from error
    contents = open_quantized(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # else it asks, and waits
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=False
            )
        state = stack_experts(_decoded(contents, dtype), set(skeleton.state_dict()))
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except HalfbyteError:
        raise
    except (ValueError, RuntimeError) as error:  # no such causal language model, or other shapes than the config's
        raise CheckpointError(f"{path}: transformers cannot build it: {str(error).splitlines()[0]}") from error
    problems = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: {problems}")
    if batch_invariant:
        serving.serve(model, contents, activations)
    elif activations != "none":
        _quantize_inputs(model, contents, activations == "row")
    runnable: nn.Module = model.to(device).eval()
    if batch_invariant:
        invariant.enable(runnable)
    return runnable


def _check_device(device: torch.device | str) -> None:
    """Before anything is read."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UnsupportedError(f"device={device!r}: not a device; such as 'cpu' or 'cuda:0'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device={str(device)!r}: no CUDA GPU is usable here; use device='cpu'")


def save_quantized(
    model: nn.Module,
    source: str | Path,
    output: str | Path,
    options: Options,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Write a trained transformers model as a quantized checkpoint, by the same writer as `halfbyte convert`.

    The weights are those of the model's parameters, quantized once: with `TrainingRecipe.options()`, and parameters of
    the dtype that is written, the bytes that training computed with.

    Args:
        model: a transformers model, converted by `halfbyte.nn.convert` or not; it stays as it is.
        source: the directory that it was loaded from: its tokenizer and whatever else is beside the weights is copied.
        output: a new directory.
        options: what to write, such as `recipe.options("compressed-tensors")`.
        dtype: what parameters are cast to first; their own by default.
        device: where weights are quantized.

    Raises:
        CheckpointError: as `checkpoint.convert`; also where model cannot be saved, or source is no directory.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such directory; give the one that the model was loaded from")
    if not hasattr(model, "save_pretrained"):
        raise CheckpointError(f"{type(model).__name__}: has no save_pretrained; export takes a transformers model")
    saved: Any = model
    with tempfile.TemporaryDirectory(prefix="halfbyte-export-", dir=output.absolute().parent) as temporary:
        state = {name: tensor.detach() for name, tensor in saved.state_dict().items()}
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        saved.save_pretrained(temporary, state_dict=state)
        copy_companions(source, Path(temporary))
        return convert(Path(temporary), output, options, device=device)


def stack_experts(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Per-expert weights as the stacked parameters that a transformers ≥ 5 model has; others unchanged."""
    experts: defaultdict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    stacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _EXPERT.match(name)
        bias = "_bias" if found and found[4] == "bias" else ""
        if found and f"{found[1]}.gate_up_proj{bias}" in wanted:
            experts[found[1]][int(found[2])][PART.get(found[3], found[3]) + bias] = tensor
        else:
            stacked[name] = tensor
    for module, by_index in experts.items():
        ordered = [by_index[i] for i in sorted(by_index)]
        biased = f"{module}.gate_up_proj_bias" in wanted  # as gpt-oss's are: rows of gate and up alternate, transposed
        try:
            for bias in ("", "_bias") if biased else ("",):
                pairs = [(parts[f"gate_proj{bias}"], parts[f"up_proj{bias}"]) for parts in ordered]
                gate_up = [torch.stack(pair, 1).flatten(0, 1) if biased else torch.cat(pair) for pair in pairs]
                down = [parts[f"down_proj{bias}"] for parts in ordered]
                for part, tensors in (("gate_up_proj", gate_up), ("down_proj", down)):
                    whole = torch.stack(tensors)
                    stacked[f"{module}.{part}{bias}"] = whole.mT.contiguous() if biased and not bias else whole
        except KeyError as error:
            raise CheckpointError(f"{module}: an expert lacks its {error.args[0]}") from error
    return stacked


def _decoded(contents: Contents, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors under their high-precision names; floats in dtype."""
    state: dict[str, Tensor] = {}
    layers = decoder_layers(contents.checkpoint)
    for tensor in contents.checkpoint.tensors:
        if names.parse(tensor, layers).tower == "mtp":  # transformers runs models without
            continue
        module, _, parameter = tensor.rpartition(".")
        if contents.holds_elements(tensor):
            state[f"{module}.weight"] = decode(contents, module, dtype, "cpu")
        elif parameter not in SCALE_PARAMETERS:
            data = contents.checkpoint.read(tensor)
            state[tensor] = data.to(dtype) if data.is_floating_point() else data
    return state


def _quantize_inputs(model: Any, contents: Contents, by_row: bool) -> None:
    """Make every quantized Linear see its input as an engine with 4-bit or 8-bit activations does."""
    modules = dict(model.named_modules())
    experts: defaultdict[str, dict[tuple[int, str], FakeQuantize]] = defaultdict(dict)
    for name in contents.quantized:
        dynamic = isinstance(contents.formats[name.module], MXFP8)
        if name.tower == "mtp" or not (dynamic or by_row or contents.quantization.activations):
            continue
        quantizer = _input_quantizer(contents, name.module, by_row)
        if isinstance(modules.get(name.module), nn.Linear):
            modules[name.module].register_forward_pre_hook(partial(_quantize_linear_input, quantizer))
        elif name.expert is not None and (module := experts_of(name, modules)) is not None:
            experts[module][name.expert, PART.get(name.leaf, name.leaf)] = quantizer
        else:
            raise UnsupportedError(
                f"{name.module}: not a Linear of {type(model).__name__}, so its quantized activations cannot be "
                "imitated; convert with --activations none to load it"
            )
    if experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_FUNCTION, _quantized_experts)
        model.set_experts_implementation(_EXPERTS_FUNCTION)
        for module, quantizers in experts.items():
            modules[module].halfbyte_inputs = quantizers


def _input_quantizer(contents: Contents, module: str, by_row: bool) -> FakeQuantize:
    """x → the decoded values of its quantization: for NVFP4 by row or under a static scale, dynamically for MXFP8."""
    fmt = contents.formats[module]
    if isinstance(fmt, MXFP8):
        return lambda x: quantize(x, fmt).dequantize(x.dtype)
    if by_row:
        return lambda x: fake_quantize(x, NVFP4(scaling="row"))
    amax = static_amax(contents, module)
    return lambda x: quantize(x, fmt, amax=amax.to(x.device)).dequantize(x.dtype)


def _quantize_linear_input(quantizer: FakeQuantize, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])


def _quantized_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts forward, one expert after the other, with both inputs of each quantized."""
    if not self.has_gate or self.has_bias or self.is_transposed or not self.is_concatenated:
        raise UnsupportedError(f"{type(self).__name__}: only gated experts [E, 2I, H] without biases are imitated")
    out = torch.zeros_like(hidden_states)
    inputs = getattr(self, "halfbyte_inputs", _UNCHANGED)  # a layer's experts may have stayed in high precision
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:  # the mark of a token that another rank serves
            continue
        token, position = torch.where(top_k_index == expert)
        x = inputs[expert, "gate_proj"](hidden_states[token])
        x = self._apply_gate(nn.functional.linear(x, self.gate_up_proj[expert]))
        x = inputs[expert, "down_proj"](x)
        x = nn.functional.linear(x, self.down_proj[expert]) * top_k_weights[token, position, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out
