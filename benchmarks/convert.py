"""A conversion beside a copy of the same bytes, on one to eight ranks.

    PYTHONPATH=src python3 benchmarks/convert.py [--gigabytes 8] [--ranks 1,2,4,8] [--device cuda] [--json FILE]

The source is written once: decoder layers shaped like Qwen3-8B's, of random bfloat16. Then, in turn and on one disk:

* copy: the source is read, and as many bytes as the conversion's output are written and synced, both at the same time,
  in as many threads as the conversion's own reading and writing take;
* `halfbyte.checkpoint.convert` with each number of ranks, in processes that have imported everything and converted a
  small model, so that compiling is not timed. How long that took is stated beside it.

Each runs twice: with the source's pages dropped from the page cache (posix_fadvise; whether the system complied is in
the file as the share of pages that stayed), and with all of them in it. All outputs must have the same bytes, those of
one process whatever the device; else nothing is reported. Peaks of memory are each process's own.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from provenance import ROOT, provenance

HIDDEN, WIDTH, ATTENTION, KV, VOCAB = 4096, 12288, 4096, 1024, 32768
READERS, PIECE = 4, 1 << 24
STATES = ("dropped", "cached")
WARM = ROOT / "src" / "halfbyte" / "data" / "tiny"
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDTH,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCAB,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


# --- the source -----------------------------------------------------------------------------------------------------


def shapes(layers: int, divisor: int) -> dict[str, tuple[int, ...]]:
    """Of all tensors; every side divided."""
    found: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (VOCAB, HIDDEN) for name in ("model.embed_tokens", "lm_head")
    }
    found["model.norm.weight"] = (HIDDEN,)
    for i in range(layers):
        rows = {"q_proj": ATTENTION, "k_proj": KV, "v_proj": KV}
        found |= {f"model.layers.{i}.self_attn.{leaf}.weight": (n, HIDDEN) for leaf, n in rows.items()}
        found[f"model.layers.{i}.self_attn.o_proj.weight"] = (HIDDEN, ATTENTION)
        found |= {f"model.layers.{i}.mlp.{leaf}_proj.weight": (WIDTH, HIDDEN) for leaf in ("gate", "up")}
        found[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
        found |= {f"model.layers.{i}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return {name: tuple(side // divisor for side in shape) for name, shape in found.items()}


def make_source(directory: Path, gigabytes: float, divisor: int = 1, shard_bytes: int = 4_000_000_000) -> int:
    """Write it, in shards; returns the bytes of its tensors."""
    from halfbyte.checkpoint.convert import shard, write_index
    from halfbyte.checkpoint.shards import ShardWriter

    per_layer = 2 * HIDDEN * (2 * ATTENTION + 2 * KV + 3 * WIDTH)
    layers = max(2, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    entries = {name: ("BF16", shape) for name, shape in shapes(layers, divisor).items()}
    files = shard(({name: entry} for name, entry in entries.items()), shard_bytes)
    g = torch.Generator().manual_seed(0)
    largest = max(torch.Size(shape).numel() for _, shape in entries.values())
    noise = (torch.randn(largest + 4096, generator=g) * 0.02).bfloat16()
    total = 0
    for file, part in files.items():
        with ShardWriter(directory / file, part) as writer:
            for number, (name, (_, shape)) in enumerate(part.items()):
                count = torch.Size(shape).numel()
                start = 8 * (number % 512)  # no two alike, and drawn only once
                writer.write(name, noise[start : start + count].view(shape))
                total += 2 * count
    if len(files) > 1:
        write_index(directory, {name: file for file, part in files.items() for name in part}, total)
    return total


# --- the page cache -------------------------------------------------------------------------------------------------


def prepare(directory: Path, state: str) -> float:
    """Have a source's pages dropped from memory, or all of them in it; returns the share that is there then."""
    drop(directory) if state == "dropped" else fill(directory)
    return cached(directory)


