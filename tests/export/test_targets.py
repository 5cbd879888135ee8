"""Where weights go in models that run: decoded, or as bytes, at the addresses that they had."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfbyte
from halfbyte import MXFP8, NVFP4, Policy, SyncError
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.schema import quantized_tensor
from halfbyte.export import Bucket, Exporter, Piece, Receiver, Sender
from halfbyte.export.receiver import _Write
from halfbyte.export.targets import Targets
from halfbyte.runtime import stack_experts

from ..check import equal, same_bits, true
from ..checkpoint.models import read_all
from . import ranks
from .links import exporter, links, stepped, together

Tensors = dict[str, Tensor]
TINY = Path(halfbyte.__file__).parent / "data" / "tiny"


def version(step: int) -> Tensors:
    return exporter(ranks.dense()).export_all(stepped(ranks.dense(), step).items())


SERVED: dict[str, dict[str, Any]] = {
    "nvfp4": {"activations": "constant"},
    "mxfp8": {"format": MXFP8()},
    "experts in bf16": {"policy": Policy(num_layers_at_start_in_bf16=3)},  # one by one too, into stacked parameters
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_a_running_transformers_model(tmp_path: Path, options: dict[str, Any]) -> None:
    """It computes with what `load` would read of a conversion of the new weights; experts are stacked in it."""
    pytest.importorskip("transformers")
    convert(TINY, tmp_path / "old", Options(**options))
    model = halfbyte.load(tmp_path / "old")
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor * 1.5 for name, tensor in read_all(TINY).items()}
    one = Exporter.like(TINY, Options(**options), bucket_bytes=300_000)
    sender_link, receiver_link = links()
    receiver = Receiver(model)
    send = lambda: Sender(sender_link).send(one.export(tensors.items()), 7)  # noqa: E731
    equal(together(send, lambda: receiver.receive(receiver_link)), [None, 7])
    wanted = one.export_all(tensors.items())

    fmt = options.get("format", NVFP4())
    decoded = {}
    for name, tensor in wanted.items():
        module, _, parameter = name.rpartition(".")
        if f"{module}.weight_scale" in wanted and parameter == "weight":
            decoded[name] = quantized_tensor("modelopt", fmt, module, wanted).dequantize(torch.bfloat16)
        elif "scale" not in parameter:
            decoded[name] = tensor
    state = model.state_dict()
    for name, tensor in stack_experts(decoded, set(state)).items():
        same_bits(state[name], tensor, name)
    equal({name: tensor.data_ptr() for name, tensor in state.items()}, addresses)


def test_modules_that_keep_quantized_tensors() -> None:
    class Layer(nn.Module):
        def __init__(self, tensors: Tensors, path: str) -> None:
            super().__init__()
            q = {part: tensors[f"{path}.{part}"].clone() for part in ("weight", "weight_scale", "weight_scale_2")}
            self.weight = halfbyte.QuantizedTensor(*q.values(), None, halfbyte.NVFP4())

    path = "model.layers.1.mlp.down_proj"
    root, layer = nn.Module(), Layer(version(1), path)
    at = root
    for part in path.split(".")[:-1]:
        at.add_module(part, nn.Module())
        at = getattr(at, part)
    at.add_module("down_proj", layer)
    pair = links()
    one = {f"{path}.{part}": version(2)[f"{path}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")}

    sent = [Bucket(0, tuple(Piece(name, tensor) for name, tensor in one.items()))]
    before = layer.weight.packed.data_ptr()
    result = together(lambda: Sender(pair[0]).send(sent, 2), lambda: Receiver(root).receive(pair[1]))
    equal(result, [None, 2])
    same_bits(layer.weight.packed, one[f"{path}.weight"])
    same_bits(layer.weight.block_scale, one[f"{path}.weight_scale"])
    equal(layer.weight.tensor_scale, one[f"{path}.weight_scale_2"])
    equal(layer.weight.packed.data_ptr(), before)


def test_a_model_that_has_moved_since() -> None:
    """What would be written to is not what serves any more."""
    tensors = {"norm.weight": torch.ones(16), "norm.scale": torch.ones(16)}

    def change_parameter(root: Any) -> None:
        root.norm.weight.data = root.norm.weight.data.clone()

    def change_buffer(root: Any) -> None:
        root.norm.scale = root.norm.scale.clone()

    for change, name in ((change_parameter, "norm.weight"), (change_buffer, "norm.scale")):
        root, norm = nn.Module(), nn.Module()
        norm.weight = nn.Parameter(torch.zeros(16))
        norm.register_buffer("scale", torch.zeros(16))
        root.add_module("norm", norm)
        pair, receiver = links(), Receiver(root)
        sent = [Bucket(0, tuple(Piece(*tensor) for tensor in tensors.items()))]
        change(root)
        calls = [partial(Sender(pair[0]).send, sent, 1), partial(receiver.receive, pair[1])]
        for error in together(*calls):
            true(isinstance(error, SyncError) and f"{name}: is not where it was" in str(error), repr(error))
        equal(together(calls[0], partial(Receiver(root).receive, pair[1])), [None, 1])
        same_bits(getattr(norm, name[5:]).detach(), tensors[name])


def test_a_model_that_cannot_be_written_to() -> None:
    """Experts as gpt-oss has them, with a square gate that would fit by its shape."""
    root, experts = nn.Module(), nn.Module()
    root.add_module("experts", experts)
    experts.gate_up_proj, experts.gate_up_proj_bias = (nn.Parameter(torch.zeros(2, *s)) for s in ((64, 32), (32,)))
    q = halfbyte.quantize(torch.ones(32, 32), halfbyte.NVFP4())
    sent = {"weight": q.packed, "weight_scale": q.block_scale, "weight_scale_2": q.tensor_scale}
    shapes = {f"m.experts.0.gate_proj.{part}": (t.dtype, tuple(t.shape)) for part, t in sent.items()}
    holder = nn.Module()
    holder.add_module("m", root)
    with pytest.raises(SyncError, match="experts with biases, transposed and interleaved"):
        Targets(holder).updates(shapes, False)


@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()], ids=["nvfp4", "mxfp8"])
def test_stacked_experts_that_are_quantized_tensors(fmt: Any, rng: torch.Generator) -> None:
    """A parameter (E, 2I, H); what is kept beside it sees by its version that it was written to."""
    old, new = (torch.randn((2, 128, 64), generator=rng).bfloat16() for _ in range(2))
    per_matrix = {"per_matrix": True} if isinstance(fmt, NVFP4) else {}
    q, wanted = (halfbyte.quantize(x, fmt, **per_matrix).replace(amax=None) for x in (old, new))
    root, mlp, experts = nn.Module(), nn.Module(), nn.Module()
    root.add_module("mlp", mlp)
    mlp.add_module("experts", experts)
    experts.gate_up_proj = nn.Parameter(q, requires_grad=False)
    before = [
        (part.data_ptr(), part._version) for part in (experts.gate_up_proj.packed, experts.gate_up_proj.block_scale)
    ]
    sent: Tensors = {}
    for e in range(2):
        for leaf, rows in (("gate_proj", slice(0, 64)), ("up_proj", slice(64, 128))):
            sent[f"mlp.experts.{e}.{leaf}.weight"] = wanted.packed[e, rows].clone()
            sent[f"mlp.experts.{e}.{leaf}.weight_scale"] = wanted.block_scale[e, rows].clone()
            if wanted.tensor_scale is not None:
                sent[f"mlp.experts.{e}.{leaf}.weight_scale_2"] = wanted.tensor_scale[e].clone()
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()}
    for update in Targets(root).updates(shapes, True):
        update.write({source: sent[source] for source in update.sources})
    found: Any = experts.gate_up_proj
    if isinstance(fmt, NVFP4):
        name = "mlp.experts.1.up_proj.weight_scale_2"
        write = _Write(Targets(root).updates(shapes, True), sent)
        equal(write.problem(), None)
        halves = {**sent, name: 2 * sent[name]}
        problem = _Write(Targets(root).updates(shapes, True), halves).problem()
        true(problem is not None and "different tensor scales" in problem, f"{problem}")
    same_bits(found.packed, wanted.packed)
    same_bits(found.block_scale, wanted.block_scale)
    if wanted.tensor_scale is not None:
        same_bits(found.tensor_scale, wanted.tensor_scale)
    for part, (address, version_before) in zip((found.packed, found.block_scale), before, strict=True):
        equal(part.data_ptr(), address)
        equal(part._version > version_before, True, "its version")
    del shapes["mlp.experts.1.up_proj.weight"]
    with pytest.raises(SyncError, match="not covered by what was sent"):
        Targets(root).updates(shapes, True)
