"""The picture of a run: its losses over the steps, and samples of its average as they grew."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from admfast.errors import CheckpointError
from admfast.files.images import UInt8, open_image
from admfast.training.folder import GRIDS, read_log, run_folder
from admfast.training.progress import QUARTERS

WIDTH, HEIGHT, FONT, GRIDS_SHOWN = 1000, 640, 24, 3
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 56, 80  # margins of the chart
INK, LINES, PAPER = "#222222", "#dddddd", "#ffffff"
COLOURS = ("#4aa8dc", "#2b6cb0", "#7a4a9e", "#c0395b")  # of the quarters, from little noise to much
Line = list[tuple[float, float]]


def run_picture(run: str | PathLike[str]) -> UInt8:
    """Return the picture of a run: loss by quarter of the timesteps on a log axis, beside it the grids.

    Of the grids the first, the last and one between them. A run without quarters (a classifier without noise)
    shows its loss.
    Returns: uint8 [H, W, 3].
    Raises: InvalidArgument for what is no run's folder; CheckpointError for one without a log, or without a
    loss above 0 in it.
    """
    folder = run_folder(run)
    rows, lines = read_log(folder), dict[str, Line]()
    names = [f"loss_q{number + 1}" for number in range(QUARTERS)]
    for name in names if any(name in row for row in rows for name in names) else ["loss"]:
        found = [(row["step"], row[name]) for row in rows if name in row]
        lines[name] = [(step, loss) for step, loss in found if 0 < loss < math.inf]
    if not any(lines.values()):
        raise CheckpointError(f"{folder}: its log holds no loss yet")
    parts = [_chart(lines), *_grids(folder / GRIDS)]
    picture = Image.new("RGB", (sum(part.width for part in parts), HEIGHT), PAPER)
    left = 0
    for part in parts:
        picture.paste(part, (left, 0))
        left += part.width
    return np.asarray(picture)


def _chart(lines: dict[str, Line]) -> Image.Image:
    """Draw the lines with their axes and what each of them is."""
    chart = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(FONT)
    points = [point for line in lines.values() for point in line]
    last = max(step for step, _ in points)
    low, high = (math.log10(pick(loss for _, loss in points)) for pick in (min, max))
    low, high = low - 0.05, high + 0.05  # the lines stay off the frame

    def at(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(loss) - low) / (high - low)

    for loss in _log_ticks(low, high):
        _, y = at(0, loss)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], LINES)
        pen.text((LEFT - 12, y), f"{loss:g}", INK, font, "rm")
    for step in _ticks(last):
        x, _ = at(step, 1)
        pen.line([(x, TOP), (x, HEIGHT - BOTTOM)], LINES)
        pen.text((x, HEIGHT - BOTTOM + 10), f"{step:,}", INK, font, "mt" if step < 0.97 * last else "rt")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12), "steps", INK, font, "mb")
    title = "loss by quarter of t, least noise first" if len(lines) > 1 else "loss"
    pen.text((LEFT, TOP / 2), title, INK, font, "lm")
    x = LEFT + font.getlength(title) + 30
    for (name, line), colour in zip(lines.items(), COLOURS, strict=False):
        pen.line([at(*point) for point in line], colour, 4, "curve")
        for x_last, y_last in (at(*point) for point in line[-1:]):
            pen.ellipse([x_last - 6, y_last - 6, x_last + 6, y_last + 6], colour)
        if len(lines) > 1:
            pen.rectangle([x, TOP / 2 - 8, x + 16, TOP / 2 + 8], colour)
            pen.text((x + 24, TOP / 2), name[-1], INK, font, "lm")
        x += 70
    return chart


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between two exponents; of many the powers only."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [f * 10.0**power for power in range(math.floor(low), math.ceil(high)) for f in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _ticks(last: float) -> range:
    """Return about five round steps from 0 on."""
    unit = 10 ** max(0, math.floor(math.log10(max(last, 1) / 2.5)))
    every = next(unit * factor for factor in (1, 2, 5, 10) if last / (unit * factor) <= 6)
    return range(0, math.floor(last) + 1, every)


def _grids(folder: Path) -> list[Image.Image]:
    """Return some grids of the run, each under its step, brought to the chart's height."""
    paths = sorted(folder.glob("*.png"))
    count = min(GRIDS_SHOWN, len(paths))
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    found, space = [], HEIGHT - TOP - 16
    for path in chosen:
        grid = open_image(path).convert("RGB")
        grid = grid.resize((round(grid.width * space / grid.height), space), Image.Resampling.LANCZOS)
        part = Image.new("RGB", (grid.width + 16, HEIGHT), PAPER)
        part.paste(grid, (0, TOP))
        pen, font = ImageDraw.Draw(part), ImageFont.load_default(FONT)
        pen.text((0, TOP / 2), f"step {int(path.stem):,}", INK, font, "lm")
        found.append(part)
    return found
