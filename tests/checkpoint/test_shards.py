"""Streaming safetensors: reading any tensor of any file, writing in any order, and outputs that appear whole."""

import hashlib
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import CheckpointError
from halfbyte.checkpoint import shards
from halfbyte.checkpoint.shards import Checkpoint, ShardWriter, companions, copy_companions, whole_or_nothing

from ..check import equal, same_bits, true
from . import models

TENSORS = {
    "b.f32": torch.arange(6.0).reshape(2, 3),
    "a.bf16": torch.arange(5.0).bfloat16(),
    "c.f8": torch.tensor([1.0, -2.0, float("nan")]).to(torch.float8_e4m3fn),
    "d.u8": torch.arange(7, dtype=torch.uint8),
    "e.scalar": torch.tensor(3.5),
    "f.empty": torch.zeros(0, 4),
    "g.bool": torch.tensor([True, False]),
    "h.i64": torch.tensor([1 << 40]),
}


def entries() -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (shards.tensor_dtype(t), tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize("files", [1, 2, 7])
def test_reads_every_tensor(tmp_path: Path, files: int) -> None:
    model = models.moe()
    checkpoint = Checkpoint(model.save(tmp_path / "m", files))
    equal(set(checkpoint.tensors), set(model.tensors))
    for name, tensor in model.tensors.items():
        same_bits(checkpoint.read(name), tensor, name)
        info = checkpoint.tensors[name]
        equal((info.dtype, info.shape, info.nbytes), ("BF16", tuple(tensor.shape), tensor.nbytes), name)
    equal(len({info.file for info in checkpoint.tensors.values()}), files)
    equal((checkpoint.config, checkpoint.metadata), (model.config, {"format": "pt"}))
    equal(checkpoint.nbytes, sum(t.nbytes for t in model.tensors.values()))


def test_reads_parts(tmp_path: Path) -> None:
    model = models.stack(models.moe())
    checkpoint = Checkpoint(model.save(tmp_path / "m"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    same_bits(checkpoint.read(name, (2, slice(32, 64))), model.tensors[name][2, 32:64])


def test_any_file_name_will_do_alone(tmp_path: Path) -> None:
    directory = models.dense().save(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    equal({info.file for info in Checkpoint(directory).tensors.values()}, {"weights.safetensors"})


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    directory = models.dense().save(tmp_path / "m", 3)
    (directory / "consolidated.safetensors").write_bytes(b"of another program")
    equal(len(Checkpoint(directory).tensors), len(models.dense().tensors))


def test_writes_in_any_order(tmp_path: Path) -> None:
    written = []
    for order in range(3):
        names = sorted(TENSORS)
        random.Random(order).shuffle(names)
        path = tmp_path / f"{order}.safetensors"
        with ShardWriter(path, entries()) as writer:
            for name in names:
                writer.write(name, TENSORS[name])
        written.append(path.read_bytes())
        for name, tensor in load_file(path).items():
            same_bits(tensor, TENSORS[name], name)
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            equal(shards.tensor_digest(tensor), hashlib.sha256(data).hexdigest())
    true(written[0] == written[1] == written[2], "the file depends on the order of writing")


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, entries()) as writer:
        for name in TENSORS:
            writer.write(name, TENSORS[name])
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    equal((8 + length) % 8, 0)
    for name, tensor in TENSORS.items():
        equal(header[name]["data_offsets"][0] % tensor.element_size(), 0, name)


def test_strided_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).mT
    with ShardWriter(tmp_path / "x.safetensors", {"x": ("F32", (4, 3))}) as writer:
        writer.write("x", tensor)
    same_bits(load_file(tmp_path / "x.safetensors")["x"], tensor.contiguous())


def test_output_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with whole_or_nothing(output) as temporary:
        true(not output.exists() and temporary.parent == tmp_path, "written beside its place")
        (temporary / "a").write_text("a")
    equal([path.name for path in tmp_path.iterdir()], ["out"])
    equal((output / "a").read_text(), "a")
    equal(output.stat().st_mode & 0o777, 0o755)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_or_not_at_all(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with whole_or_nothing(tmp_path / "out") as temporary:
            (temporary / "a").write_text("a")
            raise error

    with pytest.raises(error):
        fail()
    equal(list(tmp_path.iterdir()), [])


def test_output_must_not_exist(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "link", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="already exists; choose another"), whole_or_nothing(path):
            pass
    with pytest.raises(CheckpointError, match="no such directory to put the output in"):
        whole_or_nothing(tmp_path / "no" / "out").__enter__()
    equal((tmp_path / "file").read_text(), "mine")


def test_companions(tmp_path: Path) -> None:
    directory = models.dense().save(tmp_path / "m", 2)
    for name in ("modeling_x.py", "tokenizer.model", "LICENSE", "merges.txt"):
        (directory / name).write_text(name)
    left_out = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.safetensors"]
    for name in [*left_out, "x.pth", "hf_quant_config.json", "halfbyte.json", ".gitattributes"]:
        (directory / name).write_text("not to be copied")
    for name in ("original", "additional_chat_templates"):
        (directory / name).mkdir()
        (directory / name / "tools.jinja").write_text(name)
    wanted = sorted(
        [
            "additional_chat_templates/tools.jinja",
            *models.COMPANIONS,
            "modeling_x.py",
            "tokenizer.model",
            "LICENSE",
            "merges.txt",
        ]
    )
    equal(companions(directory), wanted)
    (tmp_path / "copy").mkdir()
    copy_companions(directory, tmp_path / "copy")
    files = (path for path in (tmp_path / "copy").rglob("*") if path.is_file())
    copied = {path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes() for path in files}
    equal(copied, {name: (directory / name).read_bytes() for name in wanted})
