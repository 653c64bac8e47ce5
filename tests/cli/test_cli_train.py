"""Tests of `admfast train`: its options, errors and output."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch

import admfast
from admfast.checkpoints import load_network
from admfast.checkpoints.snapshots import list_snapshots
from admfast.cli.main import main
from admfast.cli.train import resolve_recipe
from admfast.errors import CheckpointError, InvalidArgument
from admfast.interrupts import ENDING_SIGNALS
from admfast.training import loop
from admfast.training.recipes import PRESETS, recipe_from_preset

QUICK = ["--steps", "2", "--batch-size", "2", "--log-every", "1", "--grid-every", "0"]


@pytest.mark.parametrize("kind", PRESETS)
def test_each_kind_trains_and_is_exported(tmp_path, capsys, kind):
    run, file = tmp_path / "run", tmp_path / "out.safetensors"
    assert main(["train", kind, "--out", str(run), *QUICK]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(run.resolve()) and any(line.startswith("step 2 of 2") for line in said)
    assert any(line.startswith("lr ") for line in said), "the resolved recipe is not printed"
    assert main(["train", "export", str(run), "--out", str(file), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(file.resolve())
    net, info = load_network(file)
    assert info.config == recipe_from_preset(kind).network and info.training["step"] == 2
    if kind == "classifier":
        with pytest.raises(InvalidArgument, match="a classifier"):
            admfast.load(run, device="cpu")


def test_options_reach_the_recipe(tmp_path):
    run = tmp_path / "run"
    options = [
        "--seed",
        "3",
        "--lr",
        "0.5",
        "--checkpointing",
        "2",
        "--microbatch",
        "1",
        "--precision",
        "bf16",
    ]
    options += [
        "--set",
        "ema=0.5,0.25",
        "--set",
        "dropout=0",
        "--set",
        "diffusion_steps=20",
        "--set",
        "clip=None",
    ]
    assert main(["train", "diffusion", "--out", str(run), *QUICK, *options]) == 0
    found = json.loads((run / "run.json").read_text())["training"]["recipe"]
    assert (found["seed"], found["lr"], found["checkpointing"], found["microbatch"]) == (3, 0.5, 2, 1)
    assert (found["precision"], found["ema"], found["clip"]) == ("bf16", [0.5, 0.25], None)
    assert found["network"]["dropout"] == 0 and found["process"]["steps"] == 20


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = ["--out", str(tmp_path / "run")]
    for arguments, named in {
        ("--steps", "0"): "--steps",
        ("--preset", "imagenet65"): "--preset",
        ("--preset", "imagenet64"): "--data",
        ("--data", str(tmp_path / "empty")): "--data",
        ("--data", str(tmp_path / "nothing")): "--data",
        ("--set", "learning_rate=1"): "learning_rate",
        ("--set", "num_classes=9"): "--data",
        ("--save-every", "0"): "--save-every",
        ("--from", str(tmp_path / "nothing.pt")): "nothing.pt",
        ("--checkpointing", "some"): "--checkpointing",
        ("--device", "tpu"): "--device",
        ("--steps", "ten"): "--steps='ten'",
        ("--set", "depth=3"): "depth=3: no such setting of a diffusion run",
        (
            "--set",
            "num_channels=64",
        ): "num_channels=64: no such setting of a diffusion run; here model_",
        ("--out", str(tmp_path / "file")): "file: not written: it is a file",
        ("--out", str(tmp_path / "file/run")): "file: not written: it is a file",
    }.items():
        assert main(["train", "diffusion", *out, *arguments]) == 2, arguments
        printed, said = capsys.readouterr()
        assert said.count("\n") == 1 and named in said, said
        assert printed == "" or "num_classes=9" in arguments
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_is_said_with_what_a_run_is(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/run.json").write_text("{}")
    places = {"empty": "folder", "file": "file", "digit": "similar names: digits", "no/run": "no folder"}
    places["x" * 300] = "nothing"
    for wanted in (["--out", str(tmp_path / "a.pt")], ["--picture", str(tmp_path / "a.png")]):
        for place, found in places.items():
            run = str(tmp_path / place)
            assert main(["train", "export", run, *wanted]) == 2
            said = capsys.readouterr().err
            assert said.startswith("admfast: run='") and said.count("\n") == 1
            assert "run.json" in said and found in said.partition(";")[2]


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = np.zeros((4, 32, 32, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images, np.arange(4))
    options = ["--data", "~/data.npz", "--cache", "~/cache", "--set", "num_classes=4"]
    assert main(["train", "diffusion", "--out", "~/run", *QUICK, *options]) == 0, capsys.readouterr().err
    assert (tmp_path / "run/run.json").exists() and list((tmp_path / "cache").iterdir())
    assert main(["train", "export", "~/run", "--out", "~/weights.pt"]) == 0
    assert (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_every_signal_is_named_alike(tmp_path, monkeypatch, capsys, number, times):
    """After the first signal the current step is finished and saved; a second one ends the run at once."""
    update = loop.Learner.update

    def and_signal(self, batch):
        for _ in range(times):
            os.kill(os.getpid(), number)
        return update(self, batch)

    monkeypatch.setattr(loop.Learner, "update", and_signal)
    before = [signal.getsignal(one) for one in ENDING_SIGNALS]
    assert main(["train", "diffusion", "--out", str(tmp_path), *QUICK]) == 128 + number
    assert capsys.readouterr().err == f"admfast: interrupted by {number.name}\n"
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [1] * (times == 1)
    assert [signal.getsignal(one) for one in ENDING_SIGNALS] == before


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(tmp_path, monkeypatch, number):
    """nohup, for example, makes a command ignore SIGHUP."""
    update = loop.Learner.update
    monkeypatch.setattr(
        loop.Learner, "update", lambda *given: (os.kill(os.getpid(), number), update(*given))[1]
    )
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert main(["train", "diffusion", "--out", str(tmp_path), *QUICK]) == 0
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("more", [[], ["--out", "run"], ["--cache", "cache"]], ids=["", "out", "cache"])
def test_a_dry_run_says_what_the_run_takes_and_writes_nothing(tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "diffusion", *QUICK, "--dry-run", *more]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("peak memory", "whole run", "images a second"))
    assert not list(tmp_path.iterdir())


def test_an_export_with_a_mistake_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "diffusion", "--out", "run", *QUICK]) == 0
    weights, picture = ["--out", "a.pt"], ["--picture", "a.png"]
    before = sorted(tmp_path.rglob("*"))
    for mistake, named in (
        (["--out", "a.txt", *picture], "--out='a.txt'"),
        (["--out", "none/a.pt", *picture], "none/a.pt"),
        ([*weights, "--picture", "a.jpg"], "--picture='a.jpg'"),
        (["--picture", "a"], "--picture='a'"),
        ([*weights, "--picture", "none/a.png"], "none/a.png"),
        ([*weights, *picture, "--ema", "0.5"], "--ema='0.5'"),
        ([*weights, *picture, "--width", "0.1"], "--width=0.1"),
        ([*weights, *picture, "--dtype", "float8"], "--dtype='float8'"),
        ([*picture, "--ema", "0.9995"], "--ema='0.9995'"),
        ([*picture, "--width", "0.1"], "--width=0.1"),
    ):
        capsys.readouterr()
        assert main(["train", "export", "run", *mistake]) == 2, mistake
        printed, said = capsys.readouterr()
        assert printed == "" and said.startswith(f"admfast: {named}: ") and said.count("\n") == 1, said
        assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", "export", "run", *weights, *picture]) == 0
    assert len(list(tmp_path.rglob("*"))) == len(before) + 3  # weights, their description, the picture


def test_a_run_begins_from_a_file(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "diffusion", "--out", str(first), *QUICK, "--set", "num_res_blocks=2"]) == 0
    found = resolve_recipe("diffusion", "digits32", str(first), {"dropout": 0.0})
    assert (found.network.num_res_blocks, found.network.dropout) == (2, 0.0)
    options = ["--from", str(first), "--set", "freeze=input_blocks.*", "--set", "warmup=0"]
    assert main(["train", "diffusion", "--out", str(second), *QUICK, *options]) == 0
    old, new = (load_network(run)[0].state_dict() for run in (first, second))
    changed = {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}
    assert "output_blocks" in changed and "input_blocks" not in changed
    null = ["--set", "drop_classes=0.5", "--from", str(first)]
    assert main(["train", "diffusion", "--out", str(tmp_path / "null"), *QUICK, *null]) == 0
    again = resolve_recipe("diffusion", "digits32", str(tmp_path / "null"), {})
    assert (again.network.num_classes, again.num_image_classes, again.drop_classes) == (11, 10, 0.5)
    with pytest.raises(InvalidArgument, match="from"):
        resolve_recipe("classifier", "digits32", str(first), {})
    with pytest.raises(CheckpointError):
        resolve_recipe("diffusion", "digits32", str(tmp_path), {})


def test_an_upsampler_goes_on_enlarging_what_it_enlarged(tmp_path):
    path = tmp_path / "up.safetensors"
    admfast.export("digits32_upsampler", path, to="safetensors", low_res_size=16)
    assert resolve_recipe("upsampler", "digits32", str(path), {}).low_res_size == 16


def test_the_help_lists_kinds_and_presets(capsys):
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(kind in said for kind in (*PRESETS, "export"))
    assert main(["train", "diffusion", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*PRESETS["diffusion"], "--dry-run", "--from"))


def test_a_file_is_replaced_only_if_asked(tmp_path, capsys):
    run, file, picture = tmp_path / "run", tmp_path / "notes.pt", tmp_path / "notes.png"
    assert main(["train", "diffusion", "--out", str(run), *QUICK]) == 0
    for own in (file, picture):
        own.write_text("mine")
    for wanted in (["--out", str(file)], ["--picture", str(picture)]):
        assert main(["train", "export", str(run), *wanted]) == 2
        assert wanted[1] in capsys.readouterr().err
    assert file.read_text() == picture.read_text() == "mine"
    beside = tmp_path / "other.json"
    beside.write_text("mine")
    assert main(["train", "export", str(run), "--out", str(beside.with_suffix(".pt"))]) == 2
    assert beside.read_text() == "mine" and not beside.with_suffix(".pt").exists()
    assert main(["train", "export", str(run), "--out", str(file), "--overwrite"]) == 0
    assert load_network(file)[1].training["step"] == 2


def test_a_run_keeps_its_own_steps_and_never_has_fewer(tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "diffusion", "--out", str(run)]
    assert main([*command, *QUICK]) == 0
    before = (run / "run.json").read_bytes()
    assert main([*command, *QUICK[2:]]) == 0
    assert (run / "run.json").read_bytes() == before
    capsys.readouterr()
    assert main([*command, *QUICK, "--steps", "1"]) == 2
    assert "steps" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before


def test_the_null_class_is_sampled_only_if_asked(tmp_path):
    run = tmp_path / "run"
    assert main(["train", "diffusion", "--out", str(run), *QUICK, "--set", "drop_classes=0.5"]) == 0
    pipe = admfast.load(run, device="cpu")
    settings = {"steps": 1, "output": "float"}
    by_default = pipe.sample(seeds=[10], **settings)
    assert torch.equal(by_default, pipe.sample(seeds=[10], classes=[0], **settings))
    assert not torch.equal(by_default, pipe.sample(seeds=[10], classes=[10], **settings))
    out = tmp_path / "out"
    assert main(["sample", str(run), "--per-class", "1", "--steps", "1", "--out", str(out)]) == 0
    (file,) = out.glob("*.npz")
    assert np.load(file)["arr_1"].tolist() == list(range(10))


def test_a_size_that_does_not_fit_begins_no_run(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "diffusion", "--out", str(run), *QUICK, "--set", "image_size=30"]) == 2
    assert "image_size" in capsys.readouterr().err and not run.exists()
