"""diff: a planted byte is found at its place, and a rule by its bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte import MXFP8
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.diff import Diff, Place, diff
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.producers import PRODUCERS
from halfbyte.checkpoint.schema import weight_names
from halfbyte.checkpoint.survey import survey
from halfbyte.errors import CheckpointError
from halfbyte.formats import NVFP4

from ..check import equal, same_bits, true
from ..test_cli import has, parsed, succeeds
from ..test_interop import import_quietly
from . import models

L0 = "model.layers.0"
DOWN = f"{L0}.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(options) → a checkpoint of one model, made once; "source" is the model."""
    root = tmp_path_factory.mktemp("made")
    paths = {"source": models.moe().save(root / "source", 2)}

    def make(**options: Any) -> Path:
        key = repr(options)
        if key not in paths:
            paths[key] = root / f"out{len(paths)}"
            convert(paths["source"], paths[key], Options(**options), max_shard_bytes=20_000 + 10**6 * (len(paths) % 2))
        return paths[key]

    make.source = paths["source"]  # type: ignore[attr-defined]
    return make


def changed(path: Path, target: Path, **tensors: Any) -> Path:
    """A copy with some tensors replaced; None removes one."""
    found = {name: tensor.clone() for name, tensor in models.read_all(path).items()} | tensors
    target.mkdir()
    (target / "config.json").write_text((path / "config.json").read_text())
    save_file(
        {k: t for k, t in found.items() if t is not None}, target / "model.safetensors", metadata={"format": "pt"}
    )
    return target


def only(found: Diff) -> Any:
    equal(len(found.differences), 1, str(found.differences))
    return found.differences[0]


def test_layouts_and_shards_do_not_matter(made: Callable[..., Path]) -> None:
    one, other = made(), made(layout="compressed-tensors")
    true(len(list(one.glob("*.safetensors"))) != len(list(other.glob("*.safetensors"))), "sharded alike")
    found = diff(one, other)
    equal((found.same, found.differences), (True, ()))
    true(found.compared > 32, "what was compared")


def test_an_element(made: Callable[..., Path], tmp_path: Path) -> None:
    a = made()
    name = f"{L0}.mlp.experts.2.up_proj"
    data = models.read_all(a)[f"{name}.weight"].clone()
    data[5, 21] ^= 0x10  # a high nibble, in the third block
    b = changed(a, tmp_path / "b", **{f"{name}.weight": data})
    found = only(diff(a, b))
    old = int(models.read_all(a)[f"{name}.weight"][5, 21])
    values = (f"0x{old:02X}", f"0x{old ^ 0x10:02X}")
    equal(found.first, Place("elements", 5 * 32 + 21, None, 5, 2, values))
    equal((found.tensor, found.bytes, found.blocks), (f"{name}.weight", 1, 1))
    left, right = (survey(path) for path in (a, b))
    decoded = [
        next(side.read(w).dequantize() for w in side.weights if w.name.full == f"{name}.weight")
        for side in (left, right)
    ]
    wanted = float((decoded[0] - decoded[1]).norm() / decoded[0].norm())
    true(abs(found.relative / wanted - 1) < 1e-5 and wanted > 0, f"{found.relative} instead of {wanted}")


def test_a_block_scale_comes_before_its_elements(made: Callable[..., Path], tmp_path: Path) -> None:
    a = made(format=MXFP8())
    tensors = models.read_all(a)
    name = f"{L0}.self_attn.o_proj"
    scale, data = tensors[f"{name}.weight_scale"].clone(), tensors[f"{name}.weight"].view(torch.uint8).clone()
    scale[7, 1] += 1
    data[7, 40] ^= 1
    data[9, 0] ^= 1
    edits = {f"{name}.weight_scale": scale, f"{name}.weight": data.view(torch.float8_e4m3fn)}
    found = only(diff(a, changed(a, tmp_path / "b", **edits)))
    equal((found.first.part, found.first.byte, found.first.row, found.first.block), ("block scales", 15, 7, 1))
    equal((found.bytes, found.blocks), (3, 2))


