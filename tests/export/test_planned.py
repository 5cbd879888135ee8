"""An export planned once gives, every time, what `export` gives."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte import MXFP8, NVFP4, CheckpointError, Policy
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.weights import amaxes
from halfbyte.export import Exporter, Piece, Placement, flatten, headers, merge, unflatten
from halfbyte.export.shards import to_megatron
from halfbyte.ops import prepared as prepared_ops
from halfbyte.ops.prepared import Into, places, prepare_many

from ..check import equal, same_bits, true
from ..checkpoint.models import Model, Tensors, stack
from ..checkpoint.models import moe as small_moe
from . import ranks

OPTIONS: dict[str, Options] = {
    "nvfp4": Options(),
    "compressed-tensors": Options(layout="compressed-tensors", activations="constant", kv_cache="fp8"),
    "mxfp8": Options(format=MXFP8()),
    "4over6, 16x16": Options(format=NVFP4(block=(16, 16), scale_rule="four_over_six")),
}
MODELS = {"dense": ranks.dense, "moe": ranks.moe, "deepseek": ranks.deepseek, "stacked": lambda: stack(small_moe())}


def exporter(model: Model, options: Options | None = None, bucket_bytes: int = 30_000, **arguments: Any) -> Exporter:
    return Exporter(model.config, headers(model.tensors.items()), options, bucket_bytes=bucket_bytes, **arguments)


def copied(buckets: Any) -> Tensors:
    """Each bucket's tensors as they are when it is there."""
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket.tensors.items()}


def same(found: Tensors, wanted: Tensors) -> None:
    equal(sorted(found), sorted(wanted))
    for name, tensor in wanted.items():
        same_bits(found[name], tensor, name)


