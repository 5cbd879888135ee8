"""verify finds nothing on what convert wrote, and names the tensor on everything else.

Whoever tampers may also rewrite halfbyte.json or remove it: against the source that makes no difference.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte import MXFP8, NVFP4, Policy, quantize
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.plan import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.shards import tensor_digest
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.formats import Format

from ..check import equal, true
from . import models

MLP = "model.layers.1.mlp"
STATES = ["intact", "regenerated", "deleted"]
CHOICES: list[tuple[str, Format]] = [
    ("modelopt", NVFP4()),
    ("compressed-tensors", NVFP4(scale_rule="four_over_six", e4m3_max=320, error="mse")),
    ("modelopt", MXFP8()),
    ("compressed-tensors", MXFP8()),
]
IDS = ["modelopt", "compressed-tensors", "modelopt-mxfp8", "compressed-tensors-mxfp8"]
Edit = Callable[[Tensor], Tensor | None]


def make(where: Path, model: models.Model | None = None, **options: Any) -> tuple[Path, Path]:
    """(source, output)"""
    source = (model or models.dense()).save(where / "source", 2)
    convert(source, where / "out", Options(**options), max_shard_bytes=30_000)
    return source, where / "out"


def edit(out: Path, name: str, change: Edit) -> None:
    """Change one tensor where it lies; None takes it away."""
    (file,) = [path for path in out.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(file)
    changed = change(tensors.pop(name).clone())
    save_file(tensors | ({} if changed is None else {name: changed}), file, metadata={"format": "pt"})
    models.write_index(out)


def edit_json(out: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((out / name).read_text())
    change(data)
    (out / name).write_text(json.dumps(data))


def cover_up(out: Path, state: str) -> None:
    """What a careful forger does to halfbyte.json."""
    if state == "deleted":
        (out / "halfbyte.json").unlink()
    elif state == "regenerated":
        digests = {name: tensor_digest(t) for name, t in models.read_all(out).items()}
        edit_json(out, "halfbyte.json", lambda data: data.update(sha256=digests))


def flip(bit: int) -> Edit:
    """Flip a bit of the byte in the middle."""

    def change(tensor: Tensor) -> Tensor:
        data = tensor.view(torch.uint8).flatten()
        data[len(data) // 2] ^= 1 << bit
        return data.view(tensor.dtype).reshape(tensor.shape)

    return change


def structure(out: Path) -> list[str]:
    return [str(finding) for finding in verify_structure(out)]


def against(source: Path, out: Path) -> list[str]:
    return [str(finding) for finding in verify_source(out, source)]


def named(found: list[str], *parts: str) -> None:
    """One of the findings has all these parts."""
    true(any(all(part in sentence for part in parts) for sentence in found), f"no {parts} in {found}")


ELEMENTS = {"modelopt": "weight", "compressed-tensors": "weight_packed"}
TENSOR_SCALE = {"modelopt": "weight_scale_2", "compressed-tensors": "weight_global_scale"}


@pytest.mark.parametrize(("layout", "fmt"), CHOICES, ids=IDS)
@pytest.mark.parametrize("name", ["dense", "tied", "moe", "stacked", "mixtral", "mla", "multimodal"])
def test_passes(tmp_path: Path, name: str, layout: Any, fmt: Format) -> None:
    made = {
        "dense": models.dense(),
        "tied": models.dense(tied=True),
        "moe": models.with_mtp(models.moe(shared="shared_expert")),
        "stacked": models.stack(models.moe()),
        "mixtral": models.mixtral(),
        "mla": models.mla(mtp_layers=1),
        "multimodal": models.multimodal(),
    }
    source, out = make(tmp_path, made[name], layout=layout, format=fmt, kv_cache="fp8")
    equal(structure(out) + against(source, out), [])
    cover_up(out, "deleted")
    equal(structure(out) + against(source, out), [])


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "constant"},
        {"activations": "constant", "layout": "compressed-tensors"},
        {"format": NVFP4(block=(16, 16))},
        {"format": NVFP4(scale_rule="four_over_six", e4m3_max=288, error_arithmetic="fp16")},
        {"policy": Policy(only="mlp"), "layout": "compressed-tensors"},
        {"policy": Policy(ignore=("layers.0",))},
        {"policy": Policy(include=("lm_head",)), "layout": "compressed-tensors"},
        {"policy": Policy(extra_high_precision_layers_megatron=("linear_qkv",), include=("lm_head",))},
    ],
    ids=str,
)
def test_passes_with_options(tmp_path: Path, options: dict[str, Any]) -> None:
    source, out = make(tmp_path, **options)
    equal(structure(out) + against(source, out), [])
    cover_up(out, "deleted")
    equal(structure(out) + against(source, out), [])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("layout", "fmt"), CHOICES, ids=IDS)
@pytest.mark.parametrize(("leaf", "bits"), [("down_proj", (0, 0)), ("gate_proj", (7, 2))])
def test_one_flipped_bit(tmp_path: Path, leaf: str, bits: Any, layout: str, fmt: Format, state: str) -> None:
    """In the elements or in a block scale. down_proj is the smallest weight, off which an unknown rule is read."""
    elements = ELEMENTS[layout] if isinstance(fmt, NVFP4) else "weight"
    source, out = make(tmp_path, models.dense(layers=1), layout=layout, format=fmt)
    for parameter, bit in zip((elements, "weight_scale"), bits, strict=True):
        forged = shutil.copytree(out, tmp_path / parameter)
        name = f"model.layers.0.mlp.{leaf}.{parameter}"
        edit(forged, name, flip(bit))
        cover_up(forged, state)
        found = against(source, forged)
        equal(len(found), 1, str(found))
        named(found, f"{name}: 1 of ")
        equal(len(structure(forged)), 1 if state == "intact" else 0)  # its digest, which the source does not need


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("path", ["mlp", "mlp.experts.2"])
def test_unequal_gate_and_up_scales(tmp_path: Path, path: str, layout: Any, state: str) -> None:
    """The scale alone changed, and a weight that is sound in itself but was quantized without its partner."""
    model = models.dense(layers=1) if path == "mlp" else models.moe(layers=1)
    module = f"model.layers.0.{path}.up_proj"
    source, out = make(tmp_path, model, layout=layout)
    alone = shutil.copytree(out, tmp_path / "alone")
    edit(out, f"{module}.{TENSOR_SCALE[layout]}", lambda t: t * 1.5)
    weight = model.tensors[f"{module}.weight"]
    q = quantize(weight, NVFP4(), amax=2 * weight.abs().max().float())
    scale = q.tensor_scale if layout == "modelopt" else (1 / q.tensor_scale).reshape(1)
    parts = {TENSOR_SCALE[layout]: scale, ELEMENTS[layout]: q.packed, "weight_scale": q.block_scale}
    for parameter, data in parts.items():
        edit(alone, f"{module}.{parameter}", lambda t, data=data: data)
    for directory in (out, alone):
        cover_up(directory, state)
        layer = f"{module.replace('up_proj', 'gate_up_proj')} {TENSOR_SCALE[layout]}"
        named(structure(directory), f"{layer}: engines keep one scale for the fused layer")
        named(against(source, directory), f"{module}.{TENSOR_SCALE[layout]}: ", "bytes differ")


@pytest.mark.parametrize(
    ("layout", "leaf"), [("modelopt", "input_scale"), ("compressed-tensors", "input_global_scale")]
)
def test_unequal_input_scales(tmp_path: Path, layout: Any, leaf: str) -> None:
    """Engines keep one for a fused layer, too."""
    _, out = make(tmp_path, models.dense(layers=1), layout=layout, activations="constant")
    edit(out, f"model.layers.0.self_attn.k_proj.{leaf}", lambda t: t * 2)
    cover_up(out, "deleted")
    (found,) = structure(out)
    named([found], f"self_attn.qkv_proj {leaf}: engines keep one scale for the fused layer; here: ", "k_proj [2.0]")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("module", ["lm_head", "model.layers.1.mlp.gate", "model.layers.0.mlp.experts"])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_module_missing_from_ignore(tmp_path: Path, layout: Any, module: str, state: str) -> None:
    source, out = make(tmp_path, models.moe(), layout=layout, policy=Policy(ignore=("layers.0.mlp.experts",)))
    as_regex = layout == "compressed-tensors" and module.endswith("experts")
    entry = r"re:model\.layers\.0\.mlp\.experts\..*" if as_regex else module
    edit_json(out, "config.json", lambda data: data["quantization_config"]["ignore"].remove(entry))
    if layout == "modelopt":
        edit_json(out, "hf_quant_config.json", lambda data: data["quantization"]["exclude_modules"].remove(entry))
    cover_up(out, state)
    named(structure(out), f"config.json: {module} is not quantized but")
    named(against(source, out), "config.json: the ignore list differs", entry)


def test_module_too_much_in_ignore(tmp_path: Path) -> None:
    source, out = make(tmp_path)
    edit_json(out, "config.json", lambda data: data["quantization_config"]["ignore"].append("layers.0"))
    edit_json(out, "hf_quant_config.json", lambda data: data["quantization"]["exclude_modules"].append("layers.0"))
    named(structure(out), "config.json: model.layers.0.mlp.down_proj is quantized but vLLM excludes it")
    named(against(source, out), "config.json: the ignore list differs from the expected one by layers.0")


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (f"{MLP}.up_proj.weight_scale", lambda t: torch.full_like(t.float(), torch.nan).to(t.dtype), "are NaN (0x7F)"),
        (f"{MLP}.up_proj.weight_scale", lambda t: (-t.float()).to(t.dtype), "are negative"),
        (f"{MLP}.up_proj.weight_scale", lambda t: None, "is missing"),
        (f"{MLP}.up_proj.weight_scale", lambda t: t.float(), "is F32 [96, 4]; should be F8_E4M3 [96, 4]"),
        (f"{MLP}.up_proj.weight_scale", lambda t: t.reshape(-1), "is F8_E4M3 [384]; should be F8_E4M3 [96, 4]"),
        (f"{MLP}.up_proj.weight_scale", lambda t: torch.tensor(1.0), "is F32 []; should be"),
        (f"{MLP}.up_proj.weight_scale_2", lambda t: None, "is missing"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t.reshape(1), "is F32 [1]; should be F32 []"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t.double(), "is F64 []; should be F32 []"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t.to(torch.float8_e4m3fn), "is F8_E4M3 []; should be F32 []"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t * 0, "a scale is positive and finite"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t * -1, "a scale is positive and finite"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t * torch.inf, "a scale is positive and finite"),
        (f"{MLP}.down_proj.weight_scale_2", lambda t: t * torch.nan, "a scale is positive and finite"),
        (f"{MLP}.up_proj.weight", lambda t: t[:, :-1].contiguous(), "62 columns are not divisible by 16"),
        (f"{MLP}.up_proj.weight", lambda t: t.flatten(), "has shape [3072]; a quantized weight is 2-D"),
    ],
)
def test_malformed_tensors(tmp_path: Path, name: str, change: Edit, what: str) -> None:
    source, out = make(tmp_path)
    edit(out, name, change)
    cover_up(out, "deleted")
    named(structure(out), name, what)
    named(against(source, out), name)


def test_nan_in_mxfp8_scales(tmp_path: Path) -> None:
    _, out = make(tmp_path, format=MXFP8())
    edit(out, f"{MLP}.up_proj.weight_scale", lambda t: torch.full_like(t, 255))
    cover_up(out, "deleted")
    equal(structure(out), [f"{MLP}.up_proj.weight_scale: 192 block scales are NaN (0xFF)"])


@pytest.mark.parametrize("state", STATES)
def test_tensors_too_few_or_too_many(tmp_path: Path, state: str) -> None:
    source, out = make(tmp_path)
    edit(out, "model.norm.weight", lambda t: None)
    file = sorted(out.glob("*.safetensors"))[0]
    extra = {f"{MLP}.rotary.weight": torch.ones(3), f"{MLP}.rotary.k_scale": torch.ones(())}
    save_file(load_file(file) | extra, file)
    models.write_index(out)
    cover_up(out, state)
    found = against(source, out)
    named(found, "model.norm.weight: is missing")
    named(found, f"{MLP}.rotary.weight: is not in what the source gives")
    named(structure(out), f"{MLP}.rotary.k_scale: is a scale that belongs to no quantized weight")
    if state == "intact":
        named(structure(out), "model.norm.weight: is missing, but halfbyte.json lists it")
        named(structure(out), f"{MLP}.rotary.weight: was not written by halfbyte")


@pytest.mark.parametrize("state", STATES)
def test_what_is_not_quantized_is_compared_too(tmp_path: Path, state: str) -> None:
    source, out = make(tmp_path)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
        edit(out, name, flip(0))
    (out / "tokenizer.json").write_text("{}")
    (out / "chat_template.jinja").unlink()
    edit_json(out, "config.json", lambda data: data.update(rope_theta=1.0))
    cover_up(out, state)
    found = against(source, out)
    named(found, "model.embed_tokens.weight: 1 of ")
    named(found, "model.layers.0.self_attn.q_proj.bias: 1 of ")
    named(found, "tokenizer.json: differs from the source's")
    named(found, "chat_template.jinja: is missing; the source has it")
    named(found, "config.json: rope_theta is 1.0, in the source None")
    equal(len(found), 5)


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("hf_quant_config.json", lambda d: d["quantization"].update(quant_algo="NVFP4"), "about quant_algo"),
        ("hf_quant_config.json", lambda d: d["quantization"].pop("group_size"), "config.json about group_size"),
        ("hf_quant_config.json", lambda d: d["quantization"]["exclude_modules"].pop(), "about exclude_modules"),
        ("hf_quant_config.json", lambda d: d.pop("quantization"), "disagrees with config.json"),
        (models.INDEX, lambda d: d["metadata"].update(total_size=1), "total_size is 1, the tensors have"),
        (models.INDEX, lambda d: d.update(metadata="?"), "total_size is None, the tensors have"),
        ("config.json", lambda d: d.pop("quantization_config"), "no quantization_config"),
        ("config.json", lambda d: d["quantization_config"].update(quant_algo="NVFP4"), "input_scale: is missing"),
        ("halfbyte.json", lambda d: d.update(contract_version=2), "contract version 2; this halfbyte implements 1"),
        ("halfbyte.json", lambda d: d.update(layout="compressed-tensors"), "says layout compressed-tensors"),
        ("halfbyte.json", lambda d: d.update(format={"name": "mxfp8"}), "says MXFP8, config.json says NVFP4"),
        ("halfbyte.json", lambda d: d.update(format={"name": "nf4"}), "known are 'nvfp4' and 'mxfp8'"),
        ("halfbyte.json", lambda d: d.pop("policy"), "policy is missing"),
        ("halfbyte.json", lambda d: d.update(sha256=[]), "sha256 must map tensors to digests"),
    ],
)  # fmt: skip
def test_files_that_disagree(tmp_path: Path, file: str, change: Callable[[dict[str, Any]], object], what: str) -> None:
    _, out = make(tmp_path)
    edit_json(out, file, change)
    named(structure(out), what)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"policy": {"only": "mlp"}}, "model.layers.0.self_attn.q_proj: is quantized, against the policy"),
        ({"policy": {"include": ["lm_head"]}}, "lm_head: is not quantized, against the policy"),
        ({"policy": {"ignore": ["nothing"]}}, "its policy does not fit the source"),
        ({"format": {"name": "nvfp4", "e4m3_max": 256}}, f"{MLP}.down_proj.weight_scale_2: "),
        ({"kv_cache": "fp8"}, "model.layers.0.self_attn.k_proj.k_scale: is missing"),
    ],
    ids=str,
)
def test_a_record_of_other_choices(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    """halfbyte.json is held against the source and the tensors as everything else is."""
    source, out = make(tmp_path)
    edit_json(out, "halfbyte.json", lambda data: data.update(change))
    named(against(source, out), what)


def test_targets_that_miss_a_quantized_lm_head(tmp_path: Path) -> None:
    """compressed-tensors' Linear is not an engine's lm_head, which must be named."""
    _, out = make(tmp_path, layout="compressed-tensors", policy=Policy(include=("lm_head",)))
    groups = {"targets": ["Linear"]}
    edit_json(out, "config.json", lambda data: data["quantization_config"]["config_groups"]["group_0"].update(groups))
    named(structure(out), "group_0.targets is ['Linear']; the format asks for ['Linear', 'lm_head']")


def test_half_a_fused_layer_in_high_precision(tmp_path: Path) -> None:
    source, out = make(tmp_path)
    name = f"{MLP}.gate_proj"
    edit(out, f"{name}.weight", lambda t: models.dense().tensors[f"{name}.weight"])
    for leaf in ("weight_scale", "weight_scale_2"):
        edit(out, f"{name}.{leaf}", lambda t: None)
    cover_up(out, "regenerated")
    named(structure(out), f"{name}: is in high precision, but engines fuse it with up_proj")
    named(against(source, out), f"{name} would stay in high precision")


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("key", ["group_size", "num_bits"])
def test_weight_arguments_in_the_config(tmp_path: Path, layout: Any, key: str) -> None:
    """Engines read them; they must be those of the format."""
    source, out = make(tmp_path, layout=layout)
    change = {key: 8}
    edit_json(
        out,
        "config.json",
        lambda data: data["quantization_config"]["config_groups"]["group_0"]["weights"].update(change),
    )
    named(structure(out) + against(source, out), "config.json", key)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("state", ["regenerated", "deleted"])
def test_measured_scales_are_not_held_against_the_source(tmp_path: Path, layout: str, state: str) -> None:
    """Nobody knows what they should be; still they must be there, positive, and one for a fused layer."""
    source, out = make(tmp_path, layout=layout, activations="constant", kv_cache="fp8")
    names = [name for name in models.read_all(out) if name.endswith(("input_scale", "input_global_scale", "k_scale"))]
    true(len(names) == 2 * 8, str(names))
    for name in names:
        edit(out, name, lambda t: t * 0.75)
    true(any("bytes differ" in str(finding) for finding in verify_source(out, source)), "constant scales may differ")
    record = {"activations": "calibrated", "kv_cache": "fp8_calibrated"}
    edit_json(out, "halfbyte.json", lambda data: data.update(record, sha256=digests(out)))
    if state == "deleted":
        (out / "halfbyte.json").unlink()
    equal([str(finding) for finding in (*verify_structure(out), *verify_source(out, source))], [])
    edit(out, names[-1], lambda t: -t)
    true(any("a scale is positive and finite" in str(finding) for finding in verify_structure(out)), "negative")


def digests(out: Path) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in models.read_all(out).items()}
