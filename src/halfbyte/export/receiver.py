"""The receiving end: a running model whose weights change in place, from one version to the next or not at all.

All of a sync is staged beside the model, as the 4- or 8-bit bytes that came, and checked. Only then are they written
into the parameters, which nothing but a failing device can interrupt. That takes one more copy of the quantized
bytes: 0.28 of a model kept in bf16, as much again as one kept in 4 bits. It is kept from sync to sync, and it is what
deltas are applied to.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SyncError
from ..ops.copies import prepare_copies
from .delta import Change, Delta, apply_delta
from .engine import Serving
from .layout import SEAL_BYTES, Layout, is_broken, salt_of
from .link import Link
from .pieces import Piece
from .targets import Model, Targets, Update, shares_scale


class Receiver:
    """Takes versions of the weights for one running model.

    Attributes:
        version: what the model serves; None: what it was made with.
        staged_bytes: memory held beside the model.
    """

    def __init__(self, model: Model, *, version: int | None = None) -> None:
        """
        Args:
            model: a module, such as `halfbyte.load` returns; or an engine's tensors by their names in a quantized
                checkpoint. Their addresses never change.
            version: of the weights that it has.
        """
        self.version = version
        self._targets = Targets(model)
        self._layouts: dict[str, Layout] = {}
        self._staging: dict[int, Tensor] = {}
        self._staged: list[Layout] = []
        self._write: tuple[Any, _Write] | None = None  # of the last full sync
        self._is_base = False  # whether what is staged is what the model serves

    @property
    def staged_bytes(self) -> int:
        """Of all staging buffers."""
        return sum(flat.nbytes for flat in self._staging.values())

    def receive(self, link: Link, *, version: int | None = None, serving: Serving | None = None) -> int:
        """Take the next sync that the link's sender sends; the model serves on until all of it is here.

        Then: pause → flush_cache → the weights → set_version → resume, of serving.

        Args:
            link: of any rank but 0.
            version: the only one that is wanted; None: any newer than the present one.
            serving: the engine around the model, if something must stop while weights change.

        Returns:
            the new version.

        Raises:
            SyncError: the sync did not arrive whole, does not fit, or is not wanted; the old version serves, and
                `link.problem` tells whether the link can be used again. Everyone on the link hears of it, and no one
                takes that version.
        """
        moved = self._targets.moved()  # while nothing has come yet
        start = link.hear()
        objection = self._objection(start, version)
        if moved is not None:
            objection = (
                f"{moved}: is not where it was when the Receiver was made; make a new one for the model as it is"
            )
        link.agree(objection, "the start of a sync")
        new, problem = int(start["version"]), None
        broken: list[Tensor] = []
        layouts: list[Layout] = []
        delta = start["delta"]
        self._is_base &= delta is not None
        scratch: dict[int, Tensor] = {} if delta is not None else self._staging
        checks = torch.cuda.Stream(link.device) if link.device.type == "cuda" else None
        try:
            while (message := link.hear())["what"] == "bucket":
                layout = self._layout(message)
                flat = _buffer(scratch, len(layouts), layout.nbytes + SEAL_BYTES, link.device)
                link.broadcast(flat)
                if checks is not None:  # while the next one travels
                    checks.wait_stream(torch.cuda.current_stream(link.device))
                with torch.cuda.stream(checks):
                    broken.append(is_broken(flat, layout.nbytes, salt_of(new, len(layouts))))
                layouts.append(layout)
            if checks is not None:
                torch.cuda.current_stream(link.device).wait_stream(checks)
        except BaseException:
            link.close()  # the others cannot go on without this rank: they notice at once
            raise
        if message["what"] == "abort":
            raise SyncError(f"the sender gave up: {message['reason']}; version {self.version} serves on")
        link.settle()
        changed: dict[str, Tensor] = {}
        try:
            problem = _problem(broken, int(message["buckets"]), new)
            if problem is None and delta is None:
                write = self._full(layouts)
            elif problem is None:
                changed = self._apply(delta, _tensors(scratch, layouts))
                write = _Write(self._targets.updates(_shapes(changed), False), changed)
            if problem is None:
                problem = write.problem()
        except (SyncError, CheckpointError) as error:
            problem = str(error)
        except Exception as error:  # everyone votes, whatever happened here
            problem = f"{type(error).__name__}: {error}"
        link.agree(problem and f"{problem}; version {self.version} serves on", "whether everything arrived")
        if delta is None:
            self._staged = layouts
            for index in [i for i in self._staging if i >= len(layouts)]:
                del self._staging[index]
            self._layouts = {layout.digest: layout for layout in layouts}
        failure: SyncError | None = None
        try:
            self._take_over(new, write, changed, serving)
        except SyncError as error:
            failure = error
        except Exception as error:  # of the engine around the model
            failure = SyncError(
                f"the engine around version {new} failed ({type(error).__name__}: {error}): it serves version "
                f"{self.version}, or is paused"
            )
            failure.__cause__ = error
        with suppress(SyncError):  # another's trouble: here the new version serves
            link.agree(None if failure is None else str(failure), "whether everyone has taken over")
        if failure is not None:
            raise failure
        return new

    def _objection(self, start: Mapping[str, Any], version: int | None) -> str | None:
        """Why a sync that begins is refused, or None."""
        new, delta = start.get("version"), start.get("delta")
        if start.get("what") != "start" or not isinstance(new, int):
            return f"a sync begins with its version, not with {start}"
        if version is not None and new != version:
            return f"version {new} came, wanted is {version}; version {self.version} serves on"
        if self.version is not None and new <= self.version:
            return f"version {new} is not newer than {self.version}, which serves on"
        if delta is not None and (not self._is_base or delta["base_version"] != self.version):
            return (
                f"this delta is for version {delta['base_version']}; here is {self.version}"
                f"{'' if self._is_base else ', whose bytes are not staged any more'}: send everything"
            )
        return None

    def _layout(self, message: Mapping[str, Any]) -> Layout:
        """Of the bucket that comes next; its text comes once."""
        digest = message["layout"]
        if text := message.get("text"):
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                raise SyncError("a bucket's layout is damaged; the old version serves on")
            self._layouts[digest] = Layout.parse(text)
        if digest not in self._layouts:
            raise SyncError("a bucket's layout was sent before this receiver came: make a new link, or a new Sender")
        return self._layouts[digest]

    def _full(self, layouts: list[Layout]) -> _Write:
        """What to do with a full sync of these layouts; the same as last time, as a rule."""
        key = tuple((layout.digest, self._staging[i].data_ptr()) for i, layout in enumerate(layouts))
        if self._write is None or self._write[0] != key:
            tensors = _tensors(self._staging, layouts)
            self._write = key, _Write(self._targets.updates(_shapes(tensors), True), tensors)
        return self._write[1]

    def _apply(self, delta: Mapping[str, Any], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a delta changes, as they are after it."""
        changes = {}
        for name, (dtype, shape) in delta["changes"].items():
            positions = sent.get(f"{name}:positions")
            changes[name] = Change(dtype, tuple(shape), positions, sent[f"{name}:values"])
        base = _tensors(self._staging, self._staged)
        result = apply_delta(base, Delta(delta["base"], delta["result"], changes))
        every = dict(result)
        weights = {name.rpartition(".")[0] for name in changes}
        return {n: t for n, t in every.items() if n in changes or n.rpartition(".")[0] in weights}

    def _take_over(self, version: int, write: _Write, changed: dict[str, Tensor], serving: Serving | None) -> None:
        """Write everything into the model. Nothing is expected to fail here; if it does, no version is served.

        changed: by a delta: what is staged changes with it.
        """
        if serving is not None:
            try:
                serving.pause()
                serving.flush_cache()
            except Exception:
                with suppress(Exception):  # nothing has been written: the old version can serve
                    serving.resume()
                raise
        old, self.version = self.version, None
        try:
            with torch.no_grad():
                write()
                base = _tensors(self._staging, self._staged) if changed else {}
                for name, tensor in changed.items():
                    base[name].copy_(tensor)
            self._targets.written()
            self._targets.synchronize()  # the engine may have streams of its own
        except BaseException as error:
            self._is_base = False
            raise SyncError(
                f"writing version {version} over {old} failed in the middle ({error}): the model must not serve until "
                "a full sync has succeeded"
            ) from error
        self.version, self._is_base = version, True
        if serving is not None:
            serving.set_version(version)
            serving.resume()


