"""From a model and token windows to a checkpoint: dense and MoE, whole and resumed, on one rank and on two."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

import halfbyte
from halfbyte import MXFP8, NVFP4, CheckpointError, ShapeError
from halfbyte.calib.calibrate import calibrate, model_windows
from halfbyte.calib.data import Windows
from halfbyte.calib.gptq import GPTQ
from halfbyte.calib.observers import ObserverOptions
from halfbyte.calib.options import Calibration
from halfbyte.calib.ranks import SPANS
from halfbyte.calib.runner import Summary
from halfbyte.calib.step import Step
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.policy import FormatOverride

from ..check import close, equal, same_bits, true
from ..checkpoint import models

pytest.importorskip("transformers")
SEARCH = NVFP4(scale_rule="search")
W4A4 = {"activations": "calibrated", "kv_cache": "fp8_calibrated"}


def windows(count: int = 16, length: int = 24, seed: int = 0) -> Windows:
    rng = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(models.VOCAB, (count, length), generator=rng), "random")


def run(
    source: Path, out: Path, calibration: Calibration | None = None, *, resume: bool = False, **options: Any
) -> Summary:
    chosen = Options(**{"format": SEARCH, **options})
    return calibrate(source, out, chosen, calibration or Calibration(), windows(), resume=resume)[1]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def proven(out: Path, source: Path) -> None:
    equal([str(finding) for finding in (*verify_structure(out), *verify_source(out, source))], [])


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    return halfbyte.load(directory, dtype=torch.float32)(windows(seed=1).ids).logits


@torch.no_grad()
def original_logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()(windows(seed=1).ids).logits


MODELS: dict[str, Callable[[], models.Model]] = {
    "dense": models.dense,
    "moe": models.moe,
    "stacked": lambda: models.stack(models.moe()),
    "mixtral": models.mixtral,
    "tied": lambda: models.dense(tied=True),
}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str, layout: str) -> None:
    source = MODELS[name]().save(tmp_path / "source", 2)
    summary = run(source, tmp_path / "out", layout=layout, **W4A4)
    proven(tmp_path / "out", source)
    equal({group["method"] for group in summary.groups if group["tokens"]}, {"gptq"})
    equal(summary.saturated, 0)
    true(not (tmp_path / "out.partial").exists(), "the work directory is left behind")
    equal(json.loads((tmp_path / "out/halfbyte.json").read_text())["calibration"]["data"]["samples"], 16)


def test_stacked_experts_give_the_same_tensors(tmp_path: Path) -> None:
    for name in ("moe", "stacked"):
        run(MODELS[name]().save(tmp_path / f"{name}-source"), tmp_path / name)
    a, b = (models.read_all(tmp_path / name) for name in ("moe", "stacked"))
    equal(set(a), set(b))
    for name, tensor in a.items():
        same_bits(tensor, b[name], name)


def test_gptq_is_nearer_to_the_model_than_nearest(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")
    run(source, tmp_path / "gptq")
    convert(source, tmp_path / "nearest", Options())
    wanted = original_logits(source)
    errors = [float((logits(tmp_path / name) - wanted).square().mean()) for name in ("gptq", "nearest")]
    true(errors[0] < 0.6 * errors[1], str(errors))


def test_nearest_with_data(tmp_path: Path) -> None:
    """Without GPTQ: a Hessian search, and input scales; weights of an amax rule are those of convert."""
    source = models.dense().save(tmp_path / "source")
    run(source, tmp_path / "a", Calibration(gptq=None), format=NVFP4(), activations="calibrated")
    convert(source, tmp_path / "b", Options(activations="constant"))
    a, b = (models.read_all(tmp_path / name) for name in "ab")
    equal(set(a), set(b))
    for name in a:
        if not name.endswith("input_scale"):
            same_bits(a[name], b[name], name)
    summary = run(source, tmp_path / "c", Calibration(gptq=None), format=NVFP4(scale_rule="search", error="hessian"))
    proven(tmp_path / "c", source)
    equal({group["method"] for group in summary.groups}, {"nearest"})


def test_scales_of_fused_layers_are_equal_and_right(tmp_path: Path) -> None:
    source = models.moe().save(tmp_path / "source")
    run(source, tmp_path / "out", **W4A4)
    found = models.read_all(tmp_path / "out")
    for i in range(2):
        for parameter in ("weight_scale_2", "input_scale"):
            qkv = {float(found[f"model.layers.{i}.self_attn.{p}_proj.{parameter}"]) for p in "qkv"}
            equal(len(qkv), 1)
            for e in range(models.EXPERTS):
                pair = {float(found[f"model.layers.{i}.mlp.experts.{e}.{p}_proj.{parameter}"]) for p in ("gate", "up")}
                equal(len(pair), 1)
        for part in ("k_proj.k_scale", "v_proj.v_scale"):
            true(found[f"model.layers.{i}.self_attn.{part}"] >= 1, part)
    close(found[Q_PROJ] * 2688, attention_inputs(found).max(), 1e-4)


Q_PROJ = "model.layers.0.self_attn.q_proj.input_scale"


def attention_inputs(tensors: dict[str, Tensor]) -> Tensor:
    """Magnitudes of what flows into the first attention, of all windows."""
    embedded = tensors["model.embed_tokens.weight"].float()[windows().ids]
    normed = embedded * (embedded.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (normed * tensors["model.layers.0.input_layernorm.weight"].float()).abs()


def test_observers_and_head_room_reach_the_input_scales(tmp_path: Path) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    observer = ObserverOptions("percentile", percentile=75.0, headroom=2.0)
    run(source, tmp_path / "out", Calibration(gptq=None, observer=observer), activations="calibrated")
    found = models.read_all(tmp_path / "out")
    parts = attention_inputs(found).chunk(SPANS)
    wanted = 2 * max(float(part.flatten().kthvalue(round(0.75 * part.numel())).values) for part in parts)
    close(found[Q_PROJ] * 2688, torch.tensor(wanted), 1e-4)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_layer_sees_what_the_quantized_ones_before_it_give(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    source = MODELS[name]().save(tmp_path / "source")
    run(source, tmp_path / "out", activations="calibrated")
    dequantize(tmp_path / "out", tmp_path / "plain", dtype="float32")
    seen = {}
    for directory in ("source", "plain"):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype=torch.float32).eval()
        inputs: list[Tensor] = []
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].abs().amax())
        )
        with torch.no_grad():
            model(windows().ids)
        seen[directory] = inputs[0]
    found = models.read_all(tmp_path / "out")["model.layers.1.self_attn.q_proj.input_scale"] * 2688
    close(found, seen["plain"], 1e-5 * float(found))
    true(abs(seen["source"] - found) > 1e-4 * found, "the original layers give the same")


EMBED = "model.embed_tokens.weight"


def test_an_expert_that_no_token_reaches(tmp_path: Path) -> None:
    model = models.moe()
    embed, gate = (model.tensors[name].clone() for name in (EMBED, "model.layers.1.mlp.gate.weight"))
    embed[:, 0] = 4.0  # far above the other channels, so that its sign survives to the router
    gate[:, 0], gate[2, 0] = 1.0, -1.0
    directory = model.plus({EMBED: embed, "model.layers.1.mlp.gate.weight": gate}).save(tmp_path / "source")
    summary = run(directory, tmp_path / "out", **W4A4)
    counts = summary.routed["model.layers.1.mlp.experts"]
    equal(sum(counts), 2 * windows().ids.numel())
    equal(counts[2], 0)
    proven(tmp_path / "out", directory)
    nearest = [g for g in summary.groups if g["names"][0].startswith("model.layers.1.mlp.experts.2.")]
    equal({g["method"] for g in nearest}, {"nearest"})
    path = "model.layers.1.mlp.experts.2"
    for wanted in (f"{path}: 0 tokens, of 192 on average", f"{path}.down_proj: no token reached it; its input scale"):
        true(any(warning.startswith(wanted) for warning in summary.warnings), f"{wanted!r} of {summary.warnings}")
    found = models.read_all(tmp_path / "out")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        scales = [found[f"model.layers.1.mlp.experts.{e}.{projection}.input_scale"] for e in range(models.EXPERTS)]
        reached = [scale for scale, count in zip(scales, counts, strict=True) if count]
        equal(scales[2], torch.stack(reached).amax(), projection)


def test_every_expert(tmp_path: Path) -> None:
    source = models.moe().save(tmp_path / "source")
    summary = run(source, tmp_path / "out", Calibration(every_expert=True), **W4A4)
    proven(tmp_path / "out", source)
    experts = [group for group in summary.groups if ".experts." in group["names"][0]]
    equal({group["tokens"] for group in experts}, {windows().ids.numel()})
    equal(sum(summary.routed["model.layers.0.mlp.experts"]), 2 * windows().ids.numel())


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    source = models.moe().save(tmp_path / "source")
    run(source, tmp_path / "whole", **W4A4)

    def stop(text: str, share: float) -> None:
        if text.startswith("layer 2"):
            raise KeyboardInterrupt

    options = Options(format=SEARCH, **W4A4)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "out", options, Calibration(), windows(), progress=stop)
    with pytest.raises(CheckpointError, match="--resume"):
        run(source, tmp_path / "out", **W4A4)
    with pytest.raises(CheckpointError, match=r"calibration\.gptq\.damping was 0\.01, now is 0\.1"):
        run(source, tmp_path / "out", Calibration(gptq=GPTQ(damping=0.1)), resume=True, **W4A4)
    with pytest.raises(CheckpointError, match=r"options\.kv_cache was 'fp8_calibrated', now is 'none'"):
        run(source, tmp_path / "out", resume=True, activations="calibrated")
    run(source, tmp_path / "out", resume=True, **W4A4)
    equal(files(tmp_path / "out"), files(tmp_path / "whole"))


def test_interrupted_before_there_is_anything(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")

    def stop(text: str, share: float) -> None:
        equal(text, "building the model")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "out", Options(format=SEARCH), Calibration(), windows(), progress=stop)
    equal([path.name for path in tmp_path.iterdir()], ["source"])


def test_a_changed_source_is_not_resumed(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")

    def stop(text: str, share: float) -> None:
        if text.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "out", Options(format=SEARCH), Calibration(), windows(), progress=stop)
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    model = models.dense()
    at = data.index(model.tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8).numpy().tobytes()[:64])
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="layer 0: its weights have changed"):
        run(source, tmp_path / "out", resume=True)


def test_spilled_activations_change_nothing(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")
    run(source, tmp_path / "a")
    run(source, tmp_path / "b", Calibration(spill=1))
    equal(files(tmp_path / "a"), files(tmp_path / "b"))


def _rank(rank: int, where: Path) -> None:
    """One of two: a whole calibration; one that fails in layer 1, on rank 1; and one in which rank 1 dies there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where / 'meet'}", rank=rank, world_size=2)
    run(where / "source", where / "two", **W4A4)
    forward = Step._forward

    def fails(self: Step, *arguments: Any, **keywords: Any) -> None:
        if self.index == 1 and rank == 1:
            raise ShapeError("no luck")
        forward(self, *arguments, **keywords)

    Step._forward = fails  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="^layer 1: no luck$" if rank == 1 else "^rank 1: layer 1: no luck$"):
        run(where / "source", where / "failed", **W4A4)
    (where / f"{rank}.told").touch()
    Step._forward = lambda self, *a, **k: os._exit(9) if self.index == 1 and rank == 1 else forward(self, *a, **k)
    run(where / "source", where / "died", **W4A4)


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(tmp_path: Path) -> None:
    """Both at once, or a single process that goes on with what two have left."""
    source = models.moe().save(tmp_path / "source")
    with pytest.raises(ProcessExitedException, match="exit code 9"):
        torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    true((tmp_path / "0.told").exists() and (tmp_path / "1.told").exists(), "an error that does not reach both")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(source, tmp_path / "one", **W4A4)
        for name in ("failed", "died"):
            true((tmp_path / f"{name}.partial" / "layer-00000.json").exists(), f"{name}: layer 0 is not kept")
            run(source, tmp_path / name, resume=True, **W4A4)
    finally:
        torch.set_num_threads(threads)
    for name in ("two", "failed", "died"):
        equal(files(tmp_path / "one"), files(tmp_path / name), name)
        true(not (tmp_path / f"{name}.partial").exists(), f"{name}: left something")


