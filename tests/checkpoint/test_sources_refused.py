"""What encoded sources are refused for: no wrong label passes, and nothing of a quantized weight is left over."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbyte import CheckpointError
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.sources import open_source

from ..check import equal, same_bits, true
from . import encoded, models
from .encoded import SOURCES, Encoded
from .models import Model
from .test_hostile import FUZZ, JUNK, TEXT_OF

UP = "model.layers.0.mlp.up_proj.weight"


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
            "down_proj.weight_scale_inv: belongs to a quantized weight, but not to one of NVFP4 (quant_method",
            "the config and the tensors disagree. Found weight F8_E4M3 [64, 96], weight_scale_inv F32 [2, 3]",
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


FUZZED = ["DeepSeek", "compressed-tensors by channel", "compressed-tensors NVFP4", "ModelOpt FP8", "gpt-oss"]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Encoded, Path]]:
    root = tmp_path_factory.mktemp("fuzzed")
    sources = {name: SOURCES[name]() for name in FUZZED}
    return [(source, source.model.save(root / name.replace(" ", "-"))) for name, source in sources.items()]


@FUZZ
@given(data=st.data())
def test_fuzzed_labels(fuzzed: list[tuple[Encoded, Path]], data: st.DataObject) -> None:
    """Whatever a config says, weights decode to what they are, or are refused with a CheckpointError."""
    source, directory = data.draw(st.sampled_from(fuzzed))
    config = copy.deepcopy(source.model.config)
    places = [config["quantization_config"]]
    for place in places:
        places += [value for value in place.values() if isinstance(value, dict)]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(place) or ["a"]) | st.sampled_from(["format", "strategy"]) | TEXT_OF)
        place[key] = data.draw(JUNK | st.sampled_from(["fp8", "tensor", "group", "block", "FP8", "NVFP4", "int", 4, 8]))
    (directory / "config.json").write_text(json.dumps(config))
    try:
        found = open_source(directory, requantize=True)
    except CheckpointError:
        return
    if found.config.get("quantization_config") is not None or not any(i.decoded for i in found.tensors.values()):
        return  # it does not say any more that it is quantized: make_plan refuses the scales that are left
    name = min(source.decoded)
    same_bits(found.read(name).float(), source.decoded[name])
