"""Sources that are quantized already: decoded exactly, converted as what they decode to, refused when mislabelled."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte import MXFP8, CheckpointError, Policy
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.recorded import RecordedShards
from halfbyte.checkpoint.result import Report
from halfbyte.checkpoint.sources import DecodedCheckpoint, open_source
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.report.console import plan_json, print_report

from ..check import equal, same_bits, true
from . import encoded, models
from .encoded import SOURCES, Encoded
from .models import Model

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def findings(out: Path, source: Path) -> list[str]:
    return [str(finding) for finding in (*verify_structure(out), *verify_source(out, source))]


@pytest.mark.parametrize("name", SOURCES)
def test_decodes(tmp_path: Path, name: str) -> None:
    """Every tensor, whole and by rows; scales and the config's quantization are gone, nothing else is."""
    source = SOURCES[name]()
    found = open_source(source.model.save(tmp_path / "source", 3), requantize=True)
    equal(set(found.tensors), {*source.decoded, *source.plain})
    equal(found.config, source.config)
    for tensor, values in source.decoded.items():
        info = found.tensors[tensor]
        true(info.decoded, tensor)
        wanted = values if info.dtype == "F32" else values.bfloat16()
        equal(wanted.float(), values, "bfloat16 is exact where it is chosen")
        same_bits(found.read(tensor), wanted, tensor)
        same_bits(found.read(tensor, (slice(7, 39),)), wanted[7:39], f"rows of {tensor}")
        equal(info.shape, tuple(values.shape))
    for tensor, values in source.plain.items():
        same_bits(found.read(tensor), values, tensor)
        same_bits(found.read(tensor, (slice(1, 3),)), values[1:3], f"part of {tensor}")


