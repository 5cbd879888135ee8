"""Live export by processes that hold shards: maxima over gloo, 4- and 8-bit parts gathered, one checkpoint's bytes."""

import json
import multiprocessing
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from halfbyte import MXFP8, Policy
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.export import Bucket, Exporter, FlatBucket, Placement, merge
from halfbyte.export.layout import SEAL_BYTES, Layout, pack, place
from halfbyte.export.shards import to_megatron

from ..check import equal, same_bits, true
from ..checkpoint.models import read_all
from . import ranks

MTP = Policy(include_mtp=True)
OPTIONS = {"nvfp4": Options(policy=MTP), "mxfp8": Options(format=MXFP8(), policy=MTP)}
SHARDINGS = [(2, 1), (1, 2)]  # expert tensor parallelism, expert parallelism; tensor parallelism is 2
BUCKET_BYTES = 60_000  # the vocabulary is in the first one: 90 rows here, none there


def gathered(buckets: Iterable[Bucket | FlatBucket], entries: Any) -> tuple[dict[str, Tensor], int]:
    """What all ranks made, whole, on rank 0; and how many bytes this one sent. As docs/rl.md has it, for both kinds."""
    parts: list[tuple[Layout, Tensor]] = []
    for bucket in buckets:
        if isinstance(bucket, FlatBucket):
            parts.append((bucket.layout, bucket.flat.to("cpu", copy=True)))
        else:
            layout = place(bucket.pieces)
            parts.append((layout, torch.zeros(layout.nbytes + SEAL_BYTES, dtype=torch.uint8)))
            pack(bucket.pieces, *parts[-1])
    every: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(parts, every if dist.get_rank() == 0 else None)
    pieces = (piece for each in every if each for layout, flat in each for piece in layout.views(flat))
    whole = merge(pieces, entries) if dist.get_rank() == 0 else {}
    return whole, sum(flat.nbytes for _, flat in parts)


def run(rank: int, directory: str) -> list[dict[str, Tensor]]:
    """One of two ranks; returns what rank 0 has."""
    root, found = Path(directory), []
    store = dist.FileStore(str(root / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    calls: list[bool] = []

    def reduce(maxima: Tensor, expert: bool) -> Tensor:
        calls.append(expert)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return maxima

    try:
        for options in OPTIONS.values():
            for etp, ep in SHARDINGS:
                placement = Placement(rank, 2, rank % etp, etp, rank // etp, ep)
                source = root / "model"
                exporter = Exporter.like(source, options, placement=placement, reduce=reduce, bucket_bytes=BUCKET_BYTES)
                parameters = to_megatron(exporter.model, read_all(source), placement)
                for buckets in (exporter.export(parameters.items()), exporter.prepare(parameters.items()).export()):
                    whole, sent = gathered(buckets, exporter.entries)
                    found.append(whole)
                    size = sum(tensor.nbytes for tensor in parameters.values())
                    if sent > 0.7 * size:  # what is not quantized is much of so small a model
                        raise AssertionError(f"{sent} bytes travelled, of {size}")
    finally:
        dist.destroy_process_group()
    (root / f"calls.{rank}").write_text(json.dumps(calls))
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes(tmp_path: Path) -> None:
    ranks.deepseek().save(tmp_path / "model")
    child = multiprocessing.get_context("spawn").Process(target=run, args=(1, str(tmp_path)))
    child.start()
    found = run(0, str(tmp_path))
    child.join(30)
    equal(child.exitcode, 0)
    for name, options in OPTIONS.items():
        convert(tmp_path / "model", tmp_path / name, options)
        wanted = read_all(tmp_path / name)
        for _ in range(2 * len(SHARDINGS)):
            one = found.pop(0)
            equal(sorted(one), sorted(wanted))
            for key, tensor in wanted.items():
                same_bits(one[key], tensor, f"{name}: {key}")
    equal(found, [])
    calls = [json.loads((tmp_path / f"calls.{rank}").read_text()) for rank in (0, 1)]
    equal(*calls)
    true({True, False} == set(calls[0]) and len(calls[0]) > 8, f"{len(calls[0])} reductions, of experts and others")
