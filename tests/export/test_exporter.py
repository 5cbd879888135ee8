"""What an exporter refuses, and what it sends beside weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from halfbyte import MXFP8, NVFP4, CheckpointError, Policy, quantize
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.schema import Entry
from halfbyte.checkpoint.weights import WeightGroup, amaxes, quantize_groups
from halfbyte.export import Exporter, Piece, Placement, headers, merge
from halfbyte.export.shards import to_megatron

from ..check import equal, same_bits, true
from ..checkpoint.models import Tensors
from . import ranks

GATE, UP = (f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up"))


def exporter(options: Options | None = None, **arguments: Any) -> Exporter:
    model = ranks.dense()
    return Exporter(model.config, headers(model.tensors.items()), options, **arguments)


def without(*names: str) -> Tensors:
    return ranks.dense().without(*names).tensors


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((UP,), f"{UP} never came, but {GATE} did; engines fuse them under one tensor scale"),
        ((GATE,), f"{GATE} never came, but {UP} did"),
        (
            tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qv"),
            "model.layers.1.self_attn.q_proj.weight and model.layers.1.self_attn.v_proj.weight never came, but "
            "model.layers.1.self_attn.k_proj.weight did",
        ),
        (("model.norm.weight",), "model.norm.weight and 0 other planned tensors never came"),
        ((GATE, UP), f"{GATE} and 1 other planned tensors never came"),
    ],
)
def test_what_is_missing_is_named(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        list(exporter().export(without(*names).items()))


@pytest.mark.parametrize("name", [GATE, UP, "model.norm.weight"])
def test_twice(name: str) -> None:
    tensors = ranks.dense().tensors
    with pytest.raises(CheckpointError, match="came twice, the second time from"):
        list(exporter().export([*tensors.items(), (name, tensors[name])]))


def test_half_of_a_parallel_pair_is_named_too() -> None:
    """On one of many ranks, where not everything is expected."""
    placement = Placement(ep_rank=0, ep_size=2)
    one = exporter(placement=placement)
    with pytest.raises(CheckpointError, match=f"{UP} never came, but {GATE} did"):
        list(one.export([(GATE, ranks.dense().tensors[GATE])]))
    equal(len(list(one.export([]))), 0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("model.nothing.weight", torch.ones(1)), "does not know this Megatron parameter"),
        ((UP, torch.ones(64, 128).bfloat16()), r"shape \[64, 128\], planned is \[128, 128\]; give a part as a Piece"),
        ((UP, torch.ones(128, 128)), "is torch.float32, planned is BF16"),
        (Piece("model.nothing.weight", torch.ones(1)), "is not planned"),
        (Piece(UP, torch.ones(64, 128).bfloat16(), 0, 96), "does not fit the planned"),
        (Piece(UP, torch.ones(128, 24).bfloat16(), 1, 0), "a part ends at 24 of dimension 1, inside a block of 16"),
        (Piece(UP, torch.ones(128, 24).bfloat16(), 1, 104), "a part ends at 104 of dimension 1"),
    ],
)
def test_what_does_not_fit(entry: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        list(exporter().export([entry]))


def test_a_dtensor_is_named() -> None:
    """As fully_shard makes of parameters: its memory is a part, its shape the whole's."""
    mesh = DeviceMesh("meta", [0], _init_backend=False, _rank=0)
    whole = ranks.dense().tensors[UP]
    sharded = DTensor.from_local(whole, mesh, [Shard(0)], run_check=False)
    for entry in ((UP, sharded), Piece(UP, sharded, 0)):
        for call in (exporter().export, exporter().prepare):
            with pytest.raises(CheckpointError, match=r"is a DTensor, of which a part is here; give that, as Piece"):
                list(call([entry]))  # type: ignore[arg-type]


def test_blocks_of_rows_are_not_cut() -> None:
    options = Options(format=NVFP4(block=(16, 16)))
    with pytest.raises(CheckpointError, match="ends at 24 of dimension 0, inside a block of 16"):
        list(exporter(options).export([Piece(UP, torch.ones(24, 128).bfloat16(), 0, 0)]))


def test_parts_need_their_maximum() -> None:
    parts = [Piece(name, torch.ones(64, 128).bfloat16(), 0) for name in (GATE, UP)]
    with pytest.raises(CheckpointError, match="its maximum is needed over all of it: give reduce"):
        list(exporter(placement=Placement(0, 2, ep_size=2)).export(parts))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()])
@pytest.mark.parametrize("name", [UP, "model.layers.1.mlp.down_proj.weight"])
def test_not_finite(name: str, fmt: Any, value: float) -> None:
    tensors = ranks.dense().tensors
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = value
    with pytest.raises(CheckpointError, match=f"tensor {name}: contains NaN or inf.*--ignore {name[:-7]}"):
        list(exporter(Options(format=fmt)).export(tensors.items()))
    if value == value:  # another rank's: seen in the maximum
        infinite = exporter(reduce=lambda maxima, expert: maxima + value, placement=Placement(0, 2, ep_size=2))
        parts = [Piece(n, ranks.dense().tensors[n][:64], 0) for n in (GATE, UP)]
        with pytest.raises(CheckpointError, match="another rank's part"):
            list(infinite.export(parts))


