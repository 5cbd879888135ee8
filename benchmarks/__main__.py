"""The speed of halfbyte on this machine: the GPU's table where there is an NVIDIA GPU, else the CPU's.

    PYTHONPATH=src python3 benchmarks [--device cpu] [--gate full] [--only NAME] [--shapes 8192x8192] [--json [FILE]]

First the bytes of every operation are compared with the contract, `halfbyte.numerics`; one that differs ends the run
before anything is timed. Then medians: in microseconds, as a fraction of the bandwidth of a copy, and as a multiple of
the speed of what else does the same, all measured in this run. Bytes are counted once, read or written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from provenance import ROOT, provenance
from registry import LARGE, Call, Case, Shape, Table, judge

OVERHEAD_GOAL = 40.0  # microseconds of Python in a call


def build(table: Table, cases: list[Case], shapes: list[Shape], alternatives: bool) -> dict[tuple[str, Shape], Call]:
    """What is timed, by name and shape: cases and, for large inputs, their alternatives."""
    calls: dict[tuple[str, Shape], Call] = {}
    missing: set[str] = set()
    for case in cases:
        for shape in case.shapes(shapes):
            calls[case.name, shape] = case.build(shape)
            large = math.prod(shape) >= LARGE
            for name, make in case.alternatives.items() if alternatives and large else ():
                if name in missing or (name, shape) in calls:
                    continue
                try:
                    calls[name, shape] = make(shape)
                except ImportError as error:
                    missing.add(name)
                    print(f"without {name}: {error}")
    return calls


def overhead(calls: Mapping[str, Call]) -> dict[str, float]:
    """Microseconds of host time of a call: the least of several averages, since others only ever add to it."""
    results = {}
    for name, call in calls.items():
        averages = []
        for repeat in range(8):
            start = time.perf_counter()
            for _ in range(20 if repeat == 0 else 200):
                call()
            averages.append((time.perf_counter() - start) / 200)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        results[name] = min(averages[1:]) * 1e6
    return results


def spell(shape: Shape) -> str:
    return "×".join(map(str, shape))


def show(result: Mapping[str, object]) -> None:
    print(f"copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written")
    for row in result["rows"]:
        line = (
            f"{row['name']:36s} {spell(row['shape']):14s} {row['microseconds']:10.1f} µs {row['of_copy']:6.1%} of copy"
        )
        ratios = [f"{ratio:.2f}× {name}" for name, ratio in row["times_alternative"].items()]
        goals = [
            f"{'✓' if goal['reached'] else '✗'} {name}: {goal['measured'] or 0:.2f}, goal {goal['wanted']:.2f}"
            for name, goal in row["goals"].items()
        ]
        print("  ".join([line, *ratios, *goals]))
    for name, microseconds in result["python_microseconds"].items():
        reached = "✓" if microseconds < OVERHEAD_GOAL else "✗"
        print(f"{reached} one call, {name}: {microseconds:.1f} µs of Python, goal under {OVERHEAD_GOAL:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--gate", choices=("quick", "full"), default="quick", help="full: over 10^9 elements on a GPU")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--shapes", nargs="+", help="rows×columns instead of the table's, such as 4096x4096")
    parser.add_argument("--no-alternatives", action="store_true", help="time halfbyte alone")
    parser.add_argument("--note", help="what to know about this run, for the file")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), help="write a file; benchmarks/results/ if none")
    options = parser.parse_args()
    if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()):
        from gpu import table as make_table
    else:
        from cpu import table as make_table
    table = make_table()
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes] if options.shapes else table.shapes
    cases = [case for case in table.cases if options.only is None or options.only in case.name]
    if not cases:
        sys.exit(f"--only {options.only}: choose from {', '.join(case.name for case in table.cases)}")

    start = time.monotonic()
    compared = table.gate(options.gate == "full")
    print(f"bytes equal the contract's: {compared:,} elements in {time.monotonic() - start:.0f} s", flush=True)
    calls = build(table, cases, shapes, not options.no_alternatives)
    size, copy = table.copy
    times = table.medians({"copy": copy, **calls})
    bandwidth = size / times["copy"]
    result = {
        **provenance(options.commit),
        "hardware": table.hardware,
        "note": options.note,
        "copy_bytes_per_second": bandwidth,
        "gate_elements": compared,
        "rows": [
            judge(case, shape, times[case.name, shape], bandwidth, times)
            for case in cases
            for shape in case.shapes(shapes)
            if (case.name, shape) in times
        ],
        "alternatives": [
            {"name": name, "shape": list(shape), "microseconds": times[name, shape] * 1e6}
            for name, shape in calls
            if (name, shape) in times and name not in {case.name for case in cases}
        ],
        "python_microseconds": overhead(table.overhead),
    }
    show(result)
    if options.json is not None:
        file = options.json if options.json.name else ROOT / "benchmarks" / "results" / f"{table.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {file}")


if __name__ == "__main__":
    main()
