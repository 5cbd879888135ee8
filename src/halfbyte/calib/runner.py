"""Take a model through its calibration data, one decoder layer at a time.

The embeddings run first; then each layer is read from the checkpoint, runs on all samples while what flows into its
weights is observed, is quantized, and runs once more as it will be served: that is what the next layer sees. No more
than one layer is in memory; the samples' activations are, or are spilled to disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.manifest import options_to_json
from ..checkpoint.options import Options
from ..checkpoint.plan import Plan, make_plan
from ..checkpoint.shards import Checkpoint
from ..formats import NVFP4
from ..version import __version__
from . import experts
from .activations import Activations, embed
from .data import Windows
from .group import Member
from .model import Decoder, empty, open_decoder
from .options import Calibration
from .ranks import Ranks
from .step import Step
from .store import SPILLED, Store, begin, fingerprint

Progress = Callable[[str, float], None]  # what is being done, and the share of all that is done


@dataclass(frozen=True)
class Summary:
    """What a calibration found: a report on each group, warnings in words, tokens routed to each expert."""

    groups: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    routed: dict[str, list[int]]

    @property
    def saturated(self) -> int:
        """Blocks of sixteen weights that GPTQ moved beyond the tensor scale's reach."""
        return sum(group["saturated"] for group in self.groups)


@torch.no_grad()
def run(
    checkpoint: Checkpoint,
    options: Options,
    calibration: Calibration,
    windows: Windows,
    work: Path,
    *,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    progress: Progress = lambda text, share: None,
) -> tuple[Store, Summary]:
    """Calibrate; results go to the directory `work`, layer by layer. What is done there is not done again.

    work: a directory that rank 0 has `working`.

    ranks: `Ranks.current()` where several processes do it together; by default this one does it alone.

    Raises:
        CheckpointError: something is wrong with the source, the options for it, or `work`; the model gives NaN.
        UnsupportedError: transformers is missing, or a layer has weights that cannot be observed.
    """
    ranks = ranks or Ranks()
    plan = make_plan(checkpoint, options)
    settings = {
        "halfbyte_version": __version__,
        "torch_version": torch.__version__,
        "source": fingerprint(checkpoint),
        "options": {key: value for key, value in options_to_json(options).items() if key not in ("layout", "recipe")},
        "calibration": calibration.to_json(),
        "data": {"sha256": windows.digest, "samples": len(windows.ids), "sequence_length": windows.ids.shape[1]},
    }
    experts.register()
    progress("building the model", 0.0)
    decoder = open_decoder(checkpoint, plan, calibration.dtype, device, calibration.layers_path)
    with ranks.together():
        if ranks.rank == 0:
            store = begin(work, settings)
    with ranks.together():
        if ranks.rank > 0:
            store = Store(work, settings)
    groups = _groups(plan, decoder)
    with tempfile.TemporaryDirectory(prefix=SPILLED, dir=work) as spilled:
        missing = [index for index in range(len(decoder.layers)) if index not in store.layers]
        with ranks.together():
            states = Activations(windows.ids, ranks, Path(spilled), calibration.spill)
            if missing:
                embed(decoder, states, device)
        for index, layer in enumerate(decoder.layers):
            progress(f"layer {index + 1} of {len(decoder.layers)}", index / len(decoder.layers))
            step = Step(checkpoint, decoder, index, groups[index], options, calibration, ranks, device)
            step.run(store, states, leads_on=bool(missing) and index < missing[-1])
            empty(layer)
        with ranks.together():  # rank 0 has saved everything by now
            if ranks.rank > 0:
                store = Store(work, settings)
    return store, summarize(store)


def summarize(store: Store) -> Summary:
    """A calibration in figures, with what a user should know in words."""
    groups = [group for _, layer in sorted(store.layers.items()) for group in layer["groups"]]
    warnings = [warning for _, layer in sorted(store.layers.items()) for warning in layer["warnings"]]
    routed = {path: counts for layer in store.layers.values() for path, counts in layer["routed"].items()}
    return Summary(tuple(groups), tuple(warnings), routed)


def _groups(plan: Plan, decoder: Decoder) -> list[list[list[Member]]]:
    """For each layer, its fused groups of NVFP4 weights."""
    places = {item.name.full: (i, local) for i, items in enumerate(decoder.items) for local, item in items.items()}
    layers: list[list[list[Member]]] = [[] for _ in decoder.layers]
    for group in plan.groups:
        fmt = group[0].format
        if isinstance(fmt, NVFP4) and group[0].name.full in places:
            members = [Member(item.name.full, places[item.name.full][1], fmt) for item in group]
            layers[places[group[0].name.full][0]].append(members)
    return layers
