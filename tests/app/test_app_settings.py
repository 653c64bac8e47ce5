"""Tests of the page's settings: bounds, and lines of code that make the pixels that the page shows."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.app import settings as bounds
from admfast.app.models import load_models
from admfast.app.restore import restore, visible_pixels
from admfast.app.settings import Enlargement, Restoration, Sampling
from admfast.cli.main import main
from admfast.errors import InvalidArgument
from admfast.files.images import write_png
from admfast.files.npz import read_samples
from tests import small

DIGIT = np.zeros((32, 32, 1), np.uint8)
DIGIT[4:28, 14:18] = 255
SMALL = DIGIT[::4, ::4]


def run_python(settings) -> np.ndarray:
    """Run the Python lines in this folder; return the images."""
    names: dict = {}
    exec(settings.python_lines(), names)
    return names["images"].numpy()


def run_command(settings) -> np.ndarray:
    """Run the command in this folder; return the images that it wrote."""
    program, *words = shlex.split(" ".join(settings.command_line()))
    assert program == "admfast" and main(words) == 0
    [path] = Path("out").glob("*.npz")
    return read_samples(path).images


@pytest.mark.parametrize(
    "make",
    [
        lambda models: Sampling(models["digits32"], classes="3", seeds="5-7", steps=6, guidance=3.5),
        lambda models: Sampling(models["digits32"], seeds="2,9", steps=5, solver="ddim:eta=0.5", guidance=0),
        lambda models: Sampling(models["digits32-up"], classes="1, 4", seeds="0-1", steps=4, solver="unipc"),
        lambda models: Enlargement(models["digits32_upsampler"], image=SMALL, classes="1", steps=6),
        lambda models: Restoration(
            models["digits32"], image=DIGIT, box=(10, 8, 20, 24), classes="1", seeds="0-1", steps=5
        ),
    ],
    ids=["auto", "every class", "cascade", "enlarge", "restore"],
)
def test_the_lines_make_the_pixels_that_the_page_shows(make, models, tmp_path, monkeypatch):
    settings = make(models)
    settings.check()
    steps = []
    shown = settings.run(lambda progress: steps.append((progress.stage, progress.total))).numpy()
    monkeypatch.chdir(tmp_path)
    for name, image in settings.files.items():
        write_png(name, image)
    assert steps[0] == ("base", settings.steps) and steps.count(steps[0]) == settings.steps
    assert len(shown) == len(settings.seed_list) == len(settings.captions)
    np.testing.assert_array_equal(run_python(settings), shown)
    if settings.command_line():
        np.testing.assert_array_equal(run_command(settings), shown)
    else:
        assert isinstance(settings, Restoration)


def test_lines_name_weights_and_device(models):
    model = type(models["digits32"])(models["digits32"].pipe, "imagenet64", "my models", "cuda:1")
    settings = Sampling(model, seeds="3-5", classes="7")
    assert " ".join(settings.command_line()).startswith(
        "admfast sample imagenet64 --weights 'my models' --device cuda:1 --classes 7 --seeds 3-5"
    )
    assert settings.command_line()[-1] == "--out out/"
    named = dataclasses.replace(settings, folder="out-b/")
    assert named.command_line()[-1] == "--out out-b/" and named.arguments() == settings.arguments()
    lines = settings.python_lines()
    assert 'admfast.load("imagenet64", weights="my models", device="cuda:1")' in lines
    assert "classes=[7], seeds=range(3, 6)" in lines


SCRIPT = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    "name, value",
    [
        ("seeds", f"0-{bounds.MOST_IMAGES}"),
        ("seeds", "0-1000000"),
        ("seeds", "9" * 30),
        ("seeds", SCRIPT),
        ("seeds", ""),
        ("seeds", None),
        ("seeds", "1," * 1000),
        ("seeds", str(2**64)),
        ("classes", SCRIPT),
        ("classes", "10"),
        ("classes", ["1"]),
        ("steps", 10**9),
        ("steps", bounds.MOST_STEPS + 1),
        ("steps", 0),
        ("steps", -1),
        ("steps", 2.5),
        ("steps", float("nan")),
        ("steps", None),
        ("steps", "25"),
        ("solver", SCRIPT),
        ("solver", "ddim:eta=__import__('os')"),
        ("solver", "../../etc/passwd"),
        ("solver", "ddim-inverse"),
        ("solver", "x" * 10000),
        ("solver", None),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", -1.0),
        ("guidance", bounds.LARGEST_GUIDANCE + 1),
        ("guidance", "2"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(models, name, value):
    with pytest.raises(InvalidArgument, match=f"^({name}|eta)=") as raised:
        Sampling(models["digits32"], **{name: value}).check()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 800


def test_many_pixels_are_refused_before_they_are_made(models, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_PIXELS", 3 * 32 * 32)
    Sampling(models["digits32"], seeds="0-2")
    with pytest.raises(InvalidArgument, match="^seeds="):
        Sampling(models["digits32"], seeds="0-3")


def test_what_the_page_knows_of_a_model(models):
    assert [model.enlarges for model in models.values()] == [False, False, True]
    assert [model.restores for model in models.values()] == [True, False, False]
    assert Sampling(models["digits32"], seeds="7,12").captions == ["seed 7 · class 7", "seed 12 · class 2"]
    assert "auto (dpmpp" in Sampling(models["digits32"], steps=10).title


def test_a_model_of_a_file_is_offered_too(tmp_path):
    path = str(small.write(tmp_path / "own.safetensors", small.with_weights(small.SMALL_UNET)))
    models = load_models([path], device="cpu")
    assert [*models] == [path, "digits32", "digits32-up", "digits32_upsampler"]
    Sampling(models[path], classes="3", steps=2).check()
    with pytest.raises(InvalidArgument, match="^model='nothing'"):
        load_models(["nothing"], device="cpu")
    line = small.with_weights(dataclasses.replace(small.SMALL_UNET, dims=1))
    with pytest.raises(InvalidArgument, match="^model=.*1-D"):
        load_models([str(small.write(tmp_path / "line.safetensors", line))], device="cpu")


# Restoring


def test_the_box_is_filled_in_and_the_rest_stays(models):
    pipe = models["digits32"].pipe
    image = pipe.sample(classes=[3], seeds=[100], steps=25)[0].numpy()
    hidden = image.copy()
    hidden[10:22, 10:22] = 128
    filled = restore(pipe, hidden, (10, 10, 22, 22), seeds=[5], classes=[3], steps=25)[0].numpy()
    mask = visible_pixels((32, 32), (10, 10, 22, 22)).numpy()
    np.testing.assert_array_equal(filled[mask], image[mask])
    # The hidden pixels themselves are not read, and what replaces them is closer to the original than grey.
    again = restore(pipe, image, (10, 10, 22, 22), seeds=[5], classes=[3], steps=25)[0].numpy()
    np.testing.assert_array_equal(again, filled)
    error = np.abs(filled[~mask].astype(float) - image[~mask]).mean()
    unguided = pipe.sample([3], [5], steps=25, solver="ddim:eta=1.0", guidance=0)[0].numpy()
    assert error < 0.7 * np.abs(unguided[~mask].astype(float) - image[~mask]).mean()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 0, 0), (5, 5, 5, 9), (0, 0, 33, 3), (9, 9, 3, 3), (0, 0, 32, 32), (1, 2, 3), (-1, 0, 4, 4),
     (0.5, 0, 4, 4)],
)  # fmt: skip
def test_a_wrong_box_is_refused(models, box):
    with pytest.raises(InvalidArgument, match="^box="):
        Restoration(models["digits32"], image=DIGIT, box=box).check()
    with pytest.raises(InvalidArgument, match="^strength="):
        Restoration(models["digits32"], image=DIGIT, box=(1, 1, 2, 2), strength=torch.nan)
