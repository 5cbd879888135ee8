"""Memory does not depend on a model's size: a process of its own converts, and says what it needed at most."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint.shards import shard_header

from ..check import true
from . import models

RUN = """
import json, resource, sys
from pathlib import Path
from halfbyte.checkpoint import convert
from halfbyte.checkpoint.options import Options
convert.MEMORY = int(sys.argv[3])
convert.convert(Path(sys.argv[1]) / "warm", Path(sys.argv[1]) / "warm-out", Options())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
convert.convert(Path(sys.argv[1]) / "source", Path(sys.argv[2]), Options(), max_shard_bytes=500_000_000)
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def zeros(directory: Path, layers: int, hidden: int, width: int, fp8: bool = False) -> int:
    """A dense model of zeros, which take no room on the disk; returns its bytes. fp8: with a scale for each 128×128."""
    model = models.dense(layers=1, bias=False).configured(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=width
    )
    if fp8:
        model = model.configured(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(model.config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{leaf}_proj.weight": (hidden // 4, hidden) for leaf in "qkv"}
        shapes |= {f"{at}.mlp.{leaf}_proj.weight": (width, hidden) for leaf in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, width)
    tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    if fp8:
        linears = {name: shape for name, shape in shapes.items() if "_proj" in name}
        tensors |= {name: ("F8_E4M3", shape) for name, shape in linears.items()}
        tensors |= {f"{n}_scale_inv": ("F32", tuple(-(-s // 128) for s in shape)) for n, shape in linears.items()}
    header, infos = shard_header("model.safetensors", tensors)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        size = sum(info.nbytes for info in infos.values())
        file.truncate(len(header) + size)
    return size


def peak(root: Path, memory: int) -> tuple[int, int]:
    """Bytes of the process before the conversion and at most."""
    models.dense(layers=1).save(root / "warm")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(root), str(root / "out"), str(memory)],
        capture_output=True,
        text=True,
        check=False,
    )
    true(done.returncode == 0, done.stderr)
    before, most = json.loads(done.stdout)
    return before, most


def test_a_small_budget(tmp_path: Path) -> None:
    """560 MB in groups of up to 34 MB, with 40 MB held; the rest is what one weight needs while it is done."""
    size = zeros(tmp_path / "source", layers=10, hidden=2048, width=4096)
    before, most = peak(tmp_path, memory=40_000_000)
    true(size > 530_000_000, f"only {size} bytes")
    true(most - before < 330_000_000, f"{most - before} bytes for {size}")


@pytest.mark.slow
def test_a_small_budget_for_fp8(tmp_path: Path) -> None:
    """Groups of 17 million weights, 67 MB once decoded; one that is decoded is never beside another."""
    size = zeros(tmp_path / "source", layers=10, hidden=2048, width=4096, fp8=True)
    before, most = peak(tmp_path, memory=80_000_000)
    true(size > 260_000_000, f"only {size} bytes")
    true(most - before < 400_000_000, f"{most - before} bytes for {size}")


@pytest.mark.slow
def test_three_gigabytes(tmp_path: Path) -> None:
    """4.5 GB with fused groups of just under 1 GB."""
    size = zeros(tmp_path / "source", layers=3, hidden=11_264, width=21_504)
    before, most = peak(tmp_path, memory=1_000_000_000)
    true(size > 4_100_000_000, f"only {size} bytes")
    true(most < 3_000_000_000, f"{most} bytes, of which {before} before it began")
