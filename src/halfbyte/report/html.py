"""An inspection as one HTML file: nothing from elsewhere, every name escaped; its only script sorts tables."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..checkpoint.inspection import SEVERITIES, Inspection, Remark, Row
from ..checkpoint.measure import Measured
from ..errors import CheckpointError
from ..version import __version__
from . import plots
from .console import size
from .loaders import by_rule

WORST = 20
FIRST_REMARKS = 20
SHOWN_REMARKS = 200
SHOWN_LAYERS = 2000
SHADED = 3.0  # dB: smaller differences between layers do not span all shades


def visible(text: str) -> str:
    """Text in which nothing is hidden: control and direction characters as their numbers."""
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") else c for c in text)


def counted(remarks: Sequence[Remark]) -> str:
    """How many findings of each severity."""
    counts = Counter(remark.severity for remark in remarks)
    words = (f"{counts[s]} {s}{'' if counts[s] == 1 else 's'}" for s in SEVERITIES if counts[s])
    return ", ".join(words) or "none"


def _finalize(value: Any) -> Any:
    if value is None:
        return "–"
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(found: Inspection) -> str:
    """The whole file."""
    templates = Path(__file__).parent / "templates"
    script = (templates / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "percent": _percent, "decibel": _decibel, "count": "{:,}".format}
    environment.filters["breakable"] = _breakable
    columns, heat = _heat(found.layers)
    return environment.get_template("inspection.html").render(
        it=found,
        title=found.path.resolve().name,
        version=__version__,
        plots=plots,
        lines=plots.error_by_layer(found.layers),
        scale_bars=plots.scale_histograms(found.scales),
        code_bars=plots.code_histograms(found.codes),
        columns=columns,
        heat=heat,
        worst=_worst(found.weights),
        layers=found.layers[:SHOWN_LAYERS],
        remarks=found.remarks[:SHOWN_REMARKS],
        first_remarks=FIRST_REMARKS,
        counted=counted(found.remarks),
        script=Markup(script),
        script_hash=f"sha256-{digest}",  # the only script that the page's policy lets run
        verdicts=[(verdict, by_rule(verdict.objections)) for verdict in found.verdicts],
        sizes=_sizes(found),
    )


def write(found: Inspection, path: Path) -> None:
    """Write the file, whole or not at all; one that is there is replaced.

    Raises:
        CheckpointError: the path is a directory, or its parent does not exist.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CheckpointError(f"--html {path}: must be a file in a directory that exists")
    text = render(found).encode("utf-8", "replace")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with open(handle, "wb") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _decibel(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _breakable(name: str) -> Markup:
    """A tensor's name that may break after its dots."""
    return Markup(".<wbr>").join(escape(visible(part)) for part in name.split("."))


def _worst(weights: Sequence[Measured]) -> list[dict[str, Any]]:
    rows = [weight.to_json() for weight in weights]
    known = [row for row in rows if row["relative_error"] is not None]
    return sorted(known, key=lambda row: -row["relative_error"])[:WORST]


def _sizes(found: Inspection) -> list[tuple[str, int, float, int | None]]:
    """(what, bytes, share, color of its bar or None) of everything in the files, the largest first."""
    parts = [(f"{row.label} ({row.place[4]})", row.nbytes, True) for row in found.kinds]
    parts += [(f"{kind}, not quantized", nbytes, False) for kind, (_, nbytes) in found.kept.items()]
    parts.sort(key=lambda part: -part[1])
    total = max(sum(nbytes for _, nbytes, _ in parts), 1)
    return [
        (label, n, n / total, i % plots.COLORS if quantized else None) for i, (label, n, quantized) in enumerate(parts)
    ]


def _heat(layers: Sequence[Row]) -> tuple[list[str], list[tuple[str, list[tuple[str, int] | None]]]]:
    """(columns, rows of cells) of signal to noise by layer and place; a cell is its text and its shade, worst 0 … 8."""
    known = [row for row in layers if row.snr is not None and row.place[1] is not None]
    columns = list(dict.fromkeys(f"{row.place[2]} {row.place[3]}" for row in known))
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in known:
        cells.setdefault((row.place[0], row.place[1] or 0), {})[f"{row.place[2]} {row.place[3]}"] = row.snr or 0.0
    values = [value for line in cells.values() for value in line.values()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)

    def cell(value: float | None) -> tuple[str, int] | None:
        return None if value is None else (f"{value:.1f}", round(8 - 8 * (high - value) / max(high - low, SHADED)))

    rows = []
    for (tower, layer), line in sorted(cells.items()):
        name = f"{layer}" if tower == "decoder" else f"{tower} {layer}"
        rows.append((name, [cell(line.get(column)) for column in columns]))
    return columns, rows
