"""What grpo_tiny.py wrote: a row for each run, and a plot, which needs matplotlib.

python examples/grpo_results.py grpo-tiny docs/images/grpo-tiny.png
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any


def describe(line: dict[str, Any]) -> str:
    return (
        f"{line['variant']:>31} seed {line['seed']} step {line['step']:3}: reward {line['reward']:.3f}, |Δ log p| mean "
        f"{line['difference_mean']:.5f} max {line['difference_max']:.3f}, clipped {line['clipped']:.1%}, seconds "
        + ", ".join(f"{name} {value:.2f}" for name, value in line["seconds"].items())
    )


def read_lines(out: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Variant → the lines of each seed."""
    found: defaultdict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for file in sorted(out.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[lines[0]["variant"]].append(lines)
    return dict(found)


def summary(found: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """One row for each run: the reward of the first and last tenth of its steps, and the differences over all."""
    rows = []
    for variant, seeds in found.items():
        for lines in seeds:
            part = max(1, len(lines) // 10)
            rows.append(
                {
                    "variant": variant,
                    "seed": lines[0]["seed"],
                    "steps": len(lines),
                    "reward_first": statistics.mean(line["reward"] for line in lines[:part]),
                    "reward_last": statistics.mean(line["reward"] for line in lines[-part:]),
                    "difference_mean": statistics.mean(line["difference_mean"] for line in lines),
                    "difference_max": max(line["difference_max"] for line in lines),
                }
            )
    return rows


def plot(found: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Reward and differences over steps: a thin line for each seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, figsize=(9, 11), sharex=True)
    shown = (("reward", "reward"), ("difference_mean", "mean |Δ log p|"), ("difference_max", "maximum |Δ log p|"))
    for panel, (key, label) in zip(panels, shown, strict=True):
        for index, (variant, seeds) in enumerate(found.items()):
            curves = [[line[key] for line in lines] for lines in seeds]
            mean = [statistics.mean(values) for values in zip(*curves, strict=False)]
            for curve in curves:
                panel.plot(curve, color=f"C{index}", linewidth=0.5, alpha=0.4)
            panel.plot(mean, color=f"C{index}", linewidth=1.5, label=f"{variant} ({len(seeds)})")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    for panel in panels[1:]:
        panel.set_yscale("symlog", linthresh=1e-4)
        panel.set_ylim(bottom=0)
    panels[0].legend(fontsize=8, title="variant (seeds)")
    panels[0].axhline(1 / 3, linestyle=":", color="gray")
    panels[-1].set_xlabel("step")
    figure.suptitle("GRPO on the tiny model: log-probabilities of trainer and rollout under the same weights")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="grpo_tiny.py's --out")
    parser.add_argument("plot", type=Path, nargs="?", help="a PNG file")
    args = parser.parse_args()
    found = read_lines(args.directory)
    for row in summary(found):
        print(json.dumps(row))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
