"""Tests of the picture of a run: positions of lines, texts, grids, and runs without a loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from admfast.cli.main import main
from admfast.errors import CheckpointError
from admfast.files.images import read_image, write_png
from admfast.training import picture
from admfast.training.folder import write_run_file
from admfast.training.picture import draw_run
from admfast.training.recipe import Recipe
from tests.small import PROCESS
from tests.training.small_runs import small_recipe


def written(run: Path, rows: list[dict], recipe: Recipe | None = None) -> Path:
    """Write the log of a run, and return its folder."""
    run.mkdir(exist_ok=True)
    write_run_file(run, recipe or small_recipe(), {})
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def coloured(image: np.ndarray, colour: str) -> np.ndarray:
    """Return the rows and columns of the chart's pixels that have a colour, below the legend."""
    found = np.argwhere((image == ImageColor.getrgb(colour)).all(axis=2))
    return found[found[:, 0] >= picture.TOP]


def test_losses_lie_on_a_log_axis(tmp_path):
    """On the log axis quarter 1 falls from 1 to 0.01 in a straight line; quarter 3 stays in the middle."""
    steps = range(0, 101, 10)
    rows = [{"step": s, "loss": 9.0, "loss_q1": 10 ** (-s / 50), "loss_q3": 0.1} for s in steps]
    image = draw_run(written(tmp_path, rows))
    assert image.shape == (picture.HEIGHT, picture.WIDTH, 3) and image.dtype == np.uint8
    falling, flat = (coloured(image, picture.QUARTER_COLOURS[quarter]) for quarter in (0, 2))
    left, right = picture.LEFT, picture.WIDTH - picture.RIGHT
    middle = (picture.TOP + picture.HEIGHT - picture.BOTTOM) / 2
    line = flat[flat[:, 1] < right - 20]  # without the dot at its end
    assert np.abs(line[:, 0] - middle).max() <= 3 and line[:, 1].min() <= left + 10
    for share in (0.25, 0.75):  # 2 of 2.1 decades: a margin of 0.05 above and below
        x = round(left + share * (right - left))
        y = falling[falling[:, 1] == x][:, 0].mean()
        height = (picture.HEIGHT - picture.BOTTOM - picture.TOP) * 2 / 2.1
        assert y == pytest.approx(middle + (share - 0.5) * height, abs=3)
    assert not len(coloured(image, picture.QUARTER_COLOURS[1]))


def test_without_quarters_the_loss_is_drawn(tmp_path):
    image = draw_run(written(tmp_path, [{"step": 5, "loss": 0.3}]))
    assert len(coloured(image, picture.QUARTER_COLOURS[0])) > 50 and not len(
        coloured(image, picture.QUARTER_COLOURS[1])
    )


