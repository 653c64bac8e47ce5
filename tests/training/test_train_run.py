"""Tests of training runs: resuming, snapshots, signals, files, and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import admfast
from admfast.checkpoints import load_network
from admfast.checkpoints.snapshots import list_snapshots, read_run_average
from admfast.errors import CheckpointError, InvalidArgument, NonFiniteError, OutputError
from admfast.files.sources import ArraySource
from admfast.training import loop
from admfast.training.export import export_run
from admfast.training.loop import LoopOptions, TrainResult, dry_run, train
from tests.training.small_runs import OFTEN, last_state, same, small_recipe, source


class Killed(BaseException):
    """An exception that no code handles."""


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make training raise Killed after the update of a step, before its results are written."""
    update = loop.Learner.update

    def and_die(self, batch):
        report = update(self, batch)
        if self.step == step:
            raise Killed
        return report

    monkeypatch.setattr(loop.Learner, "update", and_die)


def rows(run: Path) -> list[dict]:
    """Return the rows of the log without fields that depend on time and memory."""
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("images_per_second", "memory", "seconds_left")}
        for row in found
    ]


# Resuming


@pytest.mark.parametrize("kind", ["diffusion", "classifier", "upsampler"])
def test_a_run_that_was_killed_twice_is_one_that_was_not(tmp_path, monkeypatch, kind):
    side = 16 if kind == "upsampler" else 8
    recipe, data = small_recipe(kind, steps=7, ema_power=(0.05,)), source(side=side)
    assert train(recipe, data, tmp_path / "whole", OFTEN) == TrainResult(7)
    for step in (4, 6):  # in two epochs, with a log one row ahead of the snapshot
        with monkeypatch.context() as patched, pytest.raises(Killed):
            killed_after(patched, step)
            train(recipe, data, tmp_path / "killed", OFTEN)
        torch.manual_seed(step)
    train(recipe, data, tmp_path / "killed", OFTEN)
    same(last_state(tmp_path / "killed"), last_state(tmp_path / "whole"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.parametrize("more", [{"workers": 2}, {"cache": "memory"}, {"log_every": 3}])
def test_habits_change_no_bit(tmp_path, more):
    recipe = small_recipe()
    train(recipe, source(), tmp_path / "a", OFTEN)
    train(recipe, source(), tmp_path / "b", dataclasses.replace(OFTEN, **more))
    same(last_state(tmp_path / "b"), last_state(tmp_path / "a"))


def test_snapshots_written_beside_training_hold_the_state_of_their_step(tmp_path, monkeypatch):
    """Each snapshot is written only after the next step is made."""
    recipe, loop_options = small_recipe(steps=4, ema_power=(0.05,)), LoopOptions(save_every=1, keep=9)
    train(recipe, source(), tmp_path / "a", loop_options)
    made, update, save = [threading.Event() for _ in range(4)], loop.Learner.update, torch.save

    def and_tell(self, batch):
        report = update(self, batch)
        made[self.step - 1].set()
        return report

    def wait_and_save(state, file):
        if state.get("step", 4) < 4:
            assert made[state["step"]].wait(30)
        save(state, file)

    monkeypatch.setattr(loop.Learner, "update", and_tell)
    monkeypatch.setattr(torch, "save", wait_and_save)
    train(recipe, source(), tmp_path / "b", dataclasses.replace(loop_options, async_save=True))
    for place in ("snapshots", "averages"):
        pairs = [list_snapshots(tmp_path / run, place) for run in ("a", "b")]
        assert [[s.step for s in found] for found in pairs] == [[4, 3, 2, 1]] * 2
        for a, b in zip(*pairs, strict=True):
            same(b.read(), a.read())


def test_a_run_that_is_done_stays_done_and_more_steps_go_on(tmp_path):
    recipe, messages = small_recipe(steps=2), list[str]()
    train(recipe, source(), tmp_path, OFTEN)
    before = last_state(tmp_path)
    assert train(recipe, source(), tmp_path, OFTEN, say=messages.append) == TrainResult(2)
    same(last_state(tmp_path), before)
    longer = dataclasses.replace(recipe, steps=4, microbatch=2)
    assert train(longer, source(), tmp_path, OFTEN, say=messages.append) == TrainResult(4)
    assert any("steps" in text for text in messages) and any("microbatch" in text for text in messages)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 1.0}, {"batch_size": 2}, {"precision": "bf16"}])
def test_another_recipe_needs_another_folder(tmp_path, change):
    messages: list[str] = []
    train(small_recipe(steps=1), source(), tmp_path, OFTEN)
    with pytest.raises(InvalidArgument, match=f"^{next(iter(change))}="):
        train(small_recipe(steps=2, **change), source(), tmp_path, OFTEN, say=messages.append)
    network = dataclasses.replace(small_recipe().network, num_res_blocks=2)
    with pytest.raises(InvalidArgument, match="^num_res_blocks="):
        train(small_recipe(steps=2, network=network), source(), tmp_path, OFTEN, say=messages.append)
    assert messages == []


