"""Where transformers builds a model: its code is not run, even by somebody who says yes; and no pickle is opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halfbyte
from halfbyte import CheckpointError
from halfbyte.calib.calibrate import calibrate, model_windows
from halfbyte.calib.data import Windows
from halfbyte.calib.options import Calibration
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.evaluate import load_float32

from .check import equal, true
from .checkpoint import models

pytest.importorskip("transformers")
Use = Callable[[Path, Path], Any]
WINDOWS = Windows(torch.zeros(8, 8, dtype=torch.long), "zeros")
USES: dict[str, Use] = {
    "load": lambda source, out: (convert(source, out, Options()), halfbyte.load(out)),
    "calibrate": lambda source, out: calibrate(source, out, Options(), Calibration(), WINDOWS),
    "tokenize": lambda source, out: model_windows(source, None, 8, 32),
    "evaluate": lambda source, out: load_float32(source),
}


@pytest.mark.parametrize("model_type", ["evil", "vit"])  # vit: transformers knows the config, but no language model
@pytest.mark.parametrize("use", USES)
def test_code_of_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, model_type: str) -> None:
    """transformers would ask, and run it for anyone who types y."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    classes = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    source = models.dense(layers=1).configured(model_type=model_type, auto_map=classes).save(tmp_path / "source")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.AutoTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        USES[use](source, tmp_path / "out")
    true(not (tmp_path / "pwned").exists(), "the model's code was run")


def test_a_pickle_is_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    opened: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a))
    with pytest.raises(CheckpointError, match="safetensors"):
        load_float32(source)
    equal(opened, [])
