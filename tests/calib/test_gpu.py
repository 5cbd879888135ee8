"""Calibration with everything on a GPU: proven, the same bytes again, and as near to the model as on a CPU."""

from pathlib import Path

import pytest
import torch

from halfbyte import NVFP4
from halfbyte.calib.calibrate import calibrate
from halfbyte.calib.options import Calibration
from halfbyte.calib.runner import Summary
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.verify import verify_structure

from ..check import equal, true
from .test_calibrate import MODELS, W4A4, files, windows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
FORMATS = [
    NVFP4(scale_rule="search"),
    NVFP4(scale_rule="search", error="hessian"),
    NVFP4(scale_rule="search", error="mae"),
    NVFP4(scale_rule="four_over_six"),
]


def run(source: Path, out: Path, fmt: NVFP4, device: str, gptq: bool = True) -> Summary:
    calibration = Calibration() if gptq else Calibration(gptq=None)
    return calibrate(source, out, Options(format=fmt, **W4A4), calibration, windows(), device=device)[1]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_on_the_gpu(tmp_path: Path, name: str, fmt: NVFP4) -> None:
    source = MODELS[name]().save(tmp_path / "source")
    found = {device: run(source, tmp_path / device, fmt, device) for device in ("cuda", "cpu")}
    equal([str(f) for f in (*verify_structure(tmp_path / "cuda"), *verify_source(tmp_path / "cuda", source))], [])
    # Another order of sums may move a code, and a moved code a token to another expert: so not each group by itself.
    methods, errors = (
        {device: [g[key] for g in summary.groups if g["error"] is not None] for device, summary in found.items()}
        for key in ("method", "error")
    )
    equal((set(methods["cuda"]), set(methods["cpu"])), ({"gptq"}, {"gptq"}))
    means = {device: sum(values) / len(values) for device, values in errors.items()}
    true(0.9 * means["cpu"] < means["cuda"] < 1.1 * means["cpu"], f"{means}")
    routed = {device: [sum(counts) for counts in summary.routed.values()] for device, summary in found.items()}
    equal(routed["cuda"], routed["cpu"])
    run(source, tmp_path / "again", fmt, "cuda")
    equal(files(tmp_path / "cuda"), files(tmp_path / "again"))


def test_nearest_with_a_hessian_search(tmp_path: Path) -> None:
    source = MODELS["dense"]().save(tmp_path / "source")
    run(source, tmp_path / "out", FORMATS[1], "cuda", gptq=False)
    equal([str(f) for f in (*verify_structure(tmp_path / "out"), *verify_source(tmp_path / "out", source))], [])