def step(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.mul_(1.25)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_again_and_again(name: str, options: str) -> None:
    model = MODELS[name]()
    one = exporter(model, OPTIONS[options])
    kinds = [dict(model.tensors)] if name == "stacked" else [dict(model.tensors), None]
    for tensors in kinds:
        parameters = to_megatron(one.model, model.tensors, Placement()) if tensors is None else tensors
        parameters = {key: tensor.clone() for key, tensor in parameters.items()}
        prepared = one.prepare(parameters.items())
        addresses = [bucket.flat.data_ptr() for bucket in prepared.buckets]
        for _ in range(2):
            same(copied(prepared.export()), one.export_all(parameters.items()))
            equal([bucket.flat.data_ptr() for bucket in prepared.buckets], addresses)
            step(parameters)


def test_the_same_buckets_as_export() -> None:
    model = ranks.moe()
    one = exporter(model)
    plain = [set(bucket.tensors) for bucket in one.export(model.tensors.items())]
    prepared = one.prepare(model.tensors.items())
    equal([set(bucket.tensors) for bucket in prepared.buckets], plain)
    true(len(plain) > 4, f"{len(plain)} buckets")
    largest = max(bucket.layout.nbytes for bucket in prepared.buckets)
    true(prepared.buffer_bytes <= 2 * (largest + 16), f"{prepared.buffer_bytes} bytes for two of {largest}")


def test_memory() -> None:
    """Two buckets take turns; with keep each has its own, and all of a sync can be read at its end."""
    model = ranks.moe()
    one = exporter(model)
    wanted = one.export_all(model.tensors.items())
    two, kept = one.prepare(model.tensors.items()), one.prepare(model.tensors.items(), keep=True)
    equal(len({bucket.flat.data_ptr() for bucket in two.export()}), 2)
    at_the_end = list(kept.export())
    same({name: tensor for bucket in at_the_end for name, tensor in bucket.tensors.items()}, wanted)
    true(kept.nbytes <= kept.buffer_bytes <= kept.nbytes + 16 * len(at_the_end), f"{kept.buffer_bytes}")


def test_parameters_that_moved() -> None:
    """As an optimizer does that puts other memory under a parameter."""
    model = ranks.moe()
    one = exporter(model)
    parameters = {
        name: torch.nn.Parameter(tensor.clone(), requires_grad=False) for name, tensor in model.tensors.items()
    }
    prepared = one.prepare(parameters.items())
    copied(prepared.export())
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    with torch.no_grad():
        parameters[name].data = parameters[name].data * 2
        gc.collect()
    same(copied(prepared.export()), one.export_all(parameters.items()))


class Stream:
    """What a CUDA stream is asked for, noted."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.events = log, name, 0

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events} of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"all wait for {self.name}")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("moved", [None, 0, 7, -1])
def test_buckets_that_overlap(moved: int | None, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with streams that do nothing: the next bucket is filled before this one is given; a parameter that
    moved is noticed when its bucket's turn comes."""
    model = ranks.moe()
    one = exporter(model)
    parameters = {
        name: torch.nn.Parameter(tensor.clone(), requires_grad=False)
        for name, tensor in to_megatron(one.model, model.tensors, Placement()).items()
    }
    prepared = one.prepare(parameters.items(), keep=keep)
    wanted = one.export_all(parameters.items())
    if moved is not None:
        parameter = list(parameters.values())[moved]
        parameter.data = parameter.data * 2
        wanted = one.export_all(parameters.items())
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    user = Stream(log, "user")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: user)
    monkeypatch.setattr(prepared, "_device", torch.device("cuda"))
    monkeypatch.setattr(prepared, "_stream", Stream(log, "side"))
    fill, make = prepared._fill, prepared._make
    monkeypatch.setattr(prepared, "_make", lambda: (log.append("plan"), make()))
    monkeypatch.setattr(prepared, "_fill", lambda k: (log.append(f"fill {k}"), fill(k)))
    found: dict[str, Tensor] = {}
    for number, bucket in enumerate(prepared.export()):
        log.append(f"take {number}")
        equal(bucket.index, number)
        found |= {name: tensor.clone() for name, tensor in bucket.tensors.items()}
    same(found, wanted)
    steps = [step for step in log if step[:4] in ("fill", "take")]
    last = len(prepared.buckets) - 1
    equal(
        steps, ["fill 0", *[f"{what}" for k in range(last) for what in (f"fill {k + 1}", f"take {k}")], f"take {last}"]
    )
    true(last >= 4, "too few buckets to say anything")
    equal(log.count("plan"), int(moved is not None))
    if moved is not None:  # new memory is zeroed on the stream of whoever asks, and filled on the other
        at = log.index("plan")
        equal([log[at - 1], log[at + 1]], ["all wait for side", "side waits for user"])
    for k in range(2, last + 1):  # what is filled anew has been used
        if not keep:
            true(
                f"side waits for event {k - 1} of user" in log[: log.index(f"fill {k}")],
                f"bucket {k} is not waited for",
            )
    for k in range(last + 1):
        true(f"user waits for event {k + 1} of side" in log[: log.index(f"take {k}")], f"bucket {k} is not there yet")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_without_keys(rank: int) -> None:
    """Eight tensor-parallel ranks share four query groups: one of two has a group's queries, the other the rest."""
    model, name = ranks.dense(), "decoder.layers.0.self_attention.linear_qkv.weight"
    one = exporter(model, placement=Placement(rank, 8, pp_size=2), reduce=lambda maxima, _: maxima)
    shard = to_megatron(one.model, model.tensors, Placement())[name].chunk(8)[rank].contiguous()
    found, wanted = (
        {piece.name: piece for bucket in buckets for piece in bucket.pieces}
        for buckets in (one.prepare([(name, shard)], keep=True).export(), one.export([(name, shard)]))
    )
    equal({key: (x.dim, x.start) for key, x in found.items()}, {key: (x.dim, x.start) for key, x in wanted.items()})
    true(any(not piece.tensor.numel() for piece in wanted.values()), "this rank has some of all")
    same({key: x.tensor for key, x in found.items()}, {key: x.tensor for key, x in wanted.items()})


