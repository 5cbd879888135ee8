"""`halfbyte calibrate` on the model that ships with the package."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli import app

from ..check import equal, true

pytest.importorskip("transformers")
TINY = str(Path(halfbyte.__file__).parent / "data" / "tiny")
SMALL = ["--samples", "8", "--sequence-length", "64"]


def invoke(*arguments: str) -> tuple[int, dict]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_calibrate_and_verify(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, found = invoke("calibrate", TINY, out, "--recipe", "nvfp4-gptq", *SMALL)
    equal(code, 0)
    equal(found["unequal_fused_scales"], 0)
    equal((found["weights_searched"], found["weights_to_search"]), (119, 119))
    calibration = found["calibration"]
    true(calibration["methods"]["gptq"] > 60 and calibration["saturated_blocks"] < 5, str(calibration["methods"]))
    equal([len(counts) for counts in calibration["expert_tokens"].values()], [8, 8, 8, 8])
    equal(invoke("verify", out, "--source", TINY), (0, {"ok": True, "findings": []}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nvfp4-w4a16"], "needs no data"),
        (["--recipe", "nvfp4-gptw"], "did you mean nvfp4-gptq"),
        (["--samples", "100000"], "give more text"),
        (["--data", "none.txt"], "no such file"),
        (["--dtype", "float8"], "choose float32 or bfloat16"),
        (["--spill-gb", "0"], "must be positive"),
        (["--layers-path", "model.blocks", *SMALL], "not 5 layers"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, found = invoke("calibrate", TINY, str(tmp_path / "out"), *arguments)
    equal(code, 2)
    true(message in found["error"], found["error"])
    equal(list(tmp_path.iterdir()), [])
