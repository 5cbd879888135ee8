"""Ways to spoil a good checkpoint, as other tools have: what the corpus of test_loaders.py is made with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import models

L0 = "model.layers.0"
EXPERT = f"{L0}.mlp.experts.1"
MODULES = [f"{L0}.self_attn.{letter}_proj" for letter in "qkvo"]
MODULES += [f"{L0}.mlp.{part}_proj" for part in ("gate", "up", "down")]
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


def packed_q(found: models.Tensors) -> models.Tensors:
    """q in NVFP4 where k and v are MXFP8."""
    name = f"{L0}.self_attn.q_proj"
    scale = torch.ones(64, 4).to(torch.float8_e4m3fn)
    packed = {"weight": torch.zeros(64, 32, dtype=torch.uint8), "weight_scale": scale, "weight_scale_2": torch.ones(())}
    return found | {f"{name}.{part}": tensor for part, tensor in packed.items()}


def stacked_packed(found: models.Tensors) -> models.Tensors:
    """All experts of a layer in one tensor, as they are while they run."""
    kept = {name: tensor for name, tensor in found.items() if f"{L0}.mlp.experts." not in name}
    for leaf, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        path = f"{L0}.mlp.experts.{leaf}"
        kept[path] = torch.zeros(4, rows, columns // 2, dtype=torch.uint8)
        kept[f"{path}_weight_scale"] = torch.ones(4, rows, columns // 16).to(torch.float8_e4m3fn)
        kept[f"{path}_weight_scale_2"] = kept[f"{path}_input_scale"] = torch.ones(4)
    return {name: tensor.clone() for name, tensor in kept.items()}
