"""Checkpoints as other tools have got them wrong, made from good ones: the corpus of test_loaders.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte import MXFP8
from halfbyte.policy import FormatOverride, Policy

from . import models

L0 = "model.layers.0"
EXPERT = f"{L0}.mlp.experts.1"
Edit = Callable[[Path], None]
W4A4 = {"activations": "constant"}
CT = {"layout": "compressed-tensors"}
SOURCES = {
    "dense": lambda: models.dense(layers=11),
    "moe": models.moe,
    "tied": lambda: models.dense(layers=1, tied=True),
}


def config(**values: Any) -> Edit:
    """Change config.json's quantization_config; None removes a key."""

    def edit(path: Path) -> None:
        data = json.loads((path / "config.json").read_text())
        merged = {**data["quantization_config"], **values}
        data["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
        (path / "config.json").write_text(json.dumps(data))

    return edit


def both(*edits: Edit) -> Edit:
    return lambda path: [edit(path) for edit in edits] and None


def sidecar(**values: Any) -> Edit:
    def edit(path: Path) -> None:
        data = json.loads((path / "hf_quant_config.json").read_text())
        merged = {**data["quantization"], **values}
        data["quantization"] = {key: value for key, value in merged.items() if value is not None}
        (path / "hf_quant_config.json").write_text(json.dumps(data))

    return edit


def null_list(path: Path) -> None:
    data = json.loads((path / "config.json").read_text())
    data["quantization_config"]["ignore"] = None
    (path / "config.json").write_text(json.dumps(data))


def without_declaration(path: Path) -> None:
    data = json.loads((path / "config.json").read_text())
    del data["quantization_config"]
    (path / "config.json").write_text(json.dumps(data))


def in_config(**values: Any) -> Edit:
    """Change config.json outside of quantization_config."""

    def edit(path: Path) -> None:
        data = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(data | values))

    return edit


def ignoring(*patterns: str) -> Edit:
    """The same ignore list in both files."""

    def edit(path: Path) -> None:
        config(ignore=list(patterns))(path)
        if (path / "hf_quant_config.json").exists():
            sidecar(exclude_modules=list(patterns))(path)

    return edit


def mxfp8_layout(**values: Any) -> Edit:
    """ModelOpt's MXFP8 under the names of quant_method "mxfp8"; None removes a key."""
    declared = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}
    declared |= {"modules_to_not_convert": ["lm_head"], **values}

    def edit(path: Path) -> None:
        tensors(lambda found: {n.replace("weight_scale", "weight_scale_inv"): x for n, x in found.items()})(path)
        in_config(quantization_config={k: v for k, v in declared.items() if v is not None})(path)
        (path / "hf_quant_config.json").unlink()

    return edit


def tensors(change: Callable[[models.Tensors], models.Tensors]) -> Edit:
    def edit(path: Path) -> None:
        found = {name: tensor.clone() for name, tensor in models.read_all(path).items()}
        for file in path.glob("*.safetensors*"):
            file.unlink()
        save_file(change(found), path / "model.safetensors", metadata={"format": "pt"})

    return edit


def times(name: str, factor: float) -> Edit:
    return tensors(lambda found: found | {name: found[name] * factor})


def without(*names: str) -> Edit:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if name not in names})


def stacked_bf16(found: models.Tensors) -> models.Tensors:
    """A converter that knows 2-D weights only leaves stacked experts as they are."""
    kept = {name: tensor for name, tensor in found.items() if ".experts." not in name}
    for layer in range(2):
        kept[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    return kept


def fp8_blocks(found: models.Tensors) -> models.Tensors:
    """FP8 128×128 passed through, under the label that the rest deserves."""
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(f"{L0}.self_attn.o_proj.")}
    kept[f"{L0}.self_attn.o_proj.weight"] = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    return kept | {f"{L0}.self_attn.o_proj.weight_scale_inv": torch.ones(1, 1)}


def plain_expert(found: models.Tensors) -> models.Tensors:
    """One expert left in high precision."""
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(f"{EXPERT}.")}
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    return kept | {
        f"{EXPERT}.{leaf}.weight": torch.zeros(shape, dtype=torch.bfloat16) for leaf, shape in shapes.items()
    }