def test_mixed_formats(tmp_path: Path) -> None:
    source = models.moe().save(tmp_path / "source")
    summary = run(source, tmp_path / "out", overrides=(FormatOverride(MXFP8(), (), ("attention",)),))
    proven(tmp_path / "out", source)
    true(all(".self_attn." not in group["names"][0] for group in summary.groups), "attention is MXFP8")


def test_verify_notices_what_no_calibration_does(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")
    other = models.dense()
    weight = other.tensors["model.layers.0.mlp.up_proj.weight"]
    other.plus({"model.layers.0.mlp.up_proj.weight": weight.roll(1, 0)}).save(tmp_path / "other")
    run(source, tmp_path / "out")
    found = [str(finding) for finding in verify_source(tmp_path / "out", tmp_path / "other")]
    equal(len(found), 1)
    true("up_proj.weight: is 1" in found[0] and "rounding to nearest" in found[0], found[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_model"}, "transformers cannot build 'no_such_model'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already"),
    ],
)
def test_models_that_cannot_be_calibrated(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = models.dense().configured(**change).save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "out")
    equal(sorted(path.name for path in tmp_path.iterdir()), ["source"])


def test_layers_path(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")
    run(source, tmp_path / "a", Calibration(layers_path="model.layers"))
    with pytest.raises(CheckpointError, match=r"--layers-path model\.blocks.*model\.layers \(2\)"):
        run(source, tmp_path / "b", Calibration(layers_path="model.blocks"))


@pytest.mark.parametrize("layer", [0, 1])
def test_nan_names_the_module(tmp_path: Path, layer: int) -> None:
    """No output; and where a layer was done, what `--resume` needs."""
    model = models.dense()
    norm = model.tensors[f"model.layers.{layer}.input_layernorm.weight"]
    norm[3] = torch.nan
    source = model.save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{layer}\.self_attn\.k_proj: its inputs contain NaN"):
        run(source, tmp_path / "out")
    equal(sorted(path.name for path in tmp_path.iterdir()), ["out.partial", "source"] if layer else ["source"])


def test_too_few_samples_and_existing_output(tmp_path: Path) -> None:
    source = models.dense().save(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        run(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        model_windows(source, None, 8, 32)