def test_not_finite_in_rows_that_are_not_gathered() -> None:
    """q, k and v of Megatron are quantized from where they are; errors name the Hugging Face tensor all the same."""
    model = ranks.moe()
    one = exporter(model)
    parameters = {n: t.clone() for n, t in to_megatron(one.model, model.tensors, Placement()).items()}
    prepared = one.prepare(parameters.items())
    true(any(unit.gather for draft in prepared._drafts for job in draft.jobs for unit in job.units), "all are gathered")
    parameters["decoder.layers.0.self_attention.linear_qkv.weight"][-1, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.self_attn.v_proj.weight: contains NaN or inf"):
        list(prepared.export())


@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()])
def test_not_finite(fmt: Any) -> None:
    model = ranks.dense()
    parameters = {name: tensor.clone() for name, tensor in model.tensors.items()}
    prepared = exporter(model, Options(format=fmt)).prepare(parameters.items())
    name = "model.layers.1.mlp.up_proj.weight"
    good = float(parameters[name][3, 5])
    for value in (float("nan"), float("-inf")):
        parameters[name][3, 5] = value
        with pytest.raises(CheckpointError, match=f"tensor {name}: contains NaN or inf.*--ignore {name[:-7]}"):
            list(prepared.export())
    parameters[name][3, 5] = good
    same(copied(prepared.export()), exporter(model, Options(format=fmt)).export_all(model.tensors.items()))


def test_what_an_export_that_was_given_up_had_found() -> None:
    """As where a receiver dies, before NaN in an earlier bucket was told of; the next export is of good weights."""
    model = ranks.dense()
    parameters = {name: tensor.clone() for name, tensor in model.tensors.items()}
    prepared = exporter(model, Options(format=MXFP8())).prepare(parameters.items())
    name = "model.layers.0.mlp.up_proj.weight"
    parameters[name][3, 5] = float("nan")
    buckets = prepared.export()
    for _ in prepared.buckets:
        next(buckets)
    buckets.close()
    parameters[name].copy_(model.tensors[name])
    same(copied(prepared.export()), exporter(model, Options(format=MXFP8())).export_all(model.tensors.items()))


def test_bytes_of_another_bucket_are_no_scales() -> None:
    """Buckets share memory. lm_head's 360 scales end where another's elements were: -448, which is 254 as a scale."""
    model = ranks.moe()
    parameters = {n: torch.full_like(t, -1.75) if t.dim() == 2 else t for n, t in model.tensors.items()}
    options = Options(format=MXFP8(), policy=Policy(include=("lm_head",)))
    one = exporter(model, options, bucket_bytes=10_000)
    prepared = one.prepare(parameters.items())
    true("lm_head.weight_scale" in prepared.buckets[-1].tensors and len(prepared.buckets) > 4, "it comes last")
    for _ in range(2):
        same(copied(prepared.export()), one.export_all(parameters.items()))


def test_what_cannot_be_prepared() -> None:
    model = ranks.dense()
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight did; engines fuse them"):
        exporter(model).prepare([(n, t) for n, t in model.tensors.items() if "up_proj" not in n])
    on_two = [(n, t.to("meta") if n == "model.norm.weight" else t) for n, t in model.tensors.items()]
    with pytest.raises(CheckpointError, match=r"parameters on \['cpu', 'meta'\]: an export is prepared for one device"):
        exporter(model).prepare(on_two)


@pytest.mark.parametrize("name", ["moe", "deepseek"])
def test_shards(name: str) -> None:
    """Of two tensor-parallel ranks, one after the other: first to learn their maxima."""
    model, calls = MODELS[name](), [[], []]
    placements = ranks.placements(2, 1)
    for recording in (True, False):
        pieces: list[Piece] = []
        for rank, placement in enumerate(placements):
            count = iter(range(1000))

            def reduce(maxima: Tensor, expert: bool, rank: int = rank, count: Any = count) -> Tensor:
                if recording:  # noqa: B023 - called before the loop goes on
                    calls[rank].append(maxima.clone())
                    return maxima
                call = next(count)
                return torch.stack([of[call] for of in calls]).amax(0)

            one = exporter(model, placement=placement, reduce=reduce)
            prepared = one.prepare(to_megatron(one.model, model.tensors, placement).items(), keep=True)
            pieces += [piece for bucket in prepared.export() for piece in bucket.pieces]
    same(merge(pieces, one.entries), exporter(model).export_all(model.tensors.items()))