INPUT_SCALES = [
    # options, arguments, whether input scales are sent
    ({}, {}, False),
    ({}, {"engine": "vllm"}, False),
    ({}, {"engine": "sglang"}, True),
    ({}, {"engine": "tensorrt-llm"}, True),
    ({"layout": "compressed-tensors"}, {"engine": "sglang"}, False),
    ({"activations": "constant"}, {"engine": "vllm"}, True),
    ({"activations": "constant"}, {"input_scale": "omit"}, False),
    ({"activations": "calibrated"}, {"input_scale": "ones"}, True),
    ({"format": MXFP8()}, {"input_scale": "ones"}, False),
    ({"format": MXFP8()}, {"engine": "sglang"}, False),
]


@pytest.mark.parametrize(("options", "arguments", "sent"), INPUT_SCALES)
def test_input_scales(options: dict[str, Any], arguments: dict[str, Any], sent: bool) -> None:
    found = exporter(Options(**options), **arguments).export_all(ranks.dense().tensors.items())
    scales = {name: t for name, t in found.items() if name.endswith(("input_scale", "input_global_scale"))}
    equal(len(scales), 14 if sent else 0)
    for name, scale in scales.items():
        same_bits(scale, torch.ones(scale.shape), name)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"activations": "calibrated"}, {}, "measured input scales age"),
        ({"activations": "calibrated"}, {"engine": "vllm"}, "choose input_scale='ones'"),
        ({"kv_cache": "fp8_calibrated"}, {}, "needs calibration data"),
        ({"format": NVFP4(scale_rule="search", error="hessian")}, {}, "needs calibration data"),
        ({}, {"engine": "vLLM"}, "engine='vLLM': choose"),
        ({}, {"input_scale": "zeros"}, "input_scale='zeros': choose"),
        ({"policy": Policy(ignore=("typo",))}, {}, "--ignore typo matches no tensor"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        exporter(Options(**options), **arguments)


def test_views_of_one_parameter_are_quantized_as_one_matrix() -> None:
    """Gate and up of a trainer lie one behind the other; their common maximum is then the matrix's own."""
    fc1 = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    fc1[40] *= 100
    for rows in ([32, 32], [16, 48], [17, 47]):
        apart = [part.clone() for part in fc1.split(rows)]
        for fmt in (NVFP4(), NVFP4(block=(16, 16)), MXFP8()):
            groups = [WeightGroup(fmt, parts, ["gate", "up"]) for parts in (fc1.split(rows), apart)]
            for one, two in zip(*quantize_groups(groups), strict=True):
                same_bits(one.packed, two.packed)
                same_bits(one.block_scale, two.block_scale)
            if isinstance(fmt, NVFP4):
                wanted = quantize(apart[0], fmt, amax=fc1.abs().amax().float())
                same_bits(quantize_groups(groups)[0][0].packed, wanted.packed)


def test_maxima() -> None:
    weights = [torch.tensor([[1.0, -3.0]]), torch.empty(0, 2), torch.tensor([[0.5, float("nan")]])]
    equal(amaxes(weights[:2]), torch.tensor([3.0, 0.0]))
    true(bool(amaxes(weights)[2].isnan()), "NaN wins")
    equal(amaxes([torch.tensor([[2.0, -9.0]]).bfloat16().T])[0], torch.tensor(9.0))


def entries(**shapes: tuple[int, ...]) -> dict[str, Entry]:
    return {name: ("F32", shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "a and 0 others never came"),
        ([Piece("b", torch.ones(4))], "b: came, but the export has no such tensor"),
        ([Piece("a", torch.ones(4)), Piece("a", torch.zeros(4))], "two ranks that should hold the same bytes"),
        ([Piece("a", torch.ones(2), 0)], r"has dtype torch.float32 and shape \[2\]; expected torch.float32, \[4\]"),
        ([Piece("a", torch.ones(2), 0), Piece("a", torch.ones(1), 0, 3)], "leave a gap at 2 of dimension 0"),
        ([Piece("a", torch.ones(3), 0), Piece("a", torch.ones(2), 0, 2)], "overlap at 2 of dimension 0"),
        ([Piece("a", torch.ones(4)), Piece("a", torch.ones(2), 0, 2)], "came whole and in parts"),
        ([Piece("a", torch.ones(4).half())], "has dtype torch.float16"),
    ],
)
def test_merge_refuses(pieces: list[Piece], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge(pieces, entries(a=(4,)))


def test_merge_takes_parts_in_any_order_and_replicas_once() -> None:
    parts = [
        Piece("a", torch.tensor([3.0]), 0, 2),
        Piece("a", torch.tensor([1.0, 2.0]), 0),
        Piece("a", torch.ones(0), 0, 3),
    ]
    whole: Tensor = merge(
        [*parts, parts[0], Piece("b", torch.ones(1)), Piece("b", torch.ones(1))], entries(a=(3,), b=(1,))
    )["a"]
    equal(whole, torch.tensor([1.0, 2.0, 3.0]))


def test_a_rank_that_lost_its_expert_is_noticed(tmp_path: Path) -> None:
    model = ranks.moe()
    source = model.save(tmp_path / "model")
    whole = Exporter.like(source)
    pieces = []
    for rank, placement in enumerate(ranks.placements(1, 2)):
        one = Exporter.like(source, placement=placement)
        parameters = to_megatron(one.model, model.tensors, placement)
        if rank == 1:
            del parameters["decoder.layers.0.mlp.experts.linear_fc2.weight3"]
        pieces += [piece for bucket in one.export(parameters.items()) for piece in bucket.pieces]
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight and 2 others never came"):
        merge(pieces, whole.entries)
