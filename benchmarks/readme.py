"""The tables of speed in README.md and docs/benchmarks.md, written from benchmarks/results/.

    python3 benchmarks/readme.py [--check]

Each stands between `<!-- FILE.json -->` and `<!-- end -->`. With --check nothing is written, and the exit code is 1
where a table is not the one that its file gives. Where a run was made with --no-alternatives, what runs beside it comes
from FILE-alternatives.json, an earlier run, and its commit is said.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(r"<!-- (?P<file>\w+\.json) -->\n.*?<!-- end -->", re.DOTALL)
Row = Mapping[str, Any]


def spell(shape: list[int]) -> str:
    return "×".join(map(str, shape))


def time(row: Row) -> str:
    """Microseconds; as a share of the copy's bandwidth too where goals can be judged."""
    value = row["microseconds"]
    figure = f"{value:,.0f} µs" if value >= 100 else f"{value:.1f} µs"
    return f"{figure}, {row['of_copy']:.0%}" if row["of_copy"] >= 0.05 else figure


def ratios(rows: list[Row]) -> str:
    """What runs beside it, with how many times as long that takes at each size."""
    names = {name: None for row in rows for name in row["times_alternative"]}
    found = {n: [row["times_alternative"][n] for row in rows if n in row["times_alternative"]] for n in names}
    return ", ".join(f"{' / '.join(f'{v:.2f}' for v in values)}× {name}" for name, values in found.items())


def asked(rows: list[Row]) -> str:
    """Goals, each with a mark: reached at every size, at some, or at none."""
    out = []
    for name in {name: None for row in rows for name in row["goals"]}:
        goals = [row["goals"][name] for row in rows if name in row["goals"]]
        reached = [goal["reached"] for goal in goals]
        mark = "✓" if all(reached) else "(✓)" if any(reached) else "✗"
        wanted = goals[0]["wanted"]
        if name == "of copy":
            out.append(f"≥ {wanted:.0%} of copy {mark}")
        elif name.startswith("time of "):
            measured = " / ".join(f"{goal['measured']:.2f}" for goal in goals)
            out.append(f"≤ {wanted:g}× {name.removeprefix('time of ')}: {measured} {mark}")
        elif any(goal["measured"] is not None for goal in goals):
            out.append(f"≥ {wanted:g}× {name.removeprefix('times ')} {mark}")
    return ", ".join(out)


def table(result: Row) -> str:
    """Markdown: an operation per line, a size per column; operations of one size of their own name it."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["name"], {})[spell(row["shape"])] = row
    shared = {shape: None for rows in by_name.values() if len(rows) > 1 for shape in rows}
    lines = [
        f"| operation | {' | '.join(shared)} | beside it | asked |",
        "|---" * (len(shared) + 3) + "|",
    ]
    for name, rows in by_name.items():
        cells = [time(rows[shape]) if shape in rows else "" for shape in shared]
        if not any(shape in rows for shape in shared):
            ((shape, row),) = rows.items()
            name, cells[0] = f"{name}, {shape}", time(row)
        values = list(rows.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {ratios(values)} | {asked(values)} |")
    return "\n".join(lines)


def source(result: Row) -> str:
    hardware = result["hardware"]
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(f"{p} {v}" for p, v in result["versions"].items() if p in ("torch", "triton", "numba"))
    python = ", ".join(f"{name} {value:.0f}" for name, value in result["python_microseconds"].items())
    return (
        f"{where}, {versions}, commit {result['commit'][:7]}; a copy moves "
        f"{result['copy_bytes_per_second'] / 1e9:,.0f} GB/s, read and written. "
        f"Python's share of one call, in µs: {python}."
    )


def with_alternatives(result: Row, earlier: Row) -> Row:
    """Rows with the ratios, and the goals of ratios, that an earlier run has of the same operations and sizes."""
    found = {(row["name"], spell(row["shape"])): row for row in earlier["rows"]}
    rows = []
    for row in result["rows"]:
        other = found.get((row["name"], spell(row["shape"])), {"times_alternative": {}, "goals": {}})
        goals = {name: goal for name, goal in row["goals"].items() if not name.startswith("times ")}
        goals |= {name: goal for name, goal in other["goals"].items() if name.startswith("times ")}
        rows.append({**row, "times_alternative": other["times_alternative"], "goals": goals})
    return {**result, "rows": rows}


def render(readme: str) -> str:
    def section(match: re.Match[str]) -> str:
        file = ROOT / "benchmarks" / "results" / match["file"]
        result = json.loads(file.read_text())
        said = source(result)
        if (beside := file.with_name(f"{file.stem}-alternatives.json")).exists():
            earlier = json.loads(beside.read_text())
            result = with_alternatives(result, earlier)
            said += f" What runs beside it was measured at commit {earlier['commit'][:7]}."
        return f"<!-- {match['file']} -->\n{said}\n\n{table(result)}\n<!-- end -->"

    return MARKED.sub(section, readme)


def main() -> None:
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = render(before)
        if after != before:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(after)
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"not what benchmarks/results/ gives: {', '.join(stale)}; run benchmarks/readme.py")


if __name__ == "__main__":
    main()
