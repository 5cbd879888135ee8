"""Files made to do harm: each is refused with its name, quickly, in little memory, and without a trace on the disk.

What is merely broken is in test_bad_input.py.
"""

import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte import CheckpointError
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.dequantize import dequantize
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.shards import Checkpoint
from halfbyte.checkpoint.verify import verify_structure

from ..check import equal, true
from . import models
from .models import INDEX

WEIGHTS = "model.safetensors"
SHARD = "model-00002-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
Spoil = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three minutes on a busy machine, 500 MB, and a working directory in which nothing may appear."""

    def late(*_: object) -> None:
        raise AssertionError("hangs")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch, "load", lambda *a, **k: (_ for _ in ()).throw(AssertionError("a pickle was loaded")))
    before = signal.signal(signal.SIGALRM, late)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(180)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    true(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000, "memory grew by more than 500 MB")
    equal(os.listdir(tmp_path / "here"), [])


def refused(root: Path, source: Path, *names: str) -> str:
    """By conversion, with an error that has these names; and verify finds something rather than to fail."""
    before = sorted(root.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        convert(source, root / "out", Options())
    message = str(caught.value)
    for name in names:
        true(name in message, f"{name!r} is not in: {message[:300]!r}")
    true(message.isprintable() and len(message) < 2000, f"unfit for a terminal: {message[:300]!r}")
    equal(sorted(root.rglob("*")), before)
    true(list(verify_structure(source)) != [], "verify found nothing")
    with pytest.raises(CheckpointError):
        dequantize(source, root / "out")
    equal(sorted(root.rglob("*")), before)
    return message


# --- headers ----------------------------------------------------------------------------------------------------------

GOOD = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def raw(header: bytes | dict[str, Any], data: bytes = b"1234", length: int | None = None) -> Spoil:
    """The weights' file as these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def spoil(source: Path) -> None:
        (source / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return spoil


def entry(name: str = "a", **values: Any) -> Spoil:
    """One tensor of four bytes, with something changed; None takes a key away."""
    return raw({name: {key: value for key, value in (GOOD | values).items() if value is not None}})


def sparse(size: int, length: int) -> Spoil:
    """A file that is large but takes no space."""

    def spoil(source: Path) -> None:
        with (source / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(size)

    return spoil


TEXT = json.dumps(GOOD).encode()
HEADERS: dict[str, Spoil] = {
    "length 2^64 - 1": raw(b"{}", length=2**64 - 1),
    "length 2^63": raw(b"{}", length=2**63),
    "length beyond the file": raw(b"{}", length=50_000_000),
    "length above the limit": sparse(200_000_000, 150_000_000),
    "length of zeros": sparse(99_000_000, 98_000_000),
    "length 0": raw(b"{}", length=0),
    "length 1": raw(b"{}", length=1),
    "five bytes": lambda s: (s / WEIGHTS).write_bytes(b"12345"),
    "not JSON": raw(b"<html>"),
    "cut short": raw(b'{"a": {"dtype": "U8", "sh'),
    "a list": raw(b"[]"),
    "null": raw(b"null"),
    "deep lists": raw(b"[" * 100_000),
    "deep objects": raw(b'{"a":' * 100_000),
    "deep metadata": raw(b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001),
    "not UTF-8": raw(b'{"a\xff":' + TEXT + b"}"),
    "half a surrogate": raw(b'{"a\\ud800":' + TEXT + b"}"),
    "a name twice": raw(b'{"a":' + TEXT + b',"a":' + TEXT + b"}"),
    "a name twice, shorter": raw(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":' + TEXT + b"}"),
    "a name twice, escaped": raw(b'{"a":' + TEXT + b',"\\u0061":' + TEXT + b"}"),
    "metadata twice": raw(b'{"__metadata__":{},"__metadata__":{},"a":' + TEXT + b"}"),
    "dtype twice": raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'),
    "metadata of numbers": raw({"__metadata__": {"format": 1}, "a": GOOD}),
    "metadata a list": raw({"__metadata__": [], "a": GOOD}),
    "no dtype": entry(dtype=None),
    "no shape": entry(shape=None),
    "no offsets": entry(data_offsets=None),
    "dtype unknown": entry(dtype="F4", shape=[8]),
    "dtype a number": entry(dtype=8),
    "dtype code": entry(dtype="__import__('os').mkdir('pwned')"),
    "dtype too wide": entry(dtype="F32"),
    "dtype too narrow": entry(dtype="U8", shape=[2]),
    "shape negative": entry(shape=[-4]),
    "shape a float": entry(shape=[4.0]),
    "shape NaN": raw(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}'),
    "shape inf": raw(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}'),
    "shape a string": entry(shape="4"),
    "shape overflows": entry(shape=[2**63, 2]),
    "shape overflows to fit": entry(shape=[2**62 + 1, 4]),
    "shape 2^64": entry(shape=[2**64]),
    "shape of nothing, huge": entry(shape=[0, 2**62], data_offsets=[0, 0]),
    "shape of 10000 dimensions": entry(shape=[1] * 9999 + [4]),
    "shape deep": entry(shape=[[[[4]]]]),
    "offsets reversed": entry(data_offsets=[4, 0]),
    "offsets beyond the end": entry(data_offsets=[4, 8]),
    "offsets huge": entry(data_offsets=[2**64 - 4, 2**64]),
    "offsets negative": entry(data_offsets=[-4, 0]),
    "offsets floats": entry(data_offsets=[0.0, 4.0]),
    "offsets three": entry(data_offsets=[0, 2, 4]),
    "offsets overlapping": raw({"a": GOOD, "b": GOOD}),
    "offsets overlapping in part": raw({"a": GOOD, "b": {**GOOD, "data_offsets": [2, 6]}}, b"123456"),
    "offsets with a hole": raw({"a": GOOD, "b": {**GOOD, "data_offsets": [6, 10]}}, b"1234567890"),
    "data that belongs to nothing": raw({"a": GOOD}, b"1234" + b"x" * 1000),
    "no data": raw({"a": GOOD}, b""),
    "name empty": entry(""),
    "name of 5000 characters": entry("a" * 5000),
    "name of 5000 digits": entry(f"model.layers.{'9' * 5000}.mlp.up_proj.weight"),
    "name with an escape code": entry("a\x1b[2J\x1b[31mok"),
    "name with a line break": entry("a\nerror: none"),
    "name with a zero": entry("a\0b"),
    "name from right to left": entry("model.\u202ethgiew"),
    "a pickle": lambda s: (s / WEIGHTS).write_bytes(b"cos\nmkdir\n(S'pwned'\ntR."),
    "a zip of pickles": lambda s: torch.save({"a": torch.ones(4)}, s / WEIGHTS),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path: Path, case: str) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    HEADERS[case](source)
    refused(tmp_path, source, WEIGHTS)


@pytest.mark.parametrize("name", [b"n\xff.safetensors", b"n\x1b[2J.safetensors"])
def test_a_name_of_the_only_file(tmp_path: Path, name: bytes) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    os.rename(os.fsencode(source / WEIGHTS), os.path.join(os.fsencode(source), name))
    refused(tmp_path, source, str(source), "cannot be printed")


def test_many_tensors_of_nothing(tmp_path: Path) -> None:
    """A header that is all names costs memory in proportion to itself, and no more."""
    source = models.dense(layers=1).save(tmp_path / "source")
    raw({f"a{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}, b"")(source)
    refused(tmp_path, source, str(source))


# --- files and the index ----------------------------------------------------------------------------------------------


def index(text: bytes | dict[str, Any]) -> Spoil:
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return lambda source: (source / INDEX).write_bytes(data)


def points_to(file: str) -> Spoil:
    def spoil(source: Path) -> None:
        data = json.loads((source / INDEX).read_text())
        data["weight_map"][Q] = file
        (source / INDEX).write_text(json.dumps(data))

    return spoil


def link(name: str, target: str) -> Spoil:
    """A file replaced by a link; {root} is where the model lies."""

    def spoil(source: Path) -> None:
        outside = source.parent / "elsewhere"
        outside.mkdir()
        save_file({"a": torch.ones(4)}, outside / "secret.safetensors")
        (outside / "secret.txt").write_text("secret")
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(target.format(root=source.parent))

    return spoil


def fifo(name: str) -> Spoil:
    return lambda source: ((source / name).unlink(missing_ok=True), os.mkfifo(source / name))


def named(name: bytes) -> Spoil:
    """A file beside the weights."""

    def spoil(source: Path) -> None:
        with open(os.path.join(os.fsencode(source), name), "w"):
            pass

    return spoil


def large(name: str) -> Spoil:
    return lambda source: os.truncate(source / name, 3_000_000_000)


FILES: dict[str, tuple[Spoil, str]] = {
    **{
        f"path {file!r}": (points_to(file), INDEX)
        for file in (
            *("../../etc/passwd", "/etc/passwd", "../x.safetensors", "a/../../x.safetensors", "/x.safetensors", ".."),
            *(".", "", "~/x.safetensors", "file:///x.safetensors", "https://example.com/x.safetensors"),
            *("a\\..\\x.safetensors", "\\\\host\\x.safetensors"),
            *("x.safetensors/", "x.safetensors\n", "x.safetensors\0", "x.py", "x.safetensors.bin"),
        )
    },
    **{
        f"shell in a path: {file!r}": (points_to(file), file)
        for file in ("$(mkdir pwned).safetensors", "`mkdir pwned`.safetensors", "-rf.safetensors", "a;ls.safetensors")
    },
    "HTML in a path": (points_to("<img src=x onerror=alert(1)>.safetensors"), "onerror"),
    "path too long": (points_to("x" * 10_000 + ".safetensors"), INDEX),
    "index a list": (index(b"[]"), INDEX),
    "index deep": (index(b'{"weight_map":' * 50_000), INDEX),
    "index rather deep": (index(b'{"weight_map":' + b'{"a":' * 400 + b"1" + b"}" * 401), INDEX),
    "index not UTF-8": (index(b'{"weight_map":{"\xff":"x.safetensors"}}'), INDEX),
    "index with half a surrogate": (index(b'{"weight_map":{"\\udcff":"x.safetensors"}}'), INDEX),
    "index with NaN": (index(b'{"weight_map":{"a":NaN}}'), INDEX),
    "index with inf": (index(b'{"weight_map":{"a":-Infinity}}'), INDEX),
    "index with a key twice": (index(b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'), INDEX),
    "index with two maps": (index(b'{"weight_map":{},"weight_map":{"a":"y.safetensors"}}'), INDEX),
    "index with a long number": (index(b'{"weight_map":{"a":' + b"9" * 10_000 + b"}}"), INDEX),
    "index with a list of files": (index({"weight_map": {"a": ["x.safetensors"]}}), INDEX),
    "index with an escape code": (index({"weight_map": {"a\x1b[2J": "x.safetensors"}}), INDEX),
    "index of 30000 files": (index({"weight_map": {f"a{i}": f"{i}.safetensors" for i in range(30_000)}}), "shard is"),
    "index of 3 GB": (large(INDEX), INDEX),
    "index a pipe": (fifo(INDEX), INDEX),
    "shard a pipe": (fifo(SHARD), SHARD),
    "shard a device": (link(SHARD, "/dev/zero"), SHARD),
    "shard a link to itself": (link(SHARD, SHARD), SHARD),
    "index a link to itself": (link(INDEX, INDEX), "safetensors files but no"),
    "config a link to itself": (link("config.json", "config.json"), "config.json"),
    "a file name that is not Unicode": (named(b"n\xff.txt"), "'n\\udcff.txt' cannot be printed"),
    "a file name with an escape code": (named(b"a\x1b[2J.txt"), "'a\\x1b[2J.txt' cannot be printed"),
    "shard a link to nothing": (link(SHARD, "nothing"), SHARD),
    "shard a link outside": (link(SHARD, "{root}/elsewhere/secret.safetensors"), SHARD),
    "shard a link upwards": (link(SHARD, "../elsewhere/secret.safetensors"), SHARD),
    "tokenizer a link outside": (link("tokenizer.json", "{root}/elsewhere/secret.txt"), "tokenizer.json"),
    "templates a link outside": (link("additional_chat_templates", "{root}/elsewhere"), "additional_chat_templates"),
    "config a link outside": (link("config.json", "{root}/elsewhere/secret.txt"), "config.json"),
    "config a pipe": (fifo("config.json"), "config.json"),
    "config of 3 GB": (large("config.json"), "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path: Path, case: str) -> None:
    source = models.dense(layers=1).save(tmp_path / "source", 3)
    spoil, name = FILES[case]
    spoil(source)
    if case.startswith("templates"):
        (tmp_path / "elsewhere" / "secret.jinja").write_text("secret")
    refused_by_convert(tmp_path, source, name)


def refused_by_convert(root: Path, source: Path, *names: str) -> None:
    before = sorted(root.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        convert(source, root / "out", Options())
    for name in names:
        true(name in str(caught.value), f"{name!r} is not in: {str(caught.value)[:300]!r}")
    true(str(caught.value).isprintable(), f"unfit for a terminal: {str(caught.value)[:300]!r}")
    equal(sorted(root.rglob("*")), before)


def test_the_hub_cache_is_all_links(tmp_path: Path) -> None:
    """snapshots/REVISION/file → ../../blobs/DIGEST: the one place that files may be linked from."""
    real = models.dense(layers=1).save(tmp_path / "real", 3)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "main").mkdir(parents=True)
    for i, path in enumerate(sorted(real.iterdir())):
        path.rename(cache / "blobs" / str(i))
        (cache / "snapshots" / "main" / path.name).symlink_to(f"../../blobs/{i}")
    convert(cache / "snapshots" / "main", tmp_path / "out", Options())
    equal(list(verify_source(tmp_path / "out", cache / "snapshots" / "main")), [])


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", INDEX, "notes.txt"])
def test_a_link_to_another_model_in_the_cache(tmp_path: Path, name: str) -> None:
    """Or to any JSON, such as somebody's credentials, that would be written into the output's config."""
    source = models.dense(layers=1).save(tmp_path / "models--a--b" / "snapshots" / "main", 3)
    blobs = tmp_path / "models--c--d" / "blobs"
    blobs.mkdir(parents=True)
    private = (source / name).read_text() if (source / name).exists() else "{}"
    (blobs / "0").write_text(private)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(blobs / "0")
    refused_by_convert(tmp_path, source, f"{name}: is a link out of the directory")


# --- the config -------------------------------------------------------------------------------------------------------


def config(text: str) -> Spoil:
    """Values put into the config, as JSON text."""

    def spoil(source: Path) -> None:
        kept = json.loads((source / "config.json").read_text())
        for key in json.loads("{" + text + "}", parse_constant=str) if text.startswith('"') else ():
            kept.pop(key, None)
        (source / "config.json").write_text("{" + text + "," + json.dumps(kept)[1:])

    return spoil


CONFIGS: dict[str, Spoil] = {
    **{
        f"num_hidden_layers {value}": config(f'"num_hidden_layers": {value}')
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-3", "0", "true", '"2"', "[2]", "2.0", "null", "{}")
    },
    "a number of 10000 digits": lambda s: (s / "config.json").write_text('{"num_hidden_layers": ' + "9" * 10_000 + "}"),
    "not UTF-8": lambda s: (s / "config.json").write_bytes(b'{"num_hidden_layers": 1, "a": "\xff"}'),
    "UTF-16": lambda s: (s / "config.json").write_text('{"num_hidden_layers": 1}', encoding="utf-16"),
    "half a surrogate": config(r'"a": "\ud800"'),
    "deep": lambda s: (s / "config.json").write_text('{"a":' * 100_000),
    "rather deep": lambda s: (s / "config.json").write_text('{"text_config":' * 600 + "{}" + "}" * 600),
    "a key twice": lambda s: (s / "config.json").write_text('{"num_hidden_layers": 1, "num_hidden_layers": 2}'),
    "quantized already": config('"quantization_config": {"quant_method": "<script>alert(1)</script>"}'),
    "quantized already, in Chinese whispers": config('"compression_config": {"quant_method": "\\u001b[2J"}'),
    "a pickle": lambda s: (s / "config.json").write_bytes(b"\x80\x04cos\nmkdir\n(S'pwned'\ntR."),
    "YAML": lambda s: (s / "config.json").write_text("!!python/object/apply:os.mkdir [pwned]"),
    "an empty file": lambda s: (s / "config.json").write_bytes(b""),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(tmp_path: Path, case: str) -> None:
    source = models.dense(layers=1).save(tmp_path / "source")
    CONFIGS[case](source)
    refused(tmp_path, source, str(source))


@pytest.mark.parametrize("key", ["hidden_size", "moe_intermediate_size", "num_experts"])
@pytest.mark.parametrize("value", ["NaN", "1e999", "-5", "1000000000000", "true", '"64"', "[]", "0"])
def test_sizes_of_experts(tmp_path: Path, key: str, value: str) -> None:
    """Numbers that a shape is held against. The number of experts may be left out, not be more than there are."""
    source = models.stack(models.moe()).save(tmp_path / "source")
    config(f'"{key}": {value}')(source)
    if key == "num_experts" and value != "1000000000000":
        convert(source, tmp_path / "out", Options())
        return
    refused_by_convert(tmp_path, source, str(source))


# --- what looks dangerous and is only text ----------------------------------------------------------------------------

NAMES = [
    "$(mkdir pwned)",
    "`mkdir pwned`",
    "; mkdir pwned;",
    "<script>alert(1)</script>",
    "../../../pwned",
    "/etc/pwned",
    "[bold red]markup[/]",
    "%s%n{0}{x.__class__}",
    "__import__('os').mkdir('pwned')",
    "experts.00.up_proj",
    "experts.²",
    "layers.²",
    "layers.٣",
    f"layers.{'9' * 900}",
    "...",
    "имя",
]


@pytest.mark.parametrize("part", NAMES)
def test_names_are_only_text(tmp_path: Path, part: str) -> None:
    """Kept as they are, and verified; nothing is run, expanded or created."""
    extra = {f"model.{part}.bias": torch.ones(4, dtype=torch.bfloat16)}
    source = models.dense(layers=1).plus(extra).save(tmp_path / "source")
    convert(source, tmp_path / "out", Options())
    equal([str(f) for f in (*verify_structure(tmp_path / "out"), *verify_source(tmp_path / "out", source))], [])
    true(set(extra) < set(Checkpoint(tmp_path / "out").tensors), "the name was changed")
    equal(sorted(path.name for path in tmp_path.iterdir()), ["here", "out", "source"])


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    """A config that asks for it; the file is copied like any other, and nothing imports it."""
    model = models.dense(layers=1).configured(
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True
    )
    source = model.save(tmp_path / "source")
    (source / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'here' / 'pwned')!r})\n")
    convert(source, tmp_path / "out", Options())
    equal(list(verify_source(tmp_path / "out", source)), [])
    equal((tmp_path / "out" / "evil.py").read_text(), (source / "evil.py").read_text())


def test_infinity_where_halfbyte_does_not_look(tmp_path: Path) -> None:
    """Configs of Mamba models have it; it is copied."""
    source = models.dense(layers=1).save(tmp_path / "source")
    config('"time_step_limit": [0.0, Infinity], "x": NaN')(source)
    convert(source, tmp_path / "out", Options())
    text = (tmp_path / "out" / "config.json").read_text()
    true("Infinity" in text and "NaN" in text, text)
    equal([str(finding) for finding in verify_source(tmp_path / "out", source)], [])


# --- quantized checkpoints, as verify and dequantize read them --------------------------------------------------------


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(out: Path) -> None:
        data = json.loads((out / name).read_text())
        change(data)
        (out / name).write_text(json.dumps(data))

    return spoil


def quantization(**values: Any) -> Spoil:
    return edit("config.json", lambda data: data["quantization_config"].update(values))


QUANTIZED: dict[str, Spoil] = {
    "ignore: a pattern that is none": quantization(ignore=["re:(", "lm_head"]),
    "ignore: exponential": quantization(ignore=[r"re:(.*)*\.(.*)*x$", "lm_head"]),
    "ignore: exponential, nested": quantization(ignore=[r"re:((a|.)+)+x$", "lm_head"]),
    "ignore: polynomial": quantization(ignore=["re:" + ".*" * 30 + "x$", "lm_head"]),
    "ignore: huge repeat": quantization(ignore=["re:(.{1,60000}){1,60000}x", "lm_head"]),
    "ignore: look back": quantization(ignore=[r"re:(.+)+\1\1\1x", "lm_head"]),
    "ignore: numbers": quantization(ignore=[1]),
    "ignore: text": quantization(ignore="lm_head"),
    "format: a list": quantization(format=["nvfp4-pack-quantized"]),
    "config_groups: a list": quantization(config_groups=[]),
    "config_groups: numbers": quantization(config_groups={"group_0": 1}),
    "config_groups: NaN": quantization(config_groups={"group_0": {"weights": {"group_size": float("nan")}}}),
    "quant_method: a list": quantization(quant_method=[]),
    "quant_method: modelopt, algorithm a list": quantization(quant_method="modelopt", quant_algo=[]),
    "quant_method: modelopt, layers": quantization(
        quant_method="modelopt", quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": {}}}
    ),
    "manifest: deep": lambda s: (s / "halfbyte.json").write_text("[" * 100_000),
    "manifest: a list": lambda s: (s / "halfbyte.json").write_text("[]"),
    "manifest: policy of numbers": edit("halfbyte.json", lambda d: d["policy"].update(ignore=[1])),
    "manifest: policy unknown": edit("halfbyte.json", lambda d: d["policy"].update(evil=1)),
    "manifest: policy layers": edit("halfbyte.json", lambda d: d["policy"].update(num_layers_at_start_in_bf16="1")),
    "manifest: format block": edit("halfbyte.json", lambda d: d["format"].update(block=5)),
    "manifest: format e4m3_max": edit("halfbyte.json", lambda d: d["format"].update(e4m3_max=[1])),
    "manifest: format unknown": edit("halfbyte.json", lambda d: d["format"].update(__class__=1)),
    "manifest: layout": edit("halfbyte.json", lambda d: d.update(layout={})),
    "manifest: kv_cache": edit("halfbyte.json", lambda d: d.update(kv_cache=[])),
    "manifest: digests": edit("halfbyte.json", lambda d: d.update(sha256={"a": 1})),
    "manifest: a pipe": fifo("halfbyte.json"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("whole")
    source = models.dense(layers=1).save(root / "source")
    convert(source, root / "out", Options(layout="compressed-tensors"))
    return source, root / "out"


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized(tmp_path: Path, whole: tuple[Path, Path], case: str) -> None:
    """verify names what is wrong, with the source and without; nothing fails or hangs."""
    out = shutil.copytree(whole[1], tmp_path / "out")
    QUANTIZED[case](out)
    file = "halfbyte.json" if case.startswith("manifest") else "config.json"
    sentences = [str(finding) for finding in verify_structure(out)]
    true(any(file in sentence for sentence in sentences), f"{sentences}")
    list(verify_source(out, whole[0]))
    if file == "config.json" and "ignore: " not in case:
        try:
            dequantize(out, tmp_path / "decoded")
        except CheckpointError as error:
            true(file in str(error), str(error))


# --- fuzzing ----------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
TEXT_OF = st.text(
    st.sampled_from('ab0./\\"{[<$\x1b\0\u202eé²\ud800'), max_size=8
)  # all of Unicode takes long to set up
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT_OF,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT_OF, children, max_size=3),
    max_leaves=6,
)


def survives(root: Path, source: Path) -> None:
    """Either it converts, and what comes out is right; or it is refused with a CheckpointError. Nothing else."""
    out = root / "out"
    for path in (out, root / "out.partial"):
        shutil.rmtree(path, ignore_errors=True)
    try:
        convert(source, out, Options())
    except CheckpointError:
        true(not out.exists() and not (root / "out.partial").exists(), "something is left behind")
        list(verify_structure(source))
        return
    equal([str(finding) for finding in verify_source(out, source)], [])
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.dense(layers=1, bias=False).save(tmp_path_factory.mktemp("model") / "source")


@FUZZ
@given(data=st.data())
def test_fuzzed_header_bytes(tmp_path: Path, model: Path, data: st.DataObject) -> None:
    """Bytes of the header changed, put in or taken out."""
    content = (model / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 8 + length - 1))
        end = at + data.draw(st.integers(0, 3))
        changed[at:end] = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"0", b"9", b",", b"[", b"{", b"-"]))
    with spoiled(model, WEIGHTS, bytes(changed)):
        survives(tmp_path, model)


@FUZZ
@given(data=st.data())
def test_fuzzed_header_values(tmp_path: Path, model: Path, data: st.DataObject) -> None:
    """A valid header with a name, dtype, shape or offset that is another."""
    content = (model / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    value = header.pop(name)
    if "dtype" in value and data.draw(st.booleans()):
        name = data.draw(st.just(name) | TEXT_OF | st.sampled_from(sorted(header)))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        numbers = st.lists(st.integers(-1, 70) | st.integers(), max_size=3)
        value[key] = data.draw(JUNK | numbers | st.sampled_from(["F32", "I64", "U8", "F8_E4M3", "BOOL", "F16"]))
    else:
        value = data.draw(JUNK)
    text = json.dumps(header | {name: value}).encode()
    with spoiled(model, WEIGHTS, struct.pack("<Q", len(text)) + text + content[8 + length :]):
        survives(tmp_path, model)


@FUZZ
@given(data=st.data())
def test_fuzzed_index(tmp_path: Path, model: Path, data: st.DataObject) -> None:
    names = sorted(Checkpoint(model).tensors)
    found: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    place = data.draw(st.sampled_from([found, found["weight_map"]]))
    key = data.draw(st.sampled_from(sorted(place)) | TEXT_OF)
    place[key] = data.draw(JUNK | st.sampled_from(["../x", "config.json", WEIGHTS, "\0", "." + WEIGHTS]))
    with spoiled(model, INDEX, json.dumps(found).encode()):
        survives(tmp_path, model)


@FUZZ
@given(data=st.data())
def test_fuzzed_config(tmp_path: Path, model: Path, data: st.DataObject) -> None:
    found = json.loads((model / "config.json").read_text())
    known = ["quantization_config", "text_config", "compression_config", "num_experts", "llm_config"]
    for _ in range(data.draw(st.integers(1, 3))):
        found[data.draw(st.sampled_from(sorted(found) + known) | TEXT_OF)] = data.draw(JUNK)
    with spoiled(model, "config.json", json.dumps(found).encode()):
        survives(tmp_path, model)


@FUZZ
@given(data=st.data())
def test_fuzzed_quantization_config(whole: tuple[Path, Path], data: st.DataObject) -> None:
    """verify says what is wrong, whatever stands there; it never fails itself."""
    file = data.draw(st.sampled_from(["config.json", "halfbyte.json"]))
    found = json.loads((whole[1] / file).read_text())
    place = found["quantization_config"] if file == "config.json" else found
    for _ in range(data.draw(st.integers(1, 2))):
        inner = [place, *(value for value in place.values() if isinstance(value, dict))]
        chosen = data.draw(st.sampled_from(inner))
        chosen[data.draw(st.sampled_from(sorted(chosen) or ["a"]) | TEXT_OF)] = data.draw(JUNK)
    with spoiled(whole[1], file, json.dumps(found).encode()):
        list(verify_structure(whole[1]))
        list(verify_source(whole[1], whole[0]))


class spoiled:  # noqa: N801 - a context manager
    """A file with other content for a while."""

    def __init__(self, directory: Path, name: str, content: bytes) -> None:
        self._path, self._content = directory / name, content

    def __enter__(self) -> None:
        self._before = self._path.read_bytes() if self._path.exists() else None
        self._path.write_bytes(self._content)

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            self._path.unlink()
        else:
            self._path.write_bytes(self._before)
