"""Draw the picture of a run: its losses over the steps, and samples of its average at several steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from admfast.diffusion.parameterisation import MeanType
from admfast.errors import CheckpointError
from admfast.files.images import UInt8, open_image
from admfast.training.folder import GRIDS, find_run_folder, read_log, read_run_file, recipe_from_description
from admfast.training.progress import EVALUATION, QUARTERS
from admfast.training.recipe import Recipe

WIDTH, HEIGHT, FONT, GRIDS_SHOWN = 1000, 680, 22, 3
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 96, 80  # margins of the chart
HEADINGS = (26, 64)  # y (middle of the text) of the two lines above chart and grids
TEXT_COLOUR, LINE_COLOUR, BACKGROUND = "#222222", "#dddddd", "#ffffff"
TENTHS = [number / 10 for number in range(10, 100)]
QUARTER_COLOURS = (
    "#4aa8dc",
    "#2b6cb0",
    "#7a4a9e",
    "#c0395b",
)  # of quarters, low to high noise
Line = list[tuple[float, float]]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_run(run: str | PathLike[str]) -> UInt8:
    """Return the picture of a run: charts over the steps on a log axis, and to the right grids of samples.

    The loss has a line for each quarter of the timesteps; that of a classifier of clean images has one line.
    A run with evaluations has a second chart, of the Frechet distance. The grids are the first, one from the
    middle and the last.
    Returns: uint8 [H, W, 3].
    Raises: InvalidArgument if `run` isn't the folder of a run; CheckpointError if the run has no log, or no
    loss above 0 in it.
    """
    folder = find_run_folder(run)
    rows, lines = read_log(folder), dict[str, Line]()
    names = [f"loss_q{number + 1}" for number in range(QUARTERS)]
    for name in names if any(name in row for row in rows for name in names) else ["loss"]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        lines[name] = [(step, loss) for step, loss in points if 0 < loss < math.inf]
    if not any(lines.values()):
        raise CheckpointError(f"{folder}: its log holds no loss yet")
    recipe = recipe_from_description(read_run_file(folder))
    panels = [_draw_chart(lines, f"loss, log scale: {_describe_loss(recipe)}", recipe)]
    for name, line in _frechet_lines(rows).items():
        panels.append(_draw_chart({name: line}, f"{name} of the average, log scale", recipe))
    panels += _draw_grids(folder / GRIDS)
    picture = Image.new("RGB", (sum(panel.width for panel in panels), HEIGHT), BACKGROUND)
    left = 0
    for panel in panels:
        picture.paste(panel, (left, 0))
        left += panel.width
    return np.asarray(picture)


def _frechet_lines(rows: Sequence[Mapping[str, float | int]]) -> dict[str, Line]:
    """Return the Frechet distance of the evaluations by its name; empty without evaluations."""
    prefix = f"{EVALUATION}F"
    names = sorted({name for row in rows for name in row if name.startswith(prefix)})
    lines = {
        name.removeprefix(EVALUATION): [(row["step"], row[name]) for row in rows if row.get(name, 0) > 0]
        for name in names
    }
    return {name: line for name, line in lines.items() if line}


def _draw_chart(lines: dict[str, Line], title: str, recipe: Recipe) -> Image.Image:
    """Draw the lines and the axes, with their labels."""
    chart = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(FONT)
    points = [point for line in lines.values() for point in line]
    last = max(step for step, _ in points)
    low, high = (math.log10(pick(loss for _, loss in points)) for pick in (min, max))
    low, high = low - 0.05, high + 0.05  # keeps the lines off the edges

    def to_pixels(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(loss) - low) / (high - low)

    for loss in _log_ticks(low, high):
        _, y = to_pixels(0, loss)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], LINE_COLOUR)
        pen.text((LEFT - 12, y), f"{loss:g}", TEXT_COLOUR, font, "rm")
    for step in _ticks(last):
        x, _ = to_pixels(step, 1)
        pen.line([(x, TOP), (x, HEIGHT - BOTTOM)], LINE_COLOUR)
        pen.text(
            (x, HEIGHT - BOTTOM + 10), f"{step:,}", TEXT_COLOUR, font, "mt" if step < 0.97 * last else "rt"
        )
    axis_title = f"training steps, of {recipe.batch_size:,} images each"
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12), axis_title, TEXT_COLOUR, font, "mb")
    pen.text((LEFT, HEADINGS[0]), title, TEXT_COLOUR, font, "lm")
    for line, colour in zip(lines.values(), QUARTER_COLOURS, strict=False):
        pen.line([to_pixels(*point) for point in line], colour, 4, "curve")
        for x_last, y_last in (to_pixels(*point) for point in line[-1:]):
            pen.ellipse([x_last - 6, y_last - 6, x_last + 6, y_last + 6], colour)
    if len(lines) > 1:
        _draw_legend(pen, font, recipe.process.steps)
    return chart


def _describe_loss(recipe: Recipe) -> str:
    """Return a description of the loss of a run, with its unit if it has one."""
    if recipe.kind == "classifier":
        return "cross-entropy of the class, in nats"
    mean, variance, loss = recipe.process.types
    if loss.is_vb():
        return "variational bound, in bits per dimension"
    target_of = {
        MeanType.EPSILON: "noise (1 = its variance)",
        MeanType.START_X: "image in [-1, 1]",
        MeanType.PREVIOUS_X: "previous image",
    }
    return f"mean squared error of the {target_of[mean]}{', plus variance term' if variance.learned else ''}"


def _draw_legend(pen: ImageDraw.ImageDraw, font: Font, steps: int) -> None:
    """Write the timesteps of each line next to its colour."""
    x, y = float(LEFT), HEADINGS[1]
    bounds = [-(-number * steps // QUARTERS) for number in range(QUARTERS + 1)]
    for number, colour in enumerate(QUARTER_COLOURS):
        pen.rectangle([x, y - 8, x + 16, y + 8], colour)
        text = f"{bounds[number]}-{bounds[number + 1] - 1}"
        text = f"timesteps {text} (least noise)" if number == 0 else text
        text = f"{text} (most noise)" if number == QUARTERS - 1 else text
        pen.text((x + 24, y), text, TEXT_COLOUR, font, "lm")
        x += 24 + font.getlength(text) + 28


def _log_ticks(low: float, high: float) -> list[float]:
    """Return ticks in 10**low..10**high: the roundest set that has at least three, or else all tenths."""
    powers, ticks = range(math.floor(low), math.ceil(high)), list[float]()
    for factors in ((1,), (1, 2, 5), range(1, 10), TENTHS[::5], TENTHS):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _ticks(last: float) -> range:
    """Return about five round numbers of steps, from 0 to `last`."""
    unit = 10 ** max(0, math.floor(math.log10(max(last, 1) / 2.5)))
    interval = next(unit * factor for factor in (1, 2, 5, 10) if last / (unit * factor) <= 6)
    return range(0, math.floor(last) + 1, interval)


def _draw_grids(folder: Path) -> list[Image.Image]:
    """Return some grids of samples, resized to the chart's height, each under a heading with its step."""
    paths = sorted(folder.glob("*.png"))
    count = min(GRIDS_SHOWN, len(paths))
    chosen_paths = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    panels, grid_height = [], HEIGHT - TOP - 16
    for path in chosen_paths:
        grid = open_image(path).convert("RGB")
        grid = grid.resize(
            (round(grid.width * grid_height / grid.height), grid_height), Image.Resampling.LANCZOS
        )
        font, headings = ImageFont.load_default(FONT), ("samples at", f"step {int(path.stem):,}")
        width = max(grid.width, *(math.ceil(font.getlength(text)) for text in headings))
        panel = Image.new("RGB", (width + 16, HEIGHT), BACKGROUND)
        panel.paste(grid, (0, TOP))
        for y, text in zip(HEADINGS, headings, strict=True):
            ImageDraw.Draw(panel).text((0, y), text, TEXT_COLOUR, font, "lm")
        panels.append(panel)
    return panels
