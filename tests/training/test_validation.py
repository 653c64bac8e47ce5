"""Tests of validation: the images held out of training, and their rows in the log."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.cli.main import main
from admfast.diffusion import training_losses
from admfast.errors import InvalidArgument
from admfast.models import build
from admfast.training.draws import TrainStream, draw_normals, draw_uniforms
from admfast.training.loop import LoopOptions, train
from admfast.training.recipe import KINDS
from admfast.training.samples import epoch_order
from admfast.training.validation import split_source
from tests.training.small_runs import OFTEN, last_state, same, small_recipe, source

KEPT = 3


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def validations(run: Path) -> dict[int, dict[str, float]]:
    """Return the rows of validation in the log, by step."""
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith("validation")} for row in rows(run)}
    return {step: values for step, values in found.items() if values}


@pytest.mark.parametrize("count", [1, 3, 9])
def test_every_image_is_in_one_part_and_the_seed_decides(count):
    whole = source()
    training, held_out = split_source(whole, 5, count)
    assert (len(training), len(held_out)) == (10 - count, count)
    names = [[part.name(i) for i in range(len(part))] for part in (training, held_out)]
    assert sorted(names[0] + names[1]) == sorted(whole.name(i) for i in range(10))
    assert names[0] == sorted(names[0]), "the source's order should be kept"
    assert training.class_names == held_out.class_names == whole.class_names
    for part in (training, held_out):
        for i in range(len(part)):
            original = [whole.name(j) for j in range(10)].index(part.name(i))
            assert part.labels[i] == whole.labels[original]
            assert np.array_equal(part.decode(i), whole.decode(original))
    again, other = split_source(whole, 5, count)[1], split_source(whole, 6, count)[1]
    assert again.identity() == held_out.identity() != training.identity() != whole.identity()
    assert other.identity() != held_out.identity()


def test_without_validation_the_source_is_trained_on_whole():
    whole = source()
    assert split_source(whole, 5, 0)[0] is whole


def test_training_is_that_on_the_other_images(tmp_path):
    recipe = small_recipe(validation=KEPT)
    train(recipe, source(), tmp_path / "a", OFTEN)
    train(
        dataclasses.replace(recipe, validation=0), split_source(source(), 0, KEPT)[0], tmp_path / "b", OFTEN
    )
    same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))
    assert not validations(tmp_path / "b")


def test_the_loss_is_that_of_the_average_without_dropout(tmp_path):
    recipe = small_recipe(validation=KEPT, random_flip=False, steps=4, seed=7)
    train(recipe, source(), tmp_path, OFTEN)
    net = build(recipe.network)
    net.load_state_dict(last_state(tmp_path)["averages"]["0.9"])
    held_out, process = split_source(source(), 7, KEPT)[1], recipe.process.build()
    order = epoch_order(KEPT, 7, 0).tolist()
    losses = []
    for number, index in enumerate(order):
        k = 2**32 - KEPT + number
        x = torch.from_numpy(held_out.decode(index).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        t = (draw_uniforms(7, [k], TrainStream.TIMESTEP) * process.num_timesteps).long()
        noise = draw_normals(7, [k], tuple(x.shape[1:]), TrainStream.NOISE)
        condition = {"y": torch.tensor([held_out.labels[index]])}
        with torch.no_grad():
            losses.append(float(training_losses(process, net, x, t, noise, condition)["loss"]))
    assert validations(tmp_path)[4]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert validations(tmp_path)[2]["validation_loss"] != validations(tmp_path)[4]["validation_loss"]


def test_rows_at_snapshots_are_those_of_a_run_that_was_not_stopped(tmp_path):
    recipe = small_recipe(validation=KEPT)
    train(recipe, source(), tmp_path / "whole", OFTEN)
    assert list(validations(tmp_path / "whole")) == [2, 4, 6]
    train(dataclasses.replace(recipe, steps=2), source(), tmp_path / "run", OFTEN)
    train(dataclasses.replace(recipe, microbatch=1), source(), tmp_path / "run", LoopOptions(save_every=3))
    found = validations(tmp_path / "run")
    assert list(found) == [2, 3, 6] and found[2] == validations(tmp_path / "whole")[2]
    assert found[6] == pytest.approx(validations(tmp_path / "whole")[6], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_parts(tmp_path, kind):
    side = 16 if kind == "upsampler" else 8
    recipe = small_recipe(kind, validation=KEPT, steps=2)
    train(recipe, source(side=side), tmp_path, dataclasses.replace(OFTEN, cache="memory", workers=1))
    parts = {"loss", "acc@1", "acc@5"} if kind == "classifier" else {"loss", "mse", "vb"}
    [values] = validations(tmp_path).values()
    assert set(values) == {f"validation_{part}" for part in parts}


def test_what_is_refused(tmp_path):
    for count in (10, 11):
        with pytest.raises(InvalidArgument, match="^validation="):
            train(small_recipe(validation=count), source(), tmp_path, OFTEN)
    with pytest.raises(InvalidArgument, match="^validation="):
        small_recipe(validation=-1)
    train(small_recipe(validation=1), source(), tmp_path, OFTEN)
    with pytest.raises(InvalidArgument, match="^validation="):
        train(small_recipe(validation=2), source(), tmp_path, OFTEN)


def test_the_command_takes_it(tmp_path):
    options = ["--steps", "2", "--batch-size", "2", "--grid-every", "0", "--set", "channel_mult=1"]
    assert main(["train", "diffusion", "--out", str(tmp_path), *options, "--set", "validation=5"]) == 0
    assert validations(tmp_path)[2]["validation_loss"] > 0
