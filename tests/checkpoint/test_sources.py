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

from halfbyte import MXFP8, NVFP4, CheckpointError, Policy
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.result import Report
from halfbyte.checkpoint.shards import ShardWriter
from halfbyte.checkpoint.sources import DecodedCheckpoint, open_source
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.report.console import plan_json, print_report

from ..check import equal, same_bits, true
from ..test_cli import parsed, succeeds
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


def test_what_alternates_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of gpt-oss's gate and up: one read, into pinned memory where a GPU is to have it, one copy."""
    directory = encoded.gpt_oss().model.save(tmp_path / "source")
    reads: list[tuple[Any, ...]] = []
    read = DecodedCheckpoint._read

    def counted(self: Any, name: str, info: Any, index: Any, pin: bool = False) -> Tensor:
        reads.append((name, str(index), pin))
        return read(self, name, info, index)

    monkeypatch.setattr(DecodedCheckpoint, "_read", counted)
    convert(directory, tmp_path / "out", Options())
    experts = [each for each in reads if each[0].endswith(("_blocks", "_scales"))]
    equal(len(experts), len(set(experts)), str(sorted(experts)))
    equal(len(experts), 2 * 2 * 2)  # of two experts, blocks and scales of gate_up and down
    reads.clear()
    path = "model.layers.0.mlp.experts.1"
    gate, up = open_source(directory).fetch_group([(f"{path}.{p}_proj.weight", ()) for p in ("gate", "up")], pin=True)
    true(gate.parts[0] is up.parts[0], "two copies")
    equal([(name.rpartition("_")[2], pin) for name, _, pin in reads], [("blocks", True), ("scales", False)])


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = encoded.deepseek()
    directory = source.model.save(tmp_path / "source", 2)
    run = lambda out, **more: convert(directory, tmp_path / out, Options(), max_shard_bytes=20_000, **more)  # noqa: E731
    run("wanted")
    write, calls = ShardWriter.write, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
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

    monkeypatch.setattr(ShardWriter, "write", interrupted)
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
        CheckpointError,
        match=r"quantized already, to NVFP4 .*give --requantize to `halfbyte convert` to decode these four bits",
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


def test_command_line(tmp_path: Path) -> None:
    source = encoded.nvfp4("modelopt").model.save(tmp_path / "nvfp4")
    arguments = ("convert", source, tmp_path / "out", "--format", "mxfp8")
    true("give --requantize" in parsed(*arguments, code=2)["error"], "the remedy is named")
    found = parsed(*arguments, "--requantize")["source_encoding"]
    equal((found["what"], found["decoded"], found["kept"]), ("NVFP4 (quant_method modelopt)", 7, []))
    equal(parsed("verify", tmp_path / "out", "--source", source), {"ok": True, "findings": []})
    oss = encoded.gpt_oss().model.save(tmp_path / "oss")
    true("decoder experts; decoded" in succeeds("convert", oss, tmp_path / "x", "--dry-run"), "reasons name it")
    report = parsed("convert", oss, tmp_path / "oss-nvfp4")
    equal(set(report["serve"]), {"halfbyte"})
    equal(report["source_bytes"], sum(t.nbytes for t in models.read_all(oss).values()))


def test_calibrates_as_what_it_decodes_to(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from halfbyte.calib.calibrate import calibrate
    from halfbyte.calib.data import Windows
    from halfbyte.calib.options import Calibration

    source = encoded.fp8(models.dense(1), {"quant_method": "fp8", "weight_block_size": [48, 40]}, (48, 40))
    ids = torch.randint(models.VOCAB, (16, 16), generator=torch.Generator().manual_seed(0))
    options = Options(format=NVFP4(scale_rule="search"), kv_cache="fp8_calibrated")
    for model, out in ((source.model, "out"), (source.high_precision, "wanted")):
        directory = model.save(tmp_path / f"source of {out}")
        calibrate(directory, tmp_path / out, options, Calibration(), Windows(ids, "random"))
    equal(files(tmp_path / "out"), files(tmp_path / "wanted"))
    equal(findings(tmp_path / "out", tmp_path / "source of out"), [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["DeepSeek", "gpt-oss", "compressed-tensors NVFP4"])
def test_the_same_bytes_decoded_on_a_gpu(tmp_path: Path, name: str) -> None:
    source = SOURCES[name]().model.save(tmp_path / "source")
    for device in ("cpu", "cuda"):
        convert(source, tmp_path / device, Options(format=MXFP8()), device=device, requantize=True)
    equal(files(tmp_path / "cuda"), files(tmp_path / "cpu"))
