"""One decoder layer's turn: observed, quantized, and run as it will be served."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.manifest import format_to_json
from ..checkpoint.options import Options
from ..checkpoint.ranks import deal
from ..checkpoint.shards import Checkpoint
from ..errors import CheckpointError, ShapeError
from ..tensor import QuantizedTensor
from . import attention, experts
from .activations import Activations
from .group import STARVING, GroupReport, Member, Quantizer, Site, Statistics
from .model import Decoder, fill, layer_reader, set_weight
from .options import Calibration
from .ranks import Ranks
from .store import INPUT_DIVISOR, Store, source_digest, weight_tensors


class Step:
    """One layer's turn."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        index: int,
        groups: list[list[Member]],
        options: Options,
        calibration: Calibration,
        ranks: Ranks,
        device: torch.device | str,
    ) -> None:
        self.checkpoint, self.index, self.groups = checkpoint, index, groups
        self.layer, self.items = decoder.layers[index], decoder.items[index]
        self.options, self.calibration, self.ranks, self.device = options, calibration, ranks, device

    def run(self, store: Store, states: Activations, *, leads_on: bool) -> None:
        """Fill the layer, observe and quantize it unless that was done before, and send the samples through.

        leads_on: whether a later layer needs what comes out of this one.
        """
        done = store.layers.get(self.index)
        read = layer_reader(self.checkpoint, self.items, self.layer)
        where = f"{self.checkpoint.directory}: layer {self.index}"
        with self.ranks.together():
            if done is None or leads_on:
                fill(self.layer, "layer", read, self.device, self.calibration.dtype, where)
            digest = source_digest(self._read, list(self.items))
        if done is None:
            tensors, summary = self._calibrate(states)
            with self.ranks.together():
                if self.ranks.rank == 0:
                    store.save(self.index, tensors, {**summary, "source": digest})
            decoded = self._decoded
        elif done["source"] != digest:
            raise CheckpointError(f"{where}: its weights have changed since; remove {store.directory} to begin again")
        elif leads_on:
            decoded = {m.name: q for group in self.groups for m in group if (q := store.weight(m.name)) is not None}
        if not leads_on:
            return
        for group in self.groups:
            for member in group:
                set_weight(self.layer, member.local, decoded[member.name].dequantize().to(self.device))
        for span in states.batches:
            self._forward(span, states, keep=True)

    def _read(self, local: str) -> Tensor:
        item = self.items[local]
        return self.checkpoint.read(item.source, item.index)

    def _forward(self, span: int, states: Activations, keep: bool) -> None:
        out = self.layer(states[span].to(self.device), **states.arguments[span][self.index])
        out = out[0] if isinstance(out, tuple) else out
        if keep:
            states[span] = out

    def _calibrate(self, states: Activations) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sites = self._sites()
        with ExitStack() as stack:
            counts = stack.enter_context(experts.observed(self.layer, sites, self.calibration.every_expert))
            caches = stack.enter_context(attention.observed(self.layer, self.options.kv_cache == "fp8_calibrated"))
            stack.enter_context(self.ranks.together())
            for span in states.batches:
                try:
                    self._forward(span, states, keep=False)
                except ShapeError as error:
                    raise CheckpointError(f"layer {self.index}: {error}") from error
                for site in set(sites.values()):
                    site.end_span(span)
        statistics = {id(site): site.reduce(self.ranks) for site in dict.fromkeys(sites.values())}
        found = {path: statistics[id(site)] for path, site in sites.items()}
        tensors = self._quantize(found)
        amaxes, warnings = self._inputs(found)
        prefix = self._prefix()
        routed = {f"{prefix}{path}": self.ranks.total(count).tolist() for path, count in counts.items()}
        summary = {
            "groups": [report.to_json() for report in self._reports],
            "formats": {m.name: format_to_json(m.format) for group in self.groups for m in group},
            "routed": routed,
            "warnings": [*warnings, *_starving(routed)],
        }
        for path, cache in caches.items():
            for part, amax in zip("kv", cache, strict=True):
                tensors[f"{prefix}{path}:{part}_amax"] = self.ranks.maximum(amax)
        return {**tensors, **amaxes}, summary

    def _sites(self) -> dict[str, Site]:
        """Where each group's tokens enter, by the path of its first member in the layer."""
        sites: dict[str, Site] = {}
        shared: dict[str, Site] = {}
        modules = dict(self.layer.named_modules())
        for group in self.groups:
            path = group[0].local.removesuffix(".weight")
            name, columns = group[0].name.removesuffix(".weight"), self.items[group[0].local].shape[1]
            hessian = self.calibration.gptq is not None or group[0].format.error == "hessian"
            site = Site(name, columns, self.calibration.observer, hessian, self.device)
            if self.calibration.every_expert and path not in modules and path.endswith("gate_proj"):
                site = shared.setdefault(path.rsplit(".", 2)[0], site)  # all experts see the same tokens
            sites[path] = site
        return sites

    def _quantize(self, found: dict[str, Statistics]) -> dict[str, Tensor]:
        """Quantize the groups, each on one rank: the costliest first, to whichever has least to do.

        Every rank is through with its own groups before any is exchanged; else they would wait for one another.
        """
        quantizer = Quantizer(self.calibration.gptq)
        everyone = range(self.ranks.world)
        owners = deal([self._cost(group) for group in self.groups], everyone, [0 for _ in everyone])
        results: dict[int, tuple[list[QuantizedTensor], GroupReport]] = {}
        with self.ranks.together():
            for number, group in enumerate(self.groups):
                if owners[number] == self.ranks.rank:
                    weights = [self._read(member.local).to(self.device) for member in group]
                    results[number] = quantizer(group, weights, found[group[0].local.removesuffix(".weight")])
        self._decoded: dict[str, QuantizedTensor] = {}
        self._reports: list[GroupReport] = []
        tensors: dict[str, Tensor] = {}
        for number, group in enumerate(self.groups):
            quantized, report = self.ranks.object(results.pop(number, None), owners[number])
            self._reports.append(report)
            for member, q in zip(group, quantized, strict=True):
                self._decoded[member.name] = q
                tensors |= weight_tensors(member.name, q)
        return tensors

    def _cost(self, group: list[Member]) -> int:
        """Of GPTQ, about: a Hessian's factors, then each column of the weights against all later ones."""
        columns = self.items[group[0].local].shape[1]
        return columns**2 * (columns + sum(self.items[member.local].shape[0] for member in group))

    def _inputs(self, found: dict[str, Statistics]) -> tuple[dict[str, Tensor], list[str]]:
        """Maxima of all modules' inputs; one that no token reached takes its siblings' largest."""
        siblings: dict[str, list[Tensor]] = {}
        for path, statistics in found.items():
            if bool(statistics.amax > 0):
                siblings.setdefault(_template(path), []).append(statistics.amax)
        tensors, warnings = {}, []
        for group in self.groups:
            path = group[0].local.removesuffix(".weight")
            amax = found[path].amax
            if not bool(amax > 0):
                others = siblings.get(_template(path))
                amax = torch.stack(others).amax() if others else torch.full_like(amax, INPUT_DIVISOR)
                source = "its siblings" if others else "no data: 1.0"
                why = "no token reached it" if found[path].tokens == 0 else "its inputs are all zero"
                warnings.append(f"{group[0].name.removesuffix('.weight')}: {why}; its input scale is from {source}")
            for member in group:
                tensors[f"{member.name.removesuffix('.weight')}:input_amax"] = amax.clone()
        return tensors, warnings

    def _prefix(self) -> str:
        """What the names of the layer's tensors begin with in the checkpoint."""
        return next(i.name.full.removesuffix(local) for local, i in self.items.items() if i.name.full.endswith(local))


def _template(path: str) -> str:
    """A path with its indices blanked: the same place in all experts."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _starving(routed: dict[str, list[int]]) -> list[str]:
    return [
        f"{path}.{expert}: {count} tokens, of {sum(counts) / len(counts):.0f} on average; more data, or every token "
        "shown to every expert, would help it"
        for path, counts in routed.items()
        for expert, count in enumerate(counts)
        if count < STARVING * sum(counts) / len(counts)
    ]