Drawn = list[tuple[Image.Image, str, tuple[float, ...]]]


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    """Record the image, the text and its box of every text that is drawn."""
    found, draw = Drawn(), ImageDraw.ImageDraw.text

    def noted(pen, xy, text, fill, font, anchor):
        found.append((pen._image, text, pen.textbbox(xy, text, font, anchor)))
        draw(pen, xy, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return found


def lies_apart(drawn: Drawn) -> None:
    """Assert that every text is inside its image, and that no two texts overlap."""
    for number, (image, text, (left, top, right, bottom)) in enumerate(drawn):
        assert left >= 0 and top >= 0 and right <= image.width and bottom <= image.height, text
        for _, other, box in (one for one in drawn[:number] if one[0] is image):
            apart = right < box[0] or box[2] < left or bottom < box[1] or box[3] < top
            assert apart, f"{text!r} is drawn over {other!r}"


QUARTERLY = [
    {"step": s, "loss": 1.0, **{f"loss_q{q}": 4.0**-q for q in range(1, 5)}} for s in (1000, 123_456_789)
]
FIXED = {"network": replace(small_recipe().network, out_channels=1)}
LOSSES = {
    "noise": ("noise", small_recipe(**FIXED, process=replace(PROCESS, learn_sigma=False))),
    "noise and variance": ("plus variance term", small_recipe()),
    "image": (
        "image in [-1, 1]",
        small_recipe(**FIXED, process=replace(PROCESS, learn_sigma=False, predict_xstart=True)),
    ),
    "bound": ("bits per dimension", small_recipe(process=replace(PROCESS, use_kl=True))),
    "upsampler": ("plus variance term", small_recipe("upsampler")),
    "classifier": ("nats", small_recipe("classifier")),
}


@pytest.mark.parametrize("steps", [1000, 31])
@pytest.mark.parametrize("loss, recipe", LOSSES.values(), ids=LOSSES)
def test_axes_and_lines_say_what_they_are(tmp_path, drawn, loss, recipe, steps):
    recipe = replace(recipe, batch_size=4096, process=replace(recipe.process, steps=steps))
    (tmp_path / "grids").mkdir()
    write_png(tmp_path / "grids/123456789.png", np.zeros((40, 8, 1), np.uint8))
    draw_run(written(tmp_path, QUARTERLY, recipe))
    *texts, of_grid, step = (text for _, text, _ in drawn)
    chart = " ".join(texts)
    assert all(word in chart for word in (loss, "log scale", "training steps", "4,096 images", "most noise"))
    quarters = [[t for t in range(steps) if t * 4 // steps == number] for number in range(4)]
    assert all(f"{quarter[0]}-{quarter[-1]}" in chart for quarter in quarters)
    assert (of_grid, step) == ("samples at", "step 123,456,789")
    lies_apart(drawn)


@pytest.mark.parametrize(
    "losses", [(1, 1), (0.6, 0.9), (3e-4, 3.2e-4), (0.9, 1.2), (1, 9), (1e-5, 3)], ids=str
)
def test_numbers_beside_the_loss_for_every_range(tmp_path, drawn, losses):
    draw_run(written(tmp_path, [{"step": 10 + i, "loss": loss} for i, loss in enumerate(losses)]))
    beside = [
        text for _, text, (_, _, right, bottom) in drawn if right < picture.LEFT and bottom > picture.TOP
    ]
    assert len(beside) >= 3
    lies_apart(drawn)


@pytest.mark.parametrize("count, shown", [(0, []), (1, [0]), (2, [0, 1]), (5, [0, 2, 4]), (8, [0, 4, 7])])
def test_grids_from_the_first_to_the_last(tmp_path, count, shown):
    written(tmp_path, [{"step": 100, "loss_q1": 0.5}, {"step": 200, "loss_q1": 0.2}])
    (tmp_path / "grids").mkdir()
    for number in range(count):
        levels = np.full((40, 30, 1), 60 + 20 * number, np.uint8)
        write_png(tmp_path / "grids" / f"{100 * number:08d}.png", levels)
    row = draw_run(tmp_path)[picture.HEIGHT // 2, picture.WIDTH :, 0]
    levels = [level for level, before in zip(row, [255, *row], strict=False) if level not in (before, 255)]
    assert levels == [60 + 20 * number for number in shown]


def test_a_row_that_was_not_finished_and_losses_that_are_none_are_left_out(tmp_path):
    rows = [{"step": 10, "loss_q1": 0.1}, {"step": 20, "loss_q1": 0.0}, {"step": 30, "loss_q1": 0.1}]
    whole = draw_run(written(tmp_path / "whole", [rows[0], rows[2]]))
    run = written(tmp_path / "run", [*rows[:2], {"step": 25, "loss_q1": float("nan")}, rows[2]])
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 40, "loss_q')
    assert np.array_equal(draw_run(run), whole)


@pytest.mark.parametrize("rows", [None, [], [{"step": 1}], [{"step": 1, "loss": float("nan")}]], ids=str)
def test_what_has_no_loss_is_said(tmp_path, rows):
    written(tmp_path, rows or [])
    if rows is None:
        (tmp_path / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        draw_run(tmp_path)


def test_the_command_writes_it_without_weights(tmp_path, capsys):
    run = written(tmp_path / "run", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    file = tmp_path / "run.png"
    assert main(["train", "export", str(run), "--picture", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(file.resolve())]
    assert np.array_equal(read_image(file, 3), draw_run(run))
    assert main(["train", "export", str(run)]) == 2
    assert capsys.readouterr().err.startswith("admfast: --out=")
