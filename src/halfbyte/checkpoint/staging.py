"""Groups on their way to the device that quantizes them, and back; on the CPU there is no way to go.

A GPU holds two groups at most: while one is quantized, the next one is copied in, and results are copied out, each on
a stream of its own. Memory on the host is pinned; torch keeps it and gives it out again, group after group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .shards import Fetched


class Staging:
    """The way to one device and back. `send` may be called in another thread than the rest."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.is_pinned = self._device.type == "cuda"  # what is sent should be
        if self.is_pinned:
            self._in, self._out = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)

    def send(self, fetched: Sequence[Fetched]) -> tuple[list[Fetched], Any]:
        """Begin copying to the device. `received` takes what this returns; or what stays, and None."""
        with torch.cuda.stream(self._in):
            sent: dict[int, Tensor] = {}  # by what they were: several may share a part
            for part in (part for one in fetched for part in one.parts):
                if id(part) not in sent:
                    sent[id(part)] = part.to(self._device, non_blocking=True)
            there = [replace(one, parts=tuple(sent[id(part)] for part in one.parts)) for one in fetched]
            return there, self._in.record_event()

    def received(self, sent: tuple[list[Fetched], Any]) -> list[Fetched]:
        """The same on the device; the current stream waits for it."""
        fetched, event = sent
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for part in (part for one in fetched for part in one.parts):
                part.record_stream(stream)  # they are the other stream's memory
        return fetched

    def fetch(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the host, once the current stream has computed them; waits for that."""
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return tensors
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        found = {}
        with torch.cuda.stream(self._out):
            for name, tensor in tensors.items():
                if not tensor.is_cuda:  # an input's scale
                    found[name] = tensor
                    continue
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                found[name] = host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)
        self._out.synchronize()
        return found