class _Write:
    """Everything that a version writes into the model, in few launches where bytes are only copied."""

    def __init__(self, updates: list[Update], tensors: Mapping[str, Tensor]) -> None:
        self.others: list[tuple[Update, dict[str, Tensor]]] = []
        plain: list[tuple[Tensor, Tensor]] = []
        for update in updates:
            sources = {source: tensors[source] for source in update.sources}
            first = tensors[update.sources[0]]
            if update.into is not None and update.into.dtype == first.dtype:
                plain.append((update.into, first))
            else:
                self.others.append((update, sources))
        self.copy = prepare_copies(plain)

    def problem(self) -> str | None:
        """Why this must not be written, or None: two halves of one weight can have one tensor scale only."""
        scales: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for update, given in self.others:
            if (place := shares_scale(update.write)) is not None and len(update.sources) == 3:
                scales[place].append(given[update.sources[2]].reshape(()))
        halves = list(zip(*(each for each in scales.values() if len(each) == 2), strict=True))
        if halves and not torch.equal(torch.stack(halves[0]), torch.stack(halves[1])):  # thousands of experts at once
            return "gate and up of an expert have different tensor scales, and one place in the model"
        return None

    def __call__(self) -> None:
        self.copy()
        for update, given in self.others:
            update.write(given)


def _buffer(buffers: dict[int, Tensor], index: int, size: int, device: torch.device) -> Tensor:
    if index not in buffers or len(buffers[index]) != size or buffers[index].device != device:
        buffers[index] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffers[index]


def _problem(broken: list[Tensor], expected: int, version: int) -> str | None:
    """What is wrong with the buckets of a sync; waits for the device once."""
    if len(broken) != expected:
        return f"{len(broken)} of {expected} buckets of version {version} came"
    wrong = torch.stack(broken).nonzero().flatten().tolist() if broken else []
    if wrong:
        return f"bucket {wrong[0]} of version {version} did not arrive as it was sent: its checksum is another"
    return None


def _tensors(buffers: Mapping[int, Tensor], layouts: list[Layout]) -> dict[str, Tensor]:
    """Whole tensors of all buckets, parts joined."""
    found: defaultdict[str, list[Piece]] = defaultdict(list)
    for index, layout in enumerate(layouts):
        for piece in layout.views(buffers[index]):
            found[piece.name].append(piece)
    return {name: _joined(name, pieces) for name, pieces in found.items()}


def _joined(name: str, pieces: list[Piece]) -> Tensor:
    if len(pieces) > 1 or pieces[0].dim is not None:
        raise SyncError(f"{name}: came in parts; join those of all ranks with merge before sending")
    return pieces[0].tensor


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