def drop(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def fill(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(PIECE):
                pass


def cached(directory: Path) -> float:
    """The share of its pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    there = total = 0
    for path in directory.glob("*.safetensors"):
        size = path.stat().st_size
        pages = -(-size // mmap.PAGESIZE)
        flags = ctypes.create_string_buffer(pages)
        protection = mmap.PROT_READ | mmap.PROT_WRITE  # ctypes takes addresses of writable memory only
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, protection) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.addressof(first), size, flags):
                return float("nan")
            del first
        there += sum(flag & 1 for flag in flags.raw[:pages])
        total += pages
    return there / total


# --- copying --------------------------------------------------------------------------------------------------------


def copy(source: Path, target: Path, written: int) -> dict[str, float]:
    """Seconds of reading all of the source, of writing and syncing `written` bytes, and of both together."""
    pieces = [
        (path, start) for path in sorted(source.glob("*.safetensors")) for start in range(0, path.stat().st_size, PIECE)
    ]
    buffers = {}

    def read(piece: tuple[Path, int]) -> None:
        buffer = buffers.setdefault(threading.get_ident(), bytearray(PIECE))
        file = os.open(piece[0], os.O_RDONLY)
        os.preadv(file, [buffer], piece[1])
        os.close(file)

    def read_all() -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, pieces))
        return time.perf_counter() - start

    def write_all() -> float:
        data = os.urandom(PIECE)
        start = time.perf_counter()
        file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(file, written)
        for offset in range(0, written, PIECE):
            os.pwrite(file, data[: written - offset], offset)
        os.fsync(file)
        os.close(file)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        reading, writing = pool.submit(read_all), pool.submit(write_all)
        found = {"reading": reading.result(), "writing": writing.result()}
    found["seconds"] = time.perf_counter() - start
    target.unlink()
    return found


# --- converting -----------------------------------------------------------------------------------------------------


def rank_main(source: Path, output: Path, device: str, shard_bytes: int, started: float) -> None:
    """One rank, under torchrun or alone: warms up, then converts with the source's pages dropped, and again."""
    from halfbyte.checkpoint.convert import convert
    from halfbyte.checkpoint.options import Options
    from halfbyte.checkpoint.ranks import Ranks, join, part, share_cores

    device, rank = join(device)
    ranks = Ranks.current()
    share_cores(ranks)
    warm = output.with_name(f"warm-{rank}")
    convert(WARM, warm, Options(), device=device)
    shutil.rmtree(warm)
    found: dict[str, Any] = {"seconds_to_start": max(ranks.agree(time.time() - started))}
    for state in STATES:
        if rank == 0:
            found[state] = {"pages_in_cache": prepare(source, state)}
        ranks.agree()
        start, cpu = time.perf_counter(), time.process_time()
        where = output / state
        report = convert(source, where, Options(), device=device, ranks=ranks, max_shard_bytes=shard_bytes)
        seconds = time.perf_counter() - start
        cpu_seconds = ranks.agree(time.process_time() - cpu)
        if rank == 0:
            found[state] |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
    gpu = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    peaks = ranks.agree((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, gpu))
    if rank == 0:
        found |= {"peak_rss": [rss for rss, _ in peaks], "peak_gpu": [gpu for _, gpu in peaks], "impl": report.impl}
        found |= {"source_bytes": report.source_bytes, "output_bytes": report.output_bytes, "shards": report.shards}
        (output / "found.json").write_text(json.dumps(found))
    part()


def convert_on(ranks: int, source: Path, output: Path, device: str, shard_bytes: int) -> dict[str, Any]:
    """What `rank_main` found, with digests of what it wrote."""
    output.mkdir()
    script = [__file__, "--rank", *map(str, (source, output, device, shard_bytes, time.time()))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads((output / "found.json").read_text())
    for state in STATES:
        found[state]["files"] = digests(output / state)
    shutil.rmtree(output)
    return found


def digests(directory: Path) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        return {path.name: value for path, value in zip(paths, pool.map(digest, paths), strict=True)}


# --- all of it ------------------------------------------------------------------------------------------------------


def hardware(device: str) -> dict[str, Any]:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    found = {"cpu": model.partition(":")[2].strip(), "cores": len(os.sched_getaffinity(0))}
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the source, about")
    parser.add_argument("--small", action="store_true", help="a source of a few megabytes, to see whether it runs")
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks; on GPUs, those that there are GPUs for")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--directory", type=Path, help="where to work; takes about twice the source's size")
    parser.add_argument("--max-shard-gb", type=float, default=5.0)
    parser.add_argument("--note", help="what to know about this run, for the file")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--json", type=Path, help="write a file")
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = [int(number) for number in options.ranks.split(",")]
    if device == "cuda":
        numbers = [number for number in numbers if number <= torch.cuda.device_count()]
    if numbers[:1] != [1]:
        sys.exit(f"--ranks {options.ranks}: begins with 1, which the others are compared with")

    with tempfile.TemporaryDirectory(dir=options.directory, prefix="convert-") as temporary:
        place = Path(temporary)
        start = time.monotonic()
        size = make_source(place / "source", *((0, 16) if options.small else (options.gigabytes,)))
        print(f"a source of {size / 1e9:.2f} GB, made in {time.monotonic() - start:.0f} s", flush=True)
        rows = []
        for number in numbers:
            shard_bytes = int(options.max_shard_gb * 1e9)
            rows.append({"ranks": number} | convert_on(number, place / "source", place / "out", device, shard_bytes))
            show(rows[-1])
        if len({json.dumps(row[state].pop("files")) for row in rows for state in STATES}) != 1:
            raise SystemExit("outputs differ between runs; nothing is reported")
        print(f"all {len(rows) * len(STATES)} outputs have the same bytes")
        copies = {}
        for state in STATES:
            share = prepare(place / "source", state)
            copies[state] = {"pages_in_cache": share} | copy(place / "source", place / "copy", rows[0]["output_bytes"])
            times = "  ".join(f"{key} {copies[state][key]:.2f} s" for key in ("reading", "writing", "seconds"))
            print(f"copy, {state}: {times}")
    for row in rows:
        for state in STATES:
            row[state]["times_copy"] = row[state]["seconds"] / copies[state]["seconds"]
            print(f"{row['ranks']} ranks, {state}: {row[state]['times_copy']:.2f}× the copy; "
                  f"{rows[0][state]['seconds'] / row[state]['seconds']:.2f}× as fast as one")  # fmt: skip
    result = {
        **provenance(device, options.commit),
        "machine": hardware(device),
        "note": options.note,
        "device": device,
        "copy": copies,
        "rows": rows,
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {options.json}")


def show(row: dict[str, Any]) -> None:
    for state in STATES:
        rate = row["source_bytes"] / row[state]["seconds"] / 1e9
        print(f"{row['ranks']} ranks, {state}: {row[state]['seconds']:.2f} s, {rate:.2f} GB/s of source, "
              f"{sum(row[state]['cpu_seconds']):.1f} s of CPU, {row[state]['pages_in_cache']:.0%} cached before; "
              f"peak {max(row['peak_rss']) / 1e9:.2f} GB, {max(row['peak_gpu']) / 1e9:.2f} GB on the GPU; "
              f"{row['seconds_to_start']:.0f} s to start", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        source, output, device, shard_bytes, started = sys.argv[2:]
        rank_main(Path(source), Path(output), device, int(shard_bytes), float(started))
    else:
        main()
