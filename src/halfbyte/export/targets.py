"""Where the tensors of a quantized checkpoint go in a model that runs: into its parameters, at their addresses.

Three kinds of models: a mapping of an engine's own tensors, which get the bytes; modules with QuantizedTensors, which
get them too; and modules with high-precision parameters, as `halfbyte.load` makes, which get the decoded values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import names
from ..checkpoint.schema import SCALE_PARAMETERS, quantized_tensor, weight_names
from ..errors import CheckpointError, SyncError
from ..formats import MXFP8, NVFP4
from ..tensor import QuantizedTensor

Model = nn.Module | Mapping[str, Tensor]
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
_UP = ("up_proj", "w3")


class Update(NamedTuple):
    """One thing to do when a version is taken over.

    Attributes:
        name: of the parameter, or the engine's tensor.
        elements: how many of it are written.
        sources: the tensors that it needs, by their names on the wire.
        write: does it, given those; shapes were checked before.
        into: where the only source is copied to, if that is all.
    """

    name: str
    elements: int
    sources: tuple[str, ...]
    write: Callable[[Mapping[str, Tensor]], None]
    into: Tensor | None = None


class Targets:
    """A running model's memory, and what a checkpoint's tensors are in it.

    Attributes:
        sizes: name → number of elements of all that a full sync must write.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._is_mapping = isinstance(model, Mapping)
        self._layers: int | None = None
        self._tensors: dict[str, Tensor] = {}
        if isinstance(model, nn.Module):
            config: Any = getattr(model, "config", None)
            text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
            self._layers = getattr(text, "num_hidden_layers", None)
            for name, tensor in _tensors_of(model):
                self._tensors[name] = tensor
        else:
            self._tensors = dict(model)
        seen: dict[tuple[Any, ...], str] = {}
        self.sizes: dict[str, int] = {}
        for name, tensor in self._tensors.items():  # tied weights once
            if seen.setdefault(_memory(tensor, name), name) == name:
                self.sizes[name] = tensor.numel()
        self._devices = {tensor.device for tensor in self._tensors.values() if tensor.is_cuda}
        self._alias = {name: seen[_memory(tensor, name)] for name, tensor in self._tensors.items()}

    def moved(self) -> str | None:
        """A tensor of the module that is not where it was, as after `model.to(…)`; None if all are."""
        if not isinstance(self._model, nn.Module):
            return None
        now = {name: _memory(tensor, name) for name, tensor in _tensors_of(self._model)}
        return next((name for name, x in self._tensors.items() if now.get(name) != _memory(x, name)), None)

    def written(self) -> None:
        """Give what was written to another version, by which others see that what they made of it is old.

        A QuantizedTensor's parts have one already; an engine's tensors need none, and there may be 56,000 of them.
        """
        if isinstance(self._model, nn.Module):
            plain = [x for x in self._tensors.values() if not isinstance(x, QuantizedTensor) and not x.is_inference()]
            torch.autograd.graph.increment_version(plain)

    def synchronize(self) -> None:
        """Wait until all that was written on the current streams is there."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()

    def updates(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], full: bool) -> list[Update]:
        """What to do with tensors of these names, dtypes and shapes.

        full: whether everything in the model must be written by them.

        Raises:
            SyncError: a tensor has no place in the model, or does not fit there; or full, and something is missing.
        """
        found = list(self._into_engine(shapes) if self._is_mapping else self._into_modules(shapes))
        written: dict[str, int] = {}
        for update in found:
            if update.elements == self.sizes[update.name]:  # twice where tied weights come under both names
                written[update.name] = update.elements
            else:
                written[update.name] = written.get(update.name, 0) + update.elements
        wrong = [name for name, size in self.sizes.items() if written.get(name, 0) != size]
        if full and wrong:
            raise SyncError(
                f"{wrong[0]} and {len(wrong) - 1} others of the running model are not covered by what was sent: is it "
                "an export of the whole model?"
            )
        return found

    def _into_engine(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[Update]:
        for name, (dtype, shape) in shapes.items():
            into = self._tensors.get(name)
            if into is None:
                raise SyncError(f"{name}: the engine has no such tensor")
            if (into.dtype, tuple(into.shape)) != (dtype, shape):
                raise SyncError(
                    f"{name}: the engine has {into.dtype} {list(into.shape)}, sent was {dtype} {list(shape)}"
                )
            yield Update(self._alias[name], into.numel(), (name,), _Copy(name, into), into)

    def _into_modules(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[Update]:
        for name, (dtype, shape) in shapes.items():
            module, _, parameter = name.rpartition(".")
            if names.parse(name, self._layers).tower == "mtp" and self._find(name, False) is None:
                continue  # transformers runs models without
            is_quantized = parameter == "weight_packed" or (
                parameter == "weight" and f"{module}.weight_scale" in shapes
            )
            if parameter in SCALE_PARAMETERS:
                continue  # goes with its weight; input scales stay as they were loaded
            if not is_quantized:
                place = self._find(name, True)
                assert place is not None
                whole = place.whole
                into = whole if isinstance(whole, QuantizedTensor) else place.of(whole)
                if isinstance(whole, QuantizedTensor) or tuple(into.shape) != shape:
                    raise SyncError(
                        f"{name}: sent in high precision with shape {list(shape)}, the model has {into!s:.60}"
                    )
                if into.dtype != dtype and not (into.dtype.is_floating_point and dtype.is_floating_point):
                    raise SyncError(f"{name}: is {dtype}, the model has {into.dtype}")
                yield Update(place.name, into.numel(), (name,), _Copy(name, into), into)
                continue
            layout, fmt = ("compressed-tensors" if parameter == "weight_packed" else "modelopt"), NVFP4()
            if dtype == torch.float8_e4m3fn:
                fmt = MXFP8()  # type: ignore[assignment]
            place = self._find(f"{module}.weight", True)
            assert place is not None
            parts = weight_names(layout, fmt)  # type: ignore[arg-type]
            sources = tuple(
                f"{module}.{part}" for part in (parts.elements, parts.block_scale, parts.tensor_scale) if part
            )
            if missing := [source for source in sources if source not in shapes]:
                raise SyncError(f"{missing[0]}: was not sent, but {name} was")
            columns = shape[-1] * (2 if isinstance(fmt, NVFP4) else 1)
            if place.shape != (*shape[:-1], columns):
                raise SyncError(f"{name}: stands for {[*shape[:-1], columns]}, the model has {list(place.shape)}")
            yield Update(place.name, place.numel, sources, _Decode(layout, fmt, module, place))

    def _find(self, name: str, needed: bool) -> _Place | None:
        """Where a high-precision tensor of a checkpoint is in the model."""
        for path in (name, name.replace(".block_sparse_moe.", ".mlp.")):  # transformers ≥ 5 renamed it
            if path in self._tensors:
                return _Place(self._alias[path], self._tensors[path], None, None)
            expert = _EXPERT.match(path.removesuffix(".weight"))
            if expert is None:
                continue
            is_down = expert[3] in ("down_proj", "w2")
            stacked = f"{expert[1]}.{'down_proj' if is_down else 'gate_up_proj'}"
            tensor = self._tensors.get(stacked)
            if tensor is None or tensor.dim() != 3 or int(expert[2]) >= len(tensor):
                continue
            if f"{stacked}_bias" in self._tensors:
                raise SyncError(f"{stacked}: experts with biases, transposed and interleaved, cannot be written to")
            half = tensor.shape[1] // 2
            rows = None if is_down else slice(half, None) if expert[3] in _UP else slice(0, half)
            return _Place(self._alias[stacked], tensor, int(expert[2]), rows)
        if needed:
            raise SyncError(f"{name}: the running model has no place for it")
        return None


class _Place(NamedTuple):
    """A parameter, or one expert's rows of it."""

    name: str
    whole: Tensor
    expert: int | None
    rows: slice | None

    def of(self, tensor: Tensor) -> Tensor:
        """The same place in a tensor that has the parameter's leading dimensions."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.whole.shape[-2:]
        return (rows if self.rows is None else rows // 2, columns) if self.whole.dim() > 1 else tuple(self.whole.shape)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def shares_scale(write: object) -> tuple[str, int] | None:
    """The place of one tensor scale that another half of the same weight writes too; None where there is none."""
    place = write.place if isinstance(write, _Decode) else None
    if place is None or place.rows is None or place.expert is None or not isinstance(place.whole, QuantizedTensor):
        return None
    return place.name, place.expert


class _Copy:
    """Bytes or values as they are."""

    def __init__(self, name: str, into: Tensor) -> None:
        self.name, self.into = name, into

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        self.into.copy_(tensors[self.name])


class _Decode:
    """A quantized weight, as its bytes where the model keeps those, else as its values."""

    def __init__(self, layout: Any, fmt: Any, module: str, place: _Place) -> None:
        self.layout, self.fmt, self.module, self.place = layout, fmt, module, place
        whole = place.whole
        if isinstance(whole, QuantizedTensor):
            if (
                whole.swizzled
                or whole.transposed is not None
                or whole.amax is not None
                or type(whole.format) is not type(fmt)
            ):
                raise SyncError(
                    f"{place.name}: is a QuantizedTensor of another format, swizzled, with transposed data or with the "
                    "maximum that it was made with; a running model's must be as a checkpoint has them"
                )
        elif not whole.dtype.is_floating_point:
            raise SyncError(f"{place.name}: is {whole.dtype}; decoded weights need a floating-point parameter")

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            q = quantized_tensor(self.layout, self.fmt, self.module, dict(tensors))
        except CheckpointError as error:
            raise SyncError(str(error)) from error
        whole = self.place.whole
        if not isinstance(whole, QuantizedTensor):
            device, into = whole.device, self.place.of(whole)
            on_device = q.map_parts(lambda part: part.to(device))
            into.copy_(on_device.dequantize(whole.dtype))
            return
        self.place.of(whole.packed).copy_(q.packed)
        self.place.of(whole.block_scale).copy_(q.block_scale)
        if q.tensor_scale is not None and whole.tensor_scale is not None:
            expert = self.place.expert
            (whole.tensor_scale if expert is None else whole.tensor_scale[expert]).copy_(q.tensor_scale)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers that are saved, and QuantizedTensors that are neither."""
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            seen.add(name)
            yield name, value.detach() if not isinstance(value, QuantizedTensor) else value
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            name = f"{path}.{key}" if path else key
            if isinstance(value, QuantizedTensor) and name not in seen:
                yield name, value


def _memory(tensor: Tensor, name: str) -> tuple[Any, ...]:
    data = tensor.packed if isinstance(tensor, QuantizedTensor) else tensor
    return data.device, data.data_ptr(), tuple(data.shape), name if not data.numel() else ""
