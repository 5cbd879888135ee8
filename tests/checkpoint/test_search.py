"""Searched scales in checkpoints: what is written, counted and proven."""

from pathlib import Path

import pytest
import torch

from halfbyte import NVFP4, CheckpointError
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.policy import FormatOverride
from halfbyte.report.console import report_json

from ..check import equal, true
from . import models
from .test_verify import make

SEARCH = NVFP4(scale_rule="search")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fmt",
    [
        SEARCH,
        NVFP4(scale_rule="search", error="mae", e4m3_max=320),
        NVFP4(scale_rule="search", block=(16, 16), e4m3_max=256),
    ],
    ids=["mse", "mae-320", "16x16-256"],
)
def test_it_is_recognised_without_the_record(tmp_path: Path, fmt: NVFP4) -> None:
    source, out = make(tmp_path, models.dense(layers=1), format=fmt)
    (out / "halfbyte.json").unlink()
    equal([str(f) for f in (*verify_structure(out), *verify_source(out, source))], [])


def test_it_errs_less_than_every_other_rule(tmp_path: Path) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    rules = (SEARCH, NVFP4(scale_rule="four_over_six", error="mse", e4m3_max=448), NVFP4())
    errors = [convert(source, tmp_path / str(i), Options(fmt)).relative_error() for i, fmt in enumerate(rules)]
    equal(errors, sorted(errors))
    equal(len(set(errors)), 3)


def test_counts(tmp_path: Path) -> None:
    """Those that an override quantizes otherwise are not expected."""
    overrides = (FormatOverride(NVFP4(), kinds=("attention",)),)
    source = models.moe().save(tmp_path / "source")
    report = report_json(convert(source, tmp_path / "out", Options(SEARCH, overrides=overrides)))
    count = 2 * models.EXPERTS * 3
    equal([report[key] for key in ("weights_searched", "weights_to_search")], [count, count])
    equal((report["weights_quantized"], report["unequal_fused_scales"]), (count + 8, 0))


def test_extreme_weights_give_no_nan_scale(tmp_path: Path) -> None:
    """Zeros, subnormal maxima, and blocks at both ends of one tensor's range: no scale byte is NaN or negative."""
    model = models.dense(layers=1, bias=False, dtype=torch.float32)
    path = "model.layers.0.mlp"
    wide = torch.randn(64, 96).clamp(-3, 3) * torch.logspace(-38, 38, 64)[:, None]  # none is infinite
    extreme = {f"{path}.down_proj.weight": wide, f"{path}.up_proj.weight": torch.zeros(96, 64)}
    extreme |= {f"{path}.gate_proj.weight": torch.full((96, 64), 1e-44)}
    source, out = make(tmp_path, model.plus(extreme), format=SEARCH)
    equal([str(f) for f in (*verify_structure(out), *verify_source(out, source))], [])
    tensors = models.read_all(out)
    scales = [t.view(torch.uint8) for name, t in tensors.items() if name.endswith("weight_scale")]
    true(all(int(scale.max()) <= 126 for scale in scales), "a scale byte is NaN or negative")
    true(
        all(t.isfinite() and t > 0 for name, t in tensors.items() if name.endswith("_2")),
        "a tensor scale is not finite",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"format": NVFP4(scale_rule="search", error="hessian")},
        {"overrides": (FormatOverride(NVFP4(scale_rule="search", error="hessian"), kinds=("mlp",)),)},
        {"activations": "calibrated"},
        {"kv_cache": "fp8_calibrated"},
    ],
    ids=str,
)
def test_what_needs_data_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="needs calibration data: use `halfbyte calibrate`"):
        make(tmp_path, models.dense(layers=1), **options)
    true(not (tmp_path / "out").exists(), "something was written")
