"""A live export equals a conversion, byte for byte: every recipe, every sharding."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.export import Exporter, Piece, Placement, global_name, headers, merge
from halfbyte.export.shards import to_megatron
from halfbyte.formats import MXFP8
from halfbyte.recipe.load import builtin_recipes, load_recipe

from ..check import equal, same_bits, true
from ..checkpoint.models import Model, read_all, stack
from ..checkpoint.models import moe as small_moe
from . import ranks
from .ranks import Ranks, placements

TINY = Path(halfbyte.__file__).parent / "data" / "tiny"
RECIPES = [name for name, recipe in builtin_recipes().items() if not recipe.needs_data]
MODELS: dict[str, Callable[[], Model]] = {"dense": ranks.dense, "moe": ranks.moe, "deepseek": ranks.deepseek}
SHARDINGS = [(tp, ep) for tp in (1, 2, 4) for ep in (1, 2)]
made = cache(lambda name: MODELS[name]())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """directory(name): a model on disk."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: TINY if name == "tiny" else made(name).save(root / name))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    equal(sorted(found), sorted(wanted), what)
    for name, tensor in wanted.items():
        same_bits(found[name], tensor, f"{what}: {name}")


def test_every_recipe_without_calibration_is_tried() -> None:
    true({"nvfp4-w4a16", "nvfp4-4over6", "nvfp4-search", "mxfp8"} <= set(RECIPES), f"found {RECIPES}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_every_sharding(tmp_path: Path, directory: Callable[[str], Path], name: str, recipe: str) -> None:
    source, options = directory(name), load_recipe(recipe).options()
    convert(source, tmp_path / "out", options)
    wanted, tensors = read_all(tmp_path / "out"), read_all(source)
    exporter = Exporter.like(source, options)
    equal(set(exporter.entries), set(wanted))
    same(exporter.export_all(tensors.items()), wanted, "whole, Hugging Face names")
    backwards = dict(reversed(tensors.items()))
    same(exporter.export_all(backwards.items()), wanted, "whole, in another order")
    for tp, ep in SHARDINGS:
        # parts of the tiny model's experts, 96 columns, must not cut blocks
        etp = tp if name != "tiny" else min(tp, 1 if recipe == "mxfp8" else 2)
        found = Ranks(source, options, placements(tp, ep, etp)).export(tensors)
        same(found, wanted, f"{recipe}: tensor parallelism {tp}, of experts {etp}; expert parallelism {ep}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"activations": "constant", "kv_cache": "fp8"}, {"kv_cache": "fp8"}])
@pytest.mark.parametrize("name", ["moe", "deepseek"])
def test_both_layouts(
    tmp_path: Path, directory: Callable[[str], Path], name: str, layout: Layout, options: dict[str, Any]
) -> None:
    """Input scales, and an FP8 cache's."""
    chosen = Options(layout=layout, **options)
    convert(directory(name), tmp_path / "out", chosen)
    found = Ranks(directory(name), chosen, placements(2, 2)).export(read_all(directory(name)))
    same(found, read_all(tmp_path / "out"), f"{layout} {options}")


@pytest.mark.parametrize("etp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("name", ["moe", "deepseek"])
def test_experts_have_a_tensor_parallelism_of_their_own(
    tmp_path: Path, directory: Callable[[str], Path], name: str, ep: int, etp: int
) -> None:
    source, options = directory(name), Options()
    convert(source, tmp_path / "out", options)
    found = Ranks(source, options, placements(2, ep, etp)).export(read_all(source), "local")
    same(found, read_all(tmp_path / "out"), f"tensor parallelism 2, of experts {etp}; expert parallelism {ep}")


def test_pipelines(tmp_path: Path) -> None:
    """Two pipeline ranks with two chunks each, in which layers and experts count from 0: walked as docs/rl.md does."""
    source = ranks.deep().save(tmp_path / "model")
    convert(source, tmp_path / "out", Options())
    tensors, pieces = read_all(source), list[Piece]()
    for pp, ep in ((0, 0), (0, 1), (1, 0), (1, 1)):
        placement = Placement(ep_rank=ep, ep_size=2, pp_rank=pp, pp_size=2, vp_size=2)
        exporter = Exporter.like(source, Options(), placement=placement)
        chunks: list[dict[str, Tensor]] = [{}, {}]
        for name, tensor in to_megatron(exporter.model, tensors, placement).items():
            layer = {"embedding": 0, "decoder.final_layernorm": 3}.get(
                name.rpartition(".")[0].removesuffix(".word_embeddings")
            )
            layer = int(name.split(".")[2]) if layer is None else layer
            if layer % 2 == pp:  # chunks are dealt out in turn, one layer each
                local = name.replace(f"decoder.layers.{layer}.", "decoder.layers.0.")
                local = re.sub(r"(experts\.linear_fc[12]\.weight)(\d)", lambda m: f"{m[1]}{int(m[2]) - 2 * ep}", local)  # noqa: B023
                chunks[layer // 2][f"module.module.{local}"] = tensor
        if pp == 1:  # the last stage's copy of what is tied
            chunks[1]["module.module.output_layer.weight"] = tensors["model.embed_tokens.weight"]
        named = [
            (global_name(name, exporter.model, placement, stage), tensor)
            for stage, chunk in enumerate(chunks)
            for name, tensor in chunk.items()
        ]
        pieces += [piece for bucket in exporter.export(named) for piece in bucket.pieces]
    same(merge(pieces, exporter.entries), read_all(tmp_path / "out"), "pipelines")


def test_blocks_of_16_by_16(tmp_path: Path, directory: Callable[[str], Path]) -> None:
    source, options = directory("moe"), Options(format=halfbyte.NVFP4(block=(16, 16)))
    convert(source, tmp_path / "out", options)
    found = Ranks(source, options, placements(4, 2)).export(read_all(source))
    same(found, read_all(tmp_path / "out"), "16×16")


def test_stacked_experts(tmp_path: Path) -> None:
    """As transformers has them in memory: [E, 2I, H]; the plan then comes from the parameters themselves."""
    model = small_moe()
    convert(model.save(tmp_path / "model"), tmp_path / "out", Options())
    stacked = stack(model).tensors
    exporter = Exporter(model.config, headers(stacked.items()), Options())
    same(exporter.export_all(stacked.items()), read_all(tmp_path / "out"), "stacked")


@pytest.mark.parametrize("how", ["experts", "grouped"])
def test_all_experts_of_a_rank_in_one_parameter(tmp_path: Path, directory: Callable[[str], Path], how: str) -> None:
    """3-D as one grouped parameter, or 2-D and transposed as GroupedMLP had them."""
    source, options = directory("moe"), Options(format=MXFP8())
    tensors, wanted = read_all(source), {}
    convert(source, tmp_path / "out", options)
    pieces: list[Piece] = []
    for rank, placement in enumerate(placements(2, 2)):
        exporter = Ranks(source, options, placements(2, 2)).exporter(rank)
        shards = to_megatron(exporter.model, tensors, placement)
        for fc in ("linear_fc1", "linear_fc2"):
            path = f"decoder.layers.0.mlp.experts.{fc}.weight"
            each = torch.stack([shards.pop(f"{path}{e}") for e in placement.local_experts(ranks.EXPERTS)])
            if how == "experts":
                shards[path] = each
            elif fc == "linear_fc1":
                shards["decoder.layers.0.mlp.experts.weight1"] = each.mT.reshape(ranks.HIDDEN, -1)
            else:
                shards["decoder.layers.0.mlp.experts.weight2"] = each.mT.reshape(-1, ranks.HIDDEN)
        pieces += [piece for bucket in exporter.export(shards.items()) for piece in bucket.pieces]
        wanted = exporter.entries
    same(merge(pieces, wanted), read_all(tmp_path / "out"), how)


@pytest.mark.parametrize("bucket_bytes", [512 << 20, 30_000])
def test_rows_dealt_out_unevenly(tmp_path: Path, directory: Callable[[str], Path], bucket_bytes: int) -> None:
    """As FSDP has them: rows of every tensor on every rank, some with none."""
    source = directory("dense")
    convert(source, tmp_path / "out", Options())
    tensors = read_all(source)

    def parts(rank: int) -> list[Piece]:
        cut = {name: sorted({0, len(t) // 3, len(t)}) for name, t in tensors.items()}
        edges = {
            name: (edge[min(rank, len(edge) - 1)], edge[min(rank + 1, len(edge) - 1)]) for name, edge in cut.items()
        }
        return [Piece(name, t[slice(*edges[name])], 0, edges[name][0]) for name, t in tensors.items()]

    def make(rank: int, reduce: Any) -> Exporter:
        return Exporter.like(source, Options(), reduce=reduce, bucket_bytes=bucket_bytes)

    same(of_ranks(3, make, parts), read_all(tmp_path / "out"), "rows")


def of_ranks(
    world: int, make: Callable[[int, Any], Exporter], parts: Callable[[int], list[Piece]]
) -> dict[str, Tensor]:
    """Whole tensors of ranks that play one after the other, first to learn their maxima."""
    maxima: list[list[Tensor]] = [[] for _ in range(world)]
    entries, pieces = {}, list[Piece]()
    for recording in (True, False):
        pieces = []
        for rank in range(world):
            count = iter(range(1000))

            def reduce(found: Tensor, expert: bool, rank: int = rank, count: Any = count) -> Tensor:
                true(not expert, "nothing here is cut as experts are")
                if recording:  # noqa: B023 - called before the loop goes on
                    maxima[rank].append(found)
                call = next(count)
                return found if recording else torch.stack([of[call] for of in maxima]).amax(0)  # noqa: B023

            exporter = make(rank, reduce)
            entries = exporter.entries
            pieces += [piece for bucket in exporter.export(parts(rank)) for piece in bucket.pieces]
    return merge(pieces, entries)


def test_stacked_experts_of_fsdp(tmp_path: Path) -> None:
    """fully_shard deals out whole experts, and rows of all else: docs/rl.md's loop."""
    model = small_moe()
    convert(model.save(tmp_path / "model"), tmp_path / "out", Options())
    stacked = stack(model).tensors

    def make(rank: int, reduce: Any) -> Exporter:
        options = {"placement": Placement(ep_rank=rank, ep_size=2), "reduce": reduce, "bucket_bytes": 10_000}
        return Exporter(model.config, headers(stacked.items()), Options(), **options)

    def parts(rank: int) -> list[Piece]:
        return [piece for name, parameter in stacked.items() for piece in of_fsdp(name, parameter, rank)]

    def of_fsdp(name: str, parameter: Tensor, rank: int) -> Iterator[Piece]:
        each = -(-len(parameter) // 2)
        start = min(rank * each, len(parameter))
        local = parameter[start : start + each]
        if local.dim() < 3:
            yield Piece(name, local, dim=0, start=start)
            return
        module, _, leaf = name.rpartition(".")
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for i, weight in enumerate(local):
            for part, tensor in zip(leaves, weight.chunk(len(leaves)), strict=True):
                yield Piece(f"{module}.{start + i}.{part}.weight", tensor)

    same(of_ranks(2, make, parts), read_all(tmp_path / "out"), "FSDP")


@pytest.mark.parametrize("bucket_bytes", [30_000, 60_000, 100_000])
@pytest.mark.parametrize("name", ["moe", "deepseek"])
def test_ranks_close_buckets_at_the_same_weights(
    directory: Callable[[str], Path], name: str, bucket_bytes: int
) -> None:
    """Of the vocabulary one rank has all 90 rows, the others nothing but padding; maxima are reduced by bucket."""
    source, options = directory(name), Options()
    wanted = Exporter.like(source, options).export_all(read_all(source).items())
    for tp, ep in ((2, 1), (4, 2)):
        every = Ranks(source, options, placements(tp, ep), bucket_bytes=bucket_bytes)
        same(every.export(read_all(source)), wanted, f"tensor parallelism {tp}, expert parallelism {ep}")


def test_buckets(directory: Callable[[str], Path]) -> None:
    """Small buckets hold the same, in order, and never a part of a group without the others."""
    tensors = read_all(TINY)
    whole = Exporter.like(TINY, Options()).export_all(tensors.items())
    exporter = Exporter.like(TINY, Options(), bucket_bytes=20_000)
    buckets = list(exporter.export(tensors.items()))
    equal([bucket.index for bucket in buckets], list(range(len(buckets))))
    true(len(buckets) > 20, f"{len(buckets)} buckets")
    together = {name: tensor for bucket in buckets for name, tensor in bucket.tensors.items()}
    same(together, whole, "in small buckets")
    place = {name: bucket.index for bucket in buckets for name in bucket.tensors}
    for group in exporter.plan.groups:
        modules = tuple(f"{item.name.module}." for item in group)
        equal(len({index for name, index in place.items() if name.startswith(modules)}), 1, modules[0])
    largest = max(bucket.nbytes for bucket in buckets[:-1])
    true(largest < 20_000 + 128 * 768 * 2, f"a bucket of {largest} bytes")


def test_nothing_given_is_changed(directory: Callable[[str], Path]) -> None:
    tensors = read_all(directory("moe"))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    ready = to_megatron(Exporter.like(directory("moe")).model, tensors, Placement())
    Exporter.like(directory("moe")).export_all(ready.items())
    same(tensors, before, "the trainer's weights")