def plain_down(found: models.Tensors) -> models.Tensors:
    """One weight left in high precision."""
    name = f"{L0}.mlp.down_proj"
    kept = {key: tensor for key, tensor in found.items() if not key.startswith(f"{name}.")}
    return kept | {f"{name}.weight": torch.zeros(64, 96, dtype=torch.bfloat16)}


def small_scales(found: models.Tensors) -> models.Tensors:
    """None above 2^-8, as of a part whose fused partner is much larger."""
    name = f"{L0}.mlp.down_proj.weight_scale"
    return found | {name: torch.full(found[name].shape, 2.0**-8).to(torch.float8_e4m3fn)}


def with_tower(tower: str) -> Edit:
    """An image encoder in high precision that no list names."""
    extra = {f"{tower}.blocks.0.attn.proj.weight": torch.zeros(32, 32, dtype=torch.bfloat16)}
    return tensors(lambda found: found | extra)


def nan_scales(found: models.Tensors) -> models.Tensors:
    """An all-zero weight's block scales, 0/0."""
    name = f"{L0}.mlp.down_proj.weight_scale"
    return found | {name: torch.full_like(found[name].view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)}


def spread_scales(found: models.Tensors) -> models.Tensors:
    """448 once, and 2^-8 everywhere else."""
    name = f"{L0}.mlp.down_proj.weight_scale"
    scale = torch.full(found[name].shape, 2.0**-8)
    scale[0, 0] = 448
    return found | {name: scale.to(torch.float8_e4m3fn)}