def test_other_data_is_said(tmp_path):
    messages: list[str] = []
    train(small_recipe(steps=1), source(), tmp_path, OFTEN)
    other = ArraySource(np.zeros((12, 8, 8, 1), np.uint8), [0, 1, 2, 3] * 3, "other", "other")
    train(small_recipe(steps=2), other, tmp_path, OFTEN, say=messages.append)
    assert any(text.startswith("data differs") for text in messages)


def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path):
    recipe, messages = small_recipe(steps=4), list[str]()
    train(recipe, source(), tmp_path / "whole", OFTEN)
    train(dataclasses.replace(recipe, steps=2), source(), tmp_path / "run", OFTEN)
    torch.set_num_threads(2)
    train(recipe, source(), tmp_path / "run", OFTEN, say=messages.append)
    assert torch.get_num_threads() == 2 and any(text.startswith("threads: 1") for text in messages)
    same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


# Snapshots


def test_a_broken_newest_snapshot_is_named_and_the_one_before_it_taken(tmp_path):
    recipe, messages = small_recipe(), list[str]()
    train(recipe, source(), tmp_path, OFTEN)
    expected = last_state(tmp_path)
    newest, before, _ = list_snapshots(tmp_path)
    content = newest.path.read_bytes()
    middle = len(content) // 2  # values of a tensor: any bytes load
    for broken in (content[:-10], content[:middle] + b"xyz" + content[middle + 3 :], b""):
        newest.path.write_bytes(broken)
        messages.clear()
        train(recipe, source(), tmp_path, OFTEN, say=messages.append)
        assert any(str(newest.path) in text for text in messages) and "goes on after step 4" in messages
        same(last_state(tmp_path), expected)
    for snapshot in list_snapshots(tmp_path):
        snapshot.path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no snapshot is whole"):
        train(recipe, source(), tmp_path, OFTEN)


def test_the_newest_snapshots_are_kept_and_leftovers_swept(tmp_path):
    loop_options = LoopOptions(save_every=1, log_every=1, keep=2)
    train(small_recipe(steps=3), source(), tmp_path, loop_options)
    assert [s.step for s in list_snapshots(tmp_path)] == [3, 2]
    folder = tmp_path / "snapshots"
    (folder / ".state-00000009.pt.1-ab.tmp").write_bytes(b"half")
    (folder / "state-00000009.pt").write_bytes(b"whole, but killed before its checksum")
    (folder / "notes.txt").write_text("a user's own")
    train(small_recipe(steps=3), source(), tmp_path, loop_options)
    names = {path.name for path in folder.iterdir()}
    assert names == {f"state-0000000{i}.pt{end}" for i in (2, 3) for end in ("", ".sha256")} | {"notes.txt"}


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_fills_leaves_the_snapshot_before(tmp_path, async_save):
    """A limit on the file size stands in for a full disk."""
    recipe = small_recipe()
    train(dataclasses.replace(recipe, steps=2), source(), tmp_path, OFTEN)
    size = list_snapshots(tmp_path)[0].path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(OutputError, match="state-00000004.pt: not written"):
            train(recipe, source(), tmp_path, dataclasses.replace(OFTEN, async_save=async_save))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [s.step for s in list_snapshots(tmp_path)] == [2]
    assert not list((tmp_path / "snapshots").glob(".*"))
    train(recipe, source(), tmp_path, OFTEN)
    assert [s.step for s in list_snapshots(tmp_path)] == [6, 4, 2]


# Signals and other processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends(tmp_path, monkeypatch, number):
    recipe = small_recipe(steps=7)
    train(recipe, source(), tmp_path / "whole", OFTEN)
    update = loop.Learner.update

    def and_signal(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return update(self, batch)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Learner, "update", and_signal)
        assert train(recipe, source(), tmp_path / "told", LoopOptions(save_every=100)) == TrainResult(
            3, number
        )
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [s.step for s in list_snapshots(tmp_path / "told")] == [3]
    train(recipe, source(), tmp_path / "told", OFTEN)
    same(last_state(tmp_path / "told"), last_state(tmp_path / "whole"))


def test_a_signal_is_not_kept_waiting_by_validation_or_a_grid(tmp_path, monkeypatch):
    recipe, update = small_recipe(steps=7, validation=3), loop.Learner.update

    def and_signal(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    monkeypatch.setattr(loop.Learner, "update", and_signal)
    loop_options = LoopOptions(save_every=1, log_every=1, grid_every=1)
    assert train(recipe, source(), tmp_path, loop_options) == TrainResult(3, signal.SIGTERM)
    assert ["validation_loss" in row for row in rows(tmp_path)] == [True, True, False]
    assert len(list((tmp_path / "grids").iterdir())) == 2
    assert list_snapshots(tmp_path)[0].step == 3


def test_a_folder_in_use_is_refused(tmp_path, system):
    with loop.folder.lock_run_folder(tmp_path, loop.World()):
        with pytest.raises(OutputError, match="another process is training"):
            train(small_recipe(), source(), tmp_path, OFTEN)
    train(small_recipe(steps=1), source(), tmp_path, OFTEN)


def test_a_run_that_never_began_leaves_no_folder(tmp_path, system):
    with pytest.raises(ZeroDivisionError), loop.folder.lock_run_folder(tmp_path / "run", loop.World()):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_folder_that_nobody_can_lock_is_named(tmp_path, monkeypatch):
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OutputError, match=str(tmp_path / "run")):
        train(small_recipe(), source(), tmp_path / "run", OFTEN)
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=str(place)):
            train(small_recipe(), source(), place, OFTEN)