CONVERTED: dict[str, dict[str, Any]] = {
    "DeepSeek": {"layout": "compressed-tensors"},
    "gpt-oss": {"kv_cache": "fp8"},
    "ModelOpt FP8": {"kv_cache": "fp8", "activations": "constant"},
    "compressed-tensors by channel": {"format": MXFP8()},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_converts_as_what_it_decodes_to(tmp_path: Path, name: str) -> None:
    """All files are those of the decoded model's conversion, however it is sharded; and verify agrees."""
    source, options = SOURCES[name](), Options(**CONVERTED[name])
    directory = source.model.save(tmp_path / "source", 3)
    convert(directory, tmp_path / "out", options, max_shard_bytes=60_000)
    convert(source.high_precision.save(tmp_path / "plain"), tmp_path / "wanted", options, max_shard_bytes=60_000)
    found, wanted = files(tmp_path / "out"), files(tmp_path / "wanted")
    equal(set(found), set(wanted))
    for file, data in wanted.items():
        true(found[file] == data, f"{file} differs")
    equal(findings(tmp_path / "out", directory), [])


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = encoded.deepseek()
    directory = source.model.save(tmp_path / "source", 2)
    run = lambda out, **more: convert(directory, tmp_path / out, Options(), max_shard_bytes=20_000, **more)  # noqa: E731
    run("wanted")
    write, calls = RecordedShards.write, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(RecordedShards, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    monkeypatch.undo()
    report = run("out", resume=True)
    true(0 < report.resumed_shards < report.shards, f"{report.resumed_shards} of {report.shards}")
    equal(report.encoded.decoded, len(source.decoded))
    equal(files(tmp_path / "out"), files(tmp_path / "wanted"))


def test_a_changed_scale_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the file that it is in holds no weight."""
    source = encoded.deepseek().model
    directory = tmp_path / "source"
    source.save(directory)
    scales = {name: t for name, t in source.tensors.items() if name.endswith("_scale_inv")}
    save_file({n: t for n, t in source.tensors.items() if n not in scales}, directory / "model.safetensors")
    save_file(scales, directory / "scales.safetensors")
    models.write_index(directory)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RecordedShards, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(directory, tmp_path / "out", Options())
    monkeypatch.undo()
    save_file({name: 2 * t for name, t in scales.items()}, directory / "scales.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be resumed: source\.scales\.safetensors\.modified was"):
        convert(directory, tmp_path / "out", Options(), resume=True)


def change(directory: Path, name: str, by: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {name: by(tensors[name])}, directory / "model.safetensors", metadata={"format": "pt"})


def test_verify_finds_tampering(tmp_path: Path) -> None:
    """In the output, whether quantized or kept; and in any scale of the source."""
    source = encoded.deepseek()
    directory = source.model.save(tmp_path / "source")
    convert(directory, tmp_path / "out", Options())
    kept = "model.layers.2.self_attn.q_b_proj.weight"
    same = findings(tmp_path / "out", directory)
    equal(same, [])
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    change(directory, scale, lambda s: torch.cat((s[:1] * 1.01, s[1:])))
    found = findings(tmp_path / "out", directory)
    true(any(f.startswith("model.layers.1.mlp.up_proj.weight") and "bytes differ" in f for f in found), found)
    change(directory, scale, lambda s: torch.cat((s[:1] / 1.01, s[1:])))
    change(tmp_path / "out", kept, lambda t: t * 2)
    found = [f for f in findings(tmp_path / "out", directory) if "SHA-256" not in f]
    true(found and all(f.startswith(kept) for f in found), found)


def lossless(source: Encoded, where: Path) -> Report:
    """Convert to MXFP8, and see what every weight decodes to."""
    directory = source.model.save(where / "source")
    report = convert(directory, where / "out", Options(format=MXFP8()))
    dequantize(where / "out", where / "back", dtype="float32")
    back = models.read_all(where / "back")
    quantized = {weight.name for weight in report.weights if weight.name in source.decoded}
    same = sum(torch.equal(back[name], source.decoded[name]) for name in quantized)
    equal((report.encoded.exact, report.encoded.mxfp8), (same, len(quantized)))
    return report


@pytest.mark.parametrize("name", ["DeepSeek, powers of two", "MXFP8 of SGLang", "gpt-oss"])
def test_powers_of_two_lose_nothing(tmp_path: Path, name: str) -> None:
    encoded = lossless(SOURCES[name](), tmp_path).encoded
    true(encoded.exact == encoded.mxfp8 > 0, f"{encoded}")


def test_other_scales_round_and_it_is_said(tmp_path: Path) -> None:
    report = lossless(encoded.deepseek(), tmp_path)
    equal(report.encoded.exact, 0)
    true("16 had to be rounded, since their scales are no powers of two" in printed(report), printed(report))


def printed(report: Report) -> str:
    console = Console(width=400, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        print_report(console, report)
    return captured.get()


@pytest.mark.parametrize(
    ("kv_cache", "means"), [("none", "is not quantized"), ("fp8", "scales of its own are written")]
)
def test_the_summary_says_what_became_of_it(tmp_path: Path, kv_cache: Any, means: str) -> None:
    source = encoded.modelopt_fp8()
    directory = source.model.save(tmp_path / "source")
    report = convert(
        directory, tmp_path / "out", Options(kv_cache=kv_cache, policy=Policy(ignore=("v_proj", "*k_proj*", "q_proj")))
    )
    text = printed(report)
    for sentence in (
        "The source is FP8 with a scale per tensor (quant_method modelopt): 8 weights decoded",
        "4 of them stay unquantized, and are bfloat16 now: lm_head, model.layers.0.self_attn.k_proj,",
        "2 KV-cache scales of the source left out",
        means,
        "8 input scales of the source left out",
    ):
        true(sentence in text, f"{sentence!r} is not in {text}")
    found = models.read_all(tmp_path / "out")
    for name in ("lm_head", "model.layers.0.self_attn.v_proj"):
        same_bits(found[f"{name}.weight"], source.decoded[f"{name}.weight"].bfloat16())
        true(f"{name}.weight_scale" not in found and f"{name}.input_scale" not in found, name)
    scales = {n: t for n, t in found.items() if n.endswith(("k_scale", "v_scale"))}
    equal({float(t) for t in scales.values()}, {1.0} if kv_cache == "fp8" else set())
    plan = plan_json(make(directory), Options())
    becomes = {entry["tensor"]: (entry["becomes"], entry["decoded"]) for entry in plan["tensors"]}
    equal(becomes["lm_head.weight"], ("bf16", True))
    equal(becomes["model.norm.weight"], ("bf16", False))


def make(directory: Path) -> Any:
    from halfbyte.checkpoint.plan import make_plan

    return make_plan(open_source(directory), Options())


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_nvfp4_only_if_asked(tmp_path: Path, layout: str) -> None:
    source = encoded.nvfp4(layout)
    directory = source.model.save(tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"quantized already, to NVFP4 .*give --requantize to decode these four bits"
    ):
        convert(directory, tmp_path / "out", Options())
    convert(directory, tmp_path / "out", Options(format=MXFP8()), requantize=True)
    convert(source.high_precision.save(tmp_path / "plain"), tmp_path / "wanted", Options(format=MXFP8()))
    equal(files(tmp_path / "out"), files(tmp_path / "wanted"))
    equal(findings(tmp_path / "out", directory), [])


def test_hf_quant_config_alone(tmp_path: Path) -> None:
    """As older exports of ModelOpt have it; it is not copied to the output, and it counts as part of the source."""
    source = encoded.modelopt_fp8()
    directory = replace(source.model, config=source.config).save(tmp_path / "source")
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": []}
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    found = open_source(directory)
    true("hf_quant_config.json" in found.files, "it decides what the weights mean")
    same_bits(found.read(UP), source.decoded[UP])


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """[E, 2I, H] with scales of their own, where the family's stacks are known."""
    model = models.stack(models.moe(1))
    tensors, values = dict(model.tensors), {}
    bits = encoded.Bits()
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        elements = bits.e4m3(*tensors[name].shape)
        scale = bits.scale(len(elements), -(-elements.shape[1] // 48), -(-elements.shape[2] // 40))
        tensors |= {name: elements, f"{name}_scale_inv": scale}
        expanded = [encoded.expand(s, tuple(e.shape), (48, 40)) for e, s in zip(elements, scale, strict=True)]
        values[name] = (encoded.e4m3_value(elements) * torch.stack(expanded)).float()
    quantization = {"quant_method": "fp8", "weight_block_size": [48, 40]}
    source = Model(tensors, model.config | {"quantization_config": quantization}).save(tmp_path / "source")
    found = open_source(source)
    for name, value in values.items():
        same_bits(found.read(name), value)
        same_bits(found.read(name, (2,)), value[2])
        same_bits(found.read(name, (1, slice(5, 30))), value[1, 5:30])
    convert(source, tmp_path / "out", Options())
    convert(replace(model, tensors=model.tensors | values).save(tmp_path / "plain"), tmp_path / "wanted", Options())
    equal(files(tmp_path / "out"), files(tmp_path / "wanted"))


def test_dequantize(tmp_path: Path) -> None:
    source = encoded.deepseek()
    dequantize(source.model.save(tmp_path / "source", 2), tmp_path / "plain")
    found = models.read_all(tmp_path / "plain")
    equal(set(found), {*source.decoded, *source.plain})
    for name, values in source.decoded.items():
        same_bits(found[name], values.bfloat16(), name)
    equal(json.loads((tmp_path / "plain" / "config.json").read_text()), source.config)


def broken(source: Encoded, *without: str, quantization: dict[str, Any] | None = None, **tensors: Tensor) -> Model:
    """Tensors by name with __ for dots."""
    model = source.model.without(*without).plus({n.replace("__", "."): t for n, t in tensors.items()})
    found = model.config["quantization_config"] if quantization is None else quantization
    return model.configured(quantization_config=found)


def dense_fp8() -> Encoded:
    return encoded.fp8(models.dense(1), {"quant_method": "fp8", "weight_block_size": [48, 40]}, (48, 40))


def scaled(value: float) -> Model:
    source = dense_fp8()
    scale = source.model.tensors[f"{UP}_scale_inv"].clone()
    scale[1, 0] = value
    return source.model.plus({f"{UP}_scale_inv": scale})


BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
UNDERSTOOD = "fp8 (DeepSeek's blocks, or one scale per tensor), mxfp8, mxfp4 (gpt-oss), modelopt ("
WRONG: dict[str, tuple[Callable[[], Model], tuple[str, ...]]] = {
    **{
        f"unknown: {method}": (
            lambda method=method: broken(dense_fp8(), quantization={"quant_method": method}),
            (f"config.json: quantization_config: the model is quantized already ({method})", UNDERSTOOD),
        )
        for method in ("gptq", "awq", "bitsandbytes", "fbgemm_fp8", "quark", "torchao")
    },
    "integers of compressed-tensors": (
        lambda: broken(
            dense_fp8(), quantization=encoded.ct_config({"num_bits": 4, "type": "int", "strategy": "group"})
        ),
        ("config_groups.group_0.weights: int of 4 bits, strategy group", "is not understood", UNDERSTOOD),
    ),
    "asymmetric": (
        lambda: broken(
            dense_fp8(),
            quantization=encoded.ct_config({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": False}),
        ),
        ("asymmetric weights are not understood",),
    ),
    "rotated": (
        lambda: broken(
            dense_fp8(),
            quantization=encoded.ct_config(
                {"num_bits": 8, "type": "float", "strategy": "tensor"}, transform_config={"config_groups": {"u": {}}}
            ),
        ),
        ("transform_config: weights that are sparse or rotated are not understood",),
    ),
    "ModelOpt's AWQ": (
        lambda: broken(dense_fp8(), quantization={"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}),
        ("quant_algo W4A16_AWQ is not understood; known are FP8, FP8_PER_CHANNEL_PER_TOKEN",),
    ),
    "FP8 labelled NVFP4": (
        lambda: broken(dense_fp8(), quantization={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        (
            "down_proj.weight: is F8_E4M3 [64, 96], but not stored as NVFP4 (quant_method modelopt): Found weight F8_E4M3",
        ),
    ),
    "blocks labelled as one scale per tensor": (
        lambda: broken(dense_fp8(), quantization={"quant_method": "fp8", "activation_scheme": "static"}),
        ("the config says FP8 with a scale per tensor", "weight_scale_inv is F32 [2, 3]; expected [1, 1]"),
    ),
    "blocks of another size": (
        lambda: broken(dense_fp8(), quantization={"quant_method": "fp8", "weight_block_size": [16, 16]}),
        ("the config says FP8 in blocks of 16×16", "weight_scale_inv is F32 [2, 3]; expected [4, 6]"),
    ),
    "a block size that is none": (
        lambda: broken(dense_fp8(), quantization={"quant_method": "fp8", "weight_block_size": [128, 0]}),
        ("weight_block_size is [128, 0]; expected two positive numbers",),
    ),
    "nothing is encoded": (
        lambda: models.dense(1).configured(quantization_config={"quant_method": "fp8"}),
        ("the model is quantized already, it says, as FP8", "but no weight is stored so"),
    ),
    "no scale": (
        lambda: broken(dense_fp8(), f"{UP}_scale_inv"),
        (f"tensor {UP}: the config says FP8", f"but {UP}_scale_inv is missing. Found weight F8_E4M3 [96, 64]"),
    ),
    "a scale without its weight": (
        lambda: broken(dense_fp8(), lm_head__weight_scale_inv=torch.ones(2, 2)),
        ("tensor lm_head.weight_scale_inv: belongs to a quantized weight, but not to one of FP8 in blocks of 48×40",),
    ),
    "an input scale of nothing": (
        lambda: broken(dense_fp8(), lm_head__input_scale=torch.ones(())),
        ("tensor lm_head.input_scale: belongs to a quantized weight, but not",),
    ),
    "a zero point": (
        lambda: broken(dense_fp8(), **{f"{UP}_zero_point".replace(".", "__"): torch.ones(96)}),
        (f"tensor {UP}_zero_point: belongs to a quantized weight, but not",),
    ),
    "other elements": (
        lambda: broken(dense_fp8(), lm_head__weight=torch.ones(64, 64, dtype=torch.int8)),
        ("tensor lm_head.weight: is I8 [64, 64], but not stored as FP8 in blocks",),
    ),
    "E5M2": (
        lambda: broken(dense_fp8(), lm_head__weight=torch.ones(64, 64).to(torch.float8_e5m2)),
        ("tensor lm_head.weight: is F8_E5M2 [64, 64], but not stored as FP8 in blocks",),
    ),
    **{
        f"a scale that is {value}": (
            lambda value=value: scaled(value),
            (f"tensor {UP}_scale_inv: {UP} has a scale that is negative, infinite or NaN",),
        )
        for value in (float("nan"), float("inf"), -1.0)
    },
    "NaN as an exponent": (
        lambda: (source := SOURCES["MXFP8 of SGLang"]()).model.plus(
            {f"{UP}_scale_inv": torch.full_like(source.model.tensors[f"{UP}_scale_inv"], 255)}
        ),
        (f"{UP} has a scale that is negative, infinite or NaN",),
    ),
    "a NaN element": (
        lambda: dense_fp8().model.plus({UP: torch.full((96, 64), float("nan")).to(torch.float8_e4m3fn)}),
        (f"tensor {UP}: contains NaN or inf",),
    ),
    "another family's MXFP4": (
        lambda: encoded.gpt_oss().model.configured(model_type="dbrx"),
        ("how 'dbrx' stacks its experts is not known",),
    ),
    "MXFP4 of another width": (
        lambda: encoded.gpt_oss().model.configured(intermediate_size=128),
        (f"tensor {BLOCKS}: is U8 [2, 64, 3, 16], but by config.json U8 [2, 64, 4, 16]",),
    ),
    "MXFP4 without scales": (
        lambda: encoded.gpt_oss().model.without(BLOCKS.replace("blocks", "scales")),
        (f"tensor {BLOCKS}: {BLOCKS.replace('blocks', 'scales')} is missing",),
    ),
    "encoded and not": (
        lambda: encoded.gpt_oss().model.plus({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(96, 64)}),
        ("experts.0.up_proj.weight is there twice, encoded and not; remove one",),
    ),
    "a fused scale": (
        lambda: encoded.modelopt_fp8().model.plus({UP.replace("weight", "weight_scale"): torch.ones(3)}),
        (f"tensor {UP}: the config says FP8 with a scale per tensor", "weight_scale is F32 [3]; expected [1, 1]"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels(tmp_path: Path, case: str) -> None:
    make_model, parts = WRONG[case]
    with pytest.raises(CheckpointError) as caught:
        convert(make_model().save(tmp_path / "source"), tmp_path / "out", Options(), requantize=True)
    for part in parts:
        true(part in str(caught.value), f"{part!r} is not in: {caught.value}")
    equal([path.name for path in tmp_path.iterdir()], ["source"])


def test_deepseek_as_transformers_decodes_it(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    source = encoded.deepseek((32, 8))
    found = open_source(source.model.save(tmp_path / "source"))
    decode = fp8.Fp8Dequantize(None)._dequantize_one
    seen = 0
    for name in source.decoded:
        elements, scale = source.model.tensors[name], source.model.tensors[f"{name}_scale_inv"]
        if elements.shape[0] % 32 == 0 and elements.shape[1] % 8 == 0:  # it knows no ragged edges
            same_bits(found.read(name), decode(elements, scale, torch.float32), name)
            same_bits(found.read(name).bfloat16(), decode(elements, scale, torch.bfloat16), name)
            seen += 1
    true(seen > 10, f"{seen} weights compared")


def test_gpt_oss_as_transformers_decodes_it(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    source = encoded.gpt_oss()
    found = open_source(source.model.save(tmp_path / "source"))
    path = "model.layers.0.mlp.experts"
    for part, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        stored = (source.model.tensors[f"{path}.{part}_{kind}"] for kind in ("blocks", "scales"))
        whole = mxfp4.convert_moe_packed_tensors(*stored)  # [E, in, out]
        for e in range(2):
            for i, leaf in enumerate(leaves):
                wanted = whole[e].T[i :: len(leaves)].contiguous()
                same_bits(found.read(f"{path}.{e}.{leaf}.weight"), wanted, f"{e} {leaf}")


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("compressed-tensors")])
def test_compressed_tensors_as_it_decodes_it_itself(tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    source = SOURCES[name]()
    found = open_source(source.model.save(tmp_path / "source"), requantize=True)
    scheme = QuantizationScheme(**source.model.config["quantization_config"]["config_groups"]["group_0"])
    kind = {"MXFP8": "mxfp8-quantized", "MXFP4": "mxfp4-pack-quantized", "NVFP4": "nvfp4-pack-quantized"}
    compressor = BaseCompressor.get_value_from_registry(kind.get(name.split()[-1], "float-quantized"))
    for tensor in (Q, UP):
        module = tensor.removesuffix(".weight")
        state = {n.removeprefix(f"{module}."): t for n, t in source.model.tensors.items() if n.startswith(f"{module}.")}
        wanted = compressor.decompress(state, scheme)["weight"]
        equal(found.read(tensor).to(wanted.dtype), wanted, tensor)


def test_a_high_precision_model_is_as_it_was(tmp_path: Path) -> None:
    found = open_source(models.dense(1).save(tmp_path / "source"))
    true(not isinstance(found, DecodedCheckpoint), "nothing to decode")
    true(not any(info.decoded for info in found.tensors.values()), "nothing is decoded")