BAD: dict[str, tuple[str, dict[str, Any], Edit, str, str, dict[str, int]]] = {
    # what another tool did: (model, options, how to make it, outcomes, what is said, tensor parallelism)
    "crash leaves quantized shards under a BF16 config": (
        "tied",
        CT,
        without_declaration,
        "-w-w",
        "no quantization is declared",
        {},
    ),
    "vLLM needs three keys of hf_quant_config.json": (
        "tied",
        W4A4,
        both(without_declaration, sidecar(kv_cache_quant_algo=None), lambda p: None),
        "-++-",
        "kv_cache_quant_algo is missing",
        {},
    ),
    "SGLang needs a group size": (
        "tied",
        W4A4,
        both(without_declaration, sidecar(group_size=None)),
        "--+-",
        "group_size is missing",
        {},
    ),
    "mlp.gate also hits gate_up_proj": (
        "tied",
        W4A4,
        config(ignore=["lm_head", f"{L0}.mlp.gate"]),
        "-++-",
        f"'{L0}.mlp.gate' in the ignore list also matches",
        {},
    ),
    "layers.1 also hits layers.10": (
        "dense",
        CT | {"policy": Policy(ignore=("layers.1",))},
        config(ignore=["lm_head", r"re:model\.layers\.1"]),
        "-w-w",
        "also matches it",
        {},
    ),
    "a whole layer by a dotted part": (
        "dense",
        W4A4 | {"policy": Policy(ignore=("layers.1",))},
        config(ignore=["lm_head", "model.layers.1"]),
        "-++-",
        "'model.layers.1' in the ignore list also matches it",
        {},
    ),
    "routers missing from the ignore list": (
        "moe",
        W4A4,
        ignoring("lm_head"),
        "-++-",
        "nothing in the ignore list names it",
        {},
    ),
    "mixed precision drops the ignore list": (
        "moe",
        W4A4 | {"overrides": (FormatOverride(MXFP8(), kinds=("attention",)),)},
        config(quantized_layers={}),
        "--+-",
        "MIXED_PRECISION needs quantized_layers",
        {},
    ),
    "one expert excluded": ("moe", W4A4, tensors(plain_expert), "----", "only some of its experts are quantized", {}),
    "stacked experts left in BF16 under an NVFP4 label": (
        "moe",
        W4A4,
        tensors(stacked_bf16),
        "----",
        "is in high precision, but nothing in the ignore list names it",
        {},
    ),
    "FP8 passed through under an NVFP4 label": (
        "tied",
        W4A4,
        tensors(fp8_blocks),
        "----",
        "neither NVFP4 nor MXFP8",
        {},
    ),
    "gate and up of an expert under two scales": (
        "moe",
        W4A4,
        times(f"{EXPERT}.gate_proj.weight_scale_2", 2.0),
        "ww--",
        "a factor of 2",
        {},
    ),
    "q and k with different input scales": (
        "tied",
        W4A4,
        times(f"{L0}.self_attn.q_proj.input_scale", 2.0),
        "++--",
        "input_scale",
        {},
    ),
    "an expert that no token reached has no input scale": (
        "moe",
        W4A4,
        without(f"{EXPERT}.down_proj.input_scale"),
        "w+--",
        "lacks down_proj.input_scale",
        {},
    ),
    "4-bit activations without input scales": (
        "tied",
        {},
        both(config(quant_algo="NVFP4"), sidecar(quant_algo="NVFP4")),
        "++w-",
        "quantizes activations",
        {},
    ),
    "NaN scale bytes of an all-zero weight": (
        "tied",
        W4A4,
        tensors(nan_scales),
        "-ww-",
        "384 of 384 block scales are NaN (0x7F)",
        {},
    ),
    "an input scale of infinity": (
        "tied",
        W4A4,
        times(f"{L0}.mlp.down_proj.input_scale", torch.inf),
        "www-",
        "is [inf]",
        {},
    ),
    "a scalar divisor": (
        "tied",
        CT,
        tensors(
            lambda found: {
                name: tensor.reshape(()) if name.endswith("weight_global_scale") else tensor
                for name, tensor in found.items()
            }
        ),
        "++--",
        "transformers fails on anything but [1]",
        {},
    ),
    "another layout's names": (
        "tied",
        W4A4,
        tensors(
            lambda found: {
                name.replace("weight_scale_2", "weight_global_scale"): tensor for name, tensor in found.items()
            }
        ),
        "-w--",
        "is missing",
        {},
    ),
    "scales beyond what Marlin holds": (
        "tied",
        W4A4,
        tensors(spread_scales),
        "www-",
        "383 of 384 block scales (99.7%) are lost",
        {},
    ),
    "K % 16 holds for the tensor, not for a shard": (
        "tied",
        W4A4,
        lambda path: None,
        "----",
        "24 each, not a multiple of 16",
        {"tensor_parallel": 4},
    ),
    "one expert named, and vLLM takes all for excluded": (
        "moe",
        W4A4,
        ignoring("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", f"{EXPERT}.down_proj"),
        "-++-",
        "is quantized, but",
        {},
    ),
    "one expert excluded, of which engines know only the first": (
        "moe",
        CT,
        both(
            tensors(plain_expert),
            config(ignore=["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", r"re:.*experts\.1\..*"]),
        ),
        "-w-w",
        "experts.0.down_proj is in high precision, but nothing",
        {},
    ),
    "a list that is null": ("tied", W4A4, null_list, "--+-", "ignore is None, not a list", {}),
    "half of a fused layer excluded": (
        "tied",
        W4A4,
        ignoring("lm_head", f"{L0}.self_attn.q_proj"),
        "----",
        "but not its other parts",
        {},
    ),
    "half of a fused layer excluded by re:": (
        "tied",
        CT,
        config(ignore=["lm_head", r"re:.*\.q_proj"]),
        "---w",
        "but not its other parts",
        {},
    ),
    "quantized, but excluded": (
        "tied",
        CT,
        config(ignore=["lm_head", f"{L0}.mlp.down_proj"]),
        "-w-w",
        f"'{L0}.mlp.down_proj' in the ignore list names it",
        {},
    ),
    "MXFP8, but excluded: its elements are cast without scales": (
        "tied",
        {"format": MXFP8()},
        ignoring("lm_head", f"{L0}.mlp.down_proj"),
        "-www",
        f"'{L0}.mlp.down_proj' in the ignore list names it",
        {},
    ),
    "left in high precision under compressed-tensors": (
        "tied",
        CT,
        tensors(plain_down),
        "-w-w",
        "nothing in the ignore list names it",
        {},
    ),
    "left in high precision under MXFP8": (
        "tied",
        {"format": MXFP8()},
        tensors(plain_down),
        "ww-w",
        "nothing in the ignore list names it",
        {},
    ),
    "lm_head in high precision, and no list": ("dense", CT, config(ignore=[]), "++-w", "lm_head is in high", {}),
    "a tied lm_head that no list names": ("tied", W4A4, ignoring(), "-++-", "is tied to the embedding", {}),
    "the same in transformers": ("tied", CT, config(ignore=[]), "++--", "is tied to the embedding", {}),
    "an image encoder that no list names": ("tied", W4A4, with_tower("visual"), "----", "visual.blocks.0", {}),
    "one that vLLM never quantizes": ("tied", W4A4, with_tower("vision_tower"), "+---", "vision_tower.blocks.0", {}),
    "q under another divisor, weight-only": (
        "tied",
        CT,
        times(f"{L0}.self_attn.q_proj.weight_global_scale", 2.0),
        "w--+",
        "a factor of 2",
        {},
    ),
    "no tensor scale": ("tied", W4A4, without(f"{L0}.mlp.down_proj.weight_scale_2"), "ww--", "is missing", {}),
    "no divisor": ("tied", CT, without(f"{L0}.mlp.down_proj.weight_global_scale"), "ww-w", "is missing", {}),
    "no static scale of activations": (
        "tied",
        W4A4,
        without(f"{L0}.mlp.down_proj.input_scale"),
        "w+w-",
        "quantizes activations",
        {},
    ),
    "no divisor of activations": (
        "tied",
        CT | W4A4,
        without(f"{L0}.mlp.down_proj.input_global_scale"),
        "ww-w",
        "quantizes activations",
        {},
    ),
    "a divisor of activations that weight-only has no place for": (
        "tied",
        CT,
        tensors(lambda found: found | {f"{L0}.mlp.down_proj.input_global_scale": torch.ones(1)}),
        "-+-+",
        "is no parameter of a layer",
        {},
    ),
    "NaN scale bytes in compressed-tensors": ("tied", CT, tensors(nan_scales), "ww-w", "are NaN (0x7F)", {}),
    "scales that only vLLM brings into Marlin's range": (
        "tied",
        W4A4,
        tensors(small_scales),
        "+ww-",
        "384 of 384 block scales (100.0%) are lost",
        {},
    ),
    "the scale of keys without that of values": (
        "tied",
        W4A4 | {"kv_cache": "fp8"},
        without(f"{L0}.self_attn.v_proj.v_scale"),
        "ww--",
        "its counterpart is there",
        {},
    ),
    "an FP8 cache without its scales": (
        "tied",
        CT | {"kv_cache": "fp8"},
        without(f"{L0}.self_attn.k_scale", f"{L0}.self_attn.v_scale"),
        "++-w",
        "the config declares an FP8 KV cache",
        {},
    ),
    "MXFP8 in SGLang's Llama": (
        "tied",
        {"format": MXFP8()},
        in_config(architectures=["LlamaForCausalLM"]),
        "+w+w",
        "loses the scales of 7 MXFP8 weights",
        {},
    ),
    "a mixture of MXFP8 alone": (
        "tied",
        {"format": MXFP8()},
        config(quant_algo="MIXED_PRECISION", quantized_layers={L0: {"quant_algo": "MXFP8", "group_size": 32}}),
        "--+-",
        "mixes MXFP8 without NVFP4",
        {},
    ),
    "quant_method mxfp8 without activation_scheme": (
        "tied",
        {"format": MXFP8()},
        mxfp8_layout(activation_scheme=None),
        "--++",
        "activation_scheme is missing",
        {},
    ),
    "quant_method mxfp8 without weight_block_size": (
        "tied",
        {"format": MXFP8()},
        mxfp8_layout(weight_block_size=None),
        "-++-",
        "weight_block_size is missing",
        {},
    ),
    "MXFP8's hf_quant_config.json without a KV cache": (
        "tied",
        {"format": MXFP8()},
        both(without_declaration, sidecar(kv_cache_quant_algo=None)),
        "-++w",
        "kv_cache_quant_algo is missing",
        {},
    ),
}
