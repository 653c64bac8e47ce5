"""Draw the rows of `bench.quality` over the number of steps, and the same digits by every solver.

    python -m bench.curves chart ROWS.json [ROWS.json ...] --out quality.png
    python -m bench.curves digits --out digits.png

It needs matplotlib. Rows of several files are of several sets of seeds: the line is their mean, the bar
reaches from the least to the largest.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import admfast
from bench.quality import SETS, Setting

MEASURES = {
    "frechet": "Frechet distance",
    "nearest_neighbour": "1-NN accuracy",
    "recall": "recall",
}
KINDS = {"unguided": "unguided", "guidance 2": "guided by the classifier, scale 2"}
IMAGES, WIDTH = 16, 12  # digits in a row, and inches
Points = dict[int, list[float]]  # values by number of steps


def _pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files; the help of the command doesn't need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def read_points(paths: Sequence[Path]) -> dict[tuple[str, str], dict[str, Points]]:
    """Return the points of each line, by (solver and spacing, kind of guidance) and measure."""
    lines: dict[tuple[str, str], dict[str, Points]] = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        for name, row in json.loads(path.read_text())["rows"].items():
            match = re.fullmatch(r"(\S+) (\d+)( \S+)?, (.+)", name)
            if match is None or not isinstance(row, dict) or match[4] not in KINDS:
                continue
            for measure in MEASURES:
                points = lines[match[1] + (match[3] or ""), match[4]][measure]
                points.setdefault(int(match[2]), []).append(row[measure])
    return lines


def draw_chart(paths: Sequence[Path], out: Path) -> None:
    """Draw every measure over the number of steps, with a line for each solver, and write a PNG file."""
    lines = read_points(paths)
    solvers = list(dict.fromkeys(solver for solver, _ in lines))
    plt = _pyplot()
    figure, axes = plt.subplots(len(MEASURES), len(KINDS), figsize=(WIDTH, 12), sharex=True, sharey="row")
    for column, (kind, title) in enumerate(KINDS.items()):
        axes[0][column].set_title(title)
        for row, (measure, label) in enumerate(MEASURES.items()):
            axis = axes[row][column]
            for i, solver in enumerate(solvers):
                points = lines.get((solver, kind), {}).get(measure, {})
                steps = sorted(points)
                means = [float(np.mean(points[count])) for count in steps]
                spread = [
                    [abs(edge(points[n]) - m) for n, m in zip(steps, means, strict=True)]
                    for edge in (min, max)
                ]
                style: dict[str, Any] = dict(color=f"C{i % 10}", marker="osv^D<>pX*"[i % 10], capsize=3)
                axis.errorbar(steps, means, yerr=spread, label=solver, **style)
            axis.set_xscale("log")
            axis.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if not column:
                axis.set_ylabel(label)
    for axis in axes[0]:
        axis.set_ylim(top=min(axis.get_ylim()[1], 100))
    axes[-1][0].set_xlabel("evaluations of the network")
    axes[-1][1].set_xlabel("evaluations of the network")
    axes[0][0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def draw_digits(out: Path, settings: Sequence[Setting]) -> None:
    """Draw digits of the same seeds by every setting, one row for each, and write a PNG file."""
    pipe = admfast.load("digits32", precision="fp32")
    plt = _pyplot()
    figure, axes = plt.subplots(len(settings), 1, figsize=(WIDTH, 0.62 * len(settings)))
    for axis, setting in zip(axes, settings, strict=True):
        images = pipe.sample(
            [seed % 10 for seed in range(IMAGES)],
            range(IMAGES),
            solver=setting.solver,
            steps=setting.steps,
            spacing=setting.spacing,
            guidance=setting.guidance,  # type: ignore[arg-type]
        )
        axis.imshow(np.concatenate(list(images[..., 0].numpy()), axis=1), cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.text(-8, 16, setting.name, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(left=0.26, right=0.995, top=0.995, bottom=0.005, hspace=0.08)
    figure.savefig(out, dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.curves", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    chart = commands.add_parser("chart", help="measures over the number of steps")
    chart.add_argument("rows", type=Path, nargs="+", help="files that bench.quality wrote")
    digits = commands.add_parser("digits", help="the same digits by every solver of --set solvers")
    for command in (chart, digits):
        command.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args(argv)
    if arguments.command == "chart":
        draw_chart(arguments.rows, arguments.out)
    else:
        draw_digits(arguments.out, SETS["solvers"])


if __name__ == "__main__":
    main()