def test_flattened_without_a_copy() -> None:
    model = ranks.dense()
    one = exporter(model)
    bucket = next(one.prepare(model.tensors.items()).export())
    flat, places_of = flatten(bucket)
    equal(flat.data_ptr(), bucket.flat.data_ptr())
    found = unflatten(flat, places_of)
    same(found, bucket.tensors)


def into(xs: list[Tensor], fmt: Any, impl: Any = None) -> Into:
    _, blocks = places(xs, fmt)
    scale = torch.empty(blocks, dtype=torch.uint8)
    if isinstance(fmt, MXFP8):
        return Into(torch.empty(32 * blocks).to(torch.float8_e4m3fn), scale, torch.empty(0), torch.empty(0))
    return Into(
        torch.empty(8 * blocks, dtype=torch.uint8), scale.view(torch.float8_e4m3fn), torch.empty(len(xs)),
        torch.empty(len(xs)),
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_prepare_many(impl: Any, rng: torch.Generator) -> None:
    xs = [torch.randn(shape, generator=rng).bfloat16() for shape in [(33, 64), (16, 32), (0, 32), (8, 96)]]
    xs[3] *= 50
    out = into(xs, NVFP4())
    prepared = prepare_many(xs, [0, 1, 1, 0], NVFP4(), out, impl=impl)
    maxima = torch.stack([amaxes([xs[0], xs[3]]).amax(), amaxes([xs[1]])[0]])
    equal(prepared.maxima(), maxima)
    for given in (None, maxima * 2):
        prepared.run(given)
        for i, first in enumerate(places(xs, NVFP4())[0]):
            amax = (maxima if given is None else given)[[0, 1, 1, 0][i]]
            wanted = halfbyte.quantize(xs[i], NVFP4(), amax=amax)
            same_bits(out.elements[8 * first :][: xs[i].numel() // 2], wanted.packed.view(-1), f"codes of {i}")
            same_bits(out.tensor_scale[i], wanted.tensor_scale, f"S_dec of {i}")
            same_bits(out.amax[i], amax, f"A of {i}")


def test_stacked_tensors_in_mxfp8_are_quantized_together(rng: torch.Generator, monkeypatch: Any) -> None:
    whole = torch.randn((4, 32, 64), generator=rng).bfloat16()
    xs = [*whole.unbind(), torch.randn((8, 64), generator=rng).bfloat16()]
    out = into(xs, MXFP8())
    prepared: Any = prepare_many(xs, list(range(5)), MXFP8(), out)
    equal(len(prepared.runs), 2)
    prepared.run()
    for x, first in zip(xs, places(xs, MXFP8())[0], strict=True):
        wanted = halfbyte.quantize(x, MXFP8())
        same_bits(out.elements[32 * first :][: x.numel()], wanted.packed.view(-1))
        same_bits(out.block_scale[first:][: x.numel() // 32], wanted.block_scale.view(-1))
    with pytest.raises(halfbyte.ShapeError, match="no maxima"):
        prepared.maxima()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], NVFP4()), halfbyte.ShapeError, "0 tensors, 0 groups"),
        (([torch.ones(16)], [0, 0], NVFP4()), halfbyte.ShapeError, "1 tensors, 2 groups"),
        (([torch.ones(8)], [0], NVFP4()), halfbyte.ShapeError, "must be divisible by 16"),
        (([torch.ones(16)], [0], NVFP4(scaling="row")), halfbyte.FormatError, "one scale for each tensor"),
        (([torch.ones(16)], [0], NVFP4(rounding="stochastic")), halfbyte.FormatError, "rounds to nearest"),
    ],
)
def test_prepare_many_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare_many(*arguments, into([torch.ones(16)], NVFP4()))
    with pytest.raises(halfbyte.ShapeError, match="of 32 places"):
        prepared_ops.prepare_many([torch.ones(32, 16)], [0], NVFP4(), into([torch.ones(16)], NVFP4()))