def test_everything_else(made: Callable[..., Path], tmp_path: Path) -> None:
    a = made(activations="constant")
    tensors = models.read_all(a)
    norm = f"{L0}.input_layernorm.weight"
    scale = f"{L0}.self_attn.q_proj.weight_scale_2"
    edits = {
        norm: tensors[norm] * 2,
        scale: tensors[scale] * 2,
        f"{L0}.self_attn.o_proj.input_scale": torch.tensor(3.0),
        "model.norm.weight": None,
        "lm_head.weight": tensors["lm_head.weight"].float(),
    }
    found = {d.tensor: d for d in diff(a, changed(a, tmp_path / "b", **edits)).differences}
    equal(set(found), {norm, f"{L0}.self_attn.q_proj.weight", *list(edits)[2:]})
    equal(found["model.norm.weight"].what, "is only in A")
    equal(found["lm_head.weight"].what, "is BF16 [64, 64] in A, F32 [64, 64] in B")
    true(abs(found[norm].relative - 1) < 1e-6, "twice as large")
    doubled = found[f"{L0}.self_attn.q_proj.weight"]
    equal((doubled.first.part, doubled.bytes), ("tensor scale", 0))
    true(abs(doubled.relative - 1) < 1e-6, "twice as large")


RULES = {
    "TransformerEngine, halfbyte": {},
    "TransformerEngine, halfbyte (16×16 blocks)": {"format": NVFP4(block=(16, 16))},
    "TransformerEngine, halfbyte (four over six)": {"format": NVFP4(scale_rule="four_over_six")},
    "halfbyte (search)": {"format": NVFP4(scale_rule="search")},
}


def test_halfbytes_rules_are_named(made: Callable[..., Path]) -> None:
    paths = {name: made(**options) for name, options in RULES.items()}
    first = next(iter(paths))
    for name, path in paths.items():
        if name != first:
            found = diff(paths[first], path, made.source)  # type: ignore[attr-defined]
            equal((found.follows("A"), found.follows("B")), ([first], [name]))


def test_other_tools_are_named(made: Callable[..., Path], tmp_path: Path) -> None:
    """Weights written by nvidia-modelopt itself, fused layers under one scale as its export has them."""
    theirs = import_quietly("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    source, a = models.read_all(made.source), made()  # type: ignore[attr-defined]
    parts = weight_names("modelopt", NVFP4())
    edits = {}
    for weight in survey(a).weights:
        name = weight.name
        members = [source.get(f"{name.parent}.{leaf}.weight") for leaf in name.partners] or [source[name.full]]
        scale_2 = torch.stack([m.abs().amax() for m in members if m is not None]).amax().float() / (6.0 * 448.0)
        x = source[name.full]
        scale, _ = theirs.get_weights_scaling_factor(x, 16, scale_2)
        data, _, _ = theirs.quantize(x.clone(), 16, scale, scale_2)
        edits |= {f"{name.module}.{parts.elements}": data._quantized_data, f"{name.module}.{parts.block_scale}": scale}
        edits[f"{name.module}.{parts.tensor_scale}"] = scale_2
    b = changed(a, tmp_path / "b", **edits)
    same_bits(
        models.read_all(b)[f"{L0}.self_attn.o_proj.weight_scale_2"], edits[f"{L0}.self_attn.o_proj.weight_scale_2"]
    )
    found = diff(a, b, made.source)  # type: ignore[attr-defined]
    equal(found.follows("A"), ["TransformerEngine, halfbyte"])
    true("ModelOpt (dynamic)" in found.follows("B"), str([e.to_json() for e in found.explanations]))
    true(all(p.source and p.peculiar for p in PRODUCERS), "a rule without its source")


def test_command(made: Callable[..., Path], tmp_path: Path) -> None:
    a, source = made(), made.source  # type: ignore[attr-defined]
    has(succeeds("diff", a, made(layout="compressed-tensors")), "tensors are the same, byte for byte")
    found = parsed("diff", a, made(format=NVFP4(scale_rule="search")), "--source", source, code=1)
    equal((found["same"], found["follows"]["B"]), (False, ["halfbyte (search)"]))
    true(found["differences"][0]["first"]["part"] in ("block scales", "elements"), str(found["differences"][0]))
    has(parsed("diff", a, tmp_path / "no", code=2)["error"], "no such directory")
    other = models.dense(layers=1).without(f"{L0}.self_attn.k_proj.weight").save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is this the right --source"):
        diff(a, made(format=NVFP4(scale_rule="search")), other)