# Data, steps, log and grids


def test_classes_are_checked_against_the_network(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    for labels in (None, [0, 0, 0, 0], [0, 1, 2, 4]):
        with pytest.raises(InvalidArgument, match="data"):
            train(small_recipe(), ArraySource(images, labels, "x", "x"), tmp_path / "run", OFTEN)
    assert not (tmp_path / "run").exists()


def test_steps_that_are_never_finite_stop_the_run(tmp_path, monkeypatch):
    recipe = small_recipe(max_skipped=1)
    update = loop.Learner.update

    def poison(self, batch):
        if self.step == 3:
            with torch.no_grad():
                self.net.out[2].weight.fill_(float("inf"))
        return update(self, batch)

    monkeypatch.setattr(loop.Learner, "update", poison)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*snapshot is that of step 4"):
        train(recipe, source(), tmp_path, OFTEN)


def test_the_log_has_losses_norms_and_rates(tmp_path):
    train(small_recipe(), source(), tmp_path, LoopOptions(log_every=4, save_every=100))
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [4, 6]
    expected = {"step", "images", "loss", "mse", "vb", "grad_norm", "param_norm", "lr", "skipped"}
    assert expected | {"images_per_second", "memory", "seconds_left"} <= set(found[0])
    quarters = [found[0][f"loss_q{i}"] for i in range(1, 5) if f"loss_q{i}" in found[0]]
    assert quarters and min(quarters) <= found[0]["loss"] <= max(quarters)
    assert found[1]["images"] == 24 and found[1]["seconds_left"] == 0


def test_tensorboard_gets_the_rows_where_it_is_installed(tmp_path, monkeypatch):
    written: list[tuple] = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append(("closed",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    train(small_recipe(steps=2), source(), tmp_path, OFTEN)
    assert written[0] == (str(tmp_path / "tensorboard"), 1) and written[-1] == ("closed",)
    assert {("loss", 1), ("loss", 2), ("grad_norm", 2), ("lr", 1)} <= set(written)


def test_grids_are_sampled_from_the_average(tmp_path):
    train(small_recipe(steps=2), source(), tmp_path / "a", LoopOptions(grid_every=1))
    first, second = (tmp_path / "a" / "grids" / f"0000000{i}.png" for i in (1, 2))
    assert first.read_bytes() != second.read_bytes()
    train(small_recipe("upsampler", steps=1), source(side=16), tmp_path / "b", LoopOptions(grid_every=1))
    assert (tmp_path / "b" / "grids" / "00000001.png").exists()
    train(small_recipe("classifier", steps=1), source(), tmp_path / "c", LoopOptions(grid_every=1))
    assert not (tmp_path / "c" / "grids").exists()


def test_a_run_is_loaded_exported_and_begun_from(tmp_path):
    run = tmp_path / "run"
    train(small_recipe(steps=2, ema_power=(0.05, 0.1)), source(), run, LoopOptions(save_every=1))
    averages = last_state(run)["averages"]
    pipe = admfast.load(run, device="cpu")
    same(dict(pipe.net.state_dict()), averages["0.9"])
    assert pipe.sample(classes=[1], seeds=[0], steps=2).shape == (1, 8, 8, 1)
    for name, options in {"a.safetensors": {}, "b.pt": {"average": "0.99"}, "c.pt": {"width": 0.1}}.items():
        export_run(run, tmp_path / name, **options)
        net, info = load_network(tmp_path / name)
        assert info.config == small_recipe().network and info.training["step"] == 2
        average = {"a.safetensors": "0.9", "b.pt": "0.99", "c.pt": "power-0.1"}[name]
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, averages[average][key], rtol=0, atol=1e-5 if "c" in name else 0)
    with pytest.raises(InvalidArgument, match="ema"):
        read_run_average(run, "0.5")
    train(small_recipe(steps=1, lr=1e-12), source(), tmp_path / "next", OFTEN, initial_weights=run)
    begun = last_state(tmp_path / "next")["net"]
    torch.testing.assert_close(begun["out.2.weight"], averages["0.9"]["out.2.weight"], rtol=0, atol=1e-9)


def test_a_run_without_a_snapshot_is_said(tmp_path):
    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patched:
        killed_after(patched, 2)
        train(small_recipe(), source(), tmp_path, OFTEN)
    with pytest.raises(CheckpointError, match="no snapshot"):
        admfast.load(tmp_path, device="cpu")


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trial = dry_run(small_recipe(steps=100), source())
    assert trial.run_seconds == 100 * trial.step_seconds > 0 and trial.memory > 1e6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["save_every", "log_every", "keep"])
def test_habits_that_are_not_allowed(name):
    with pytest.raises(InvalidArgument, match=name):
        LoopOptions(**{name: 0})
