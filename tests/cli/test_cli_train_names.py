"""Tests of `admfast train` when a name belongs to another option, and of the settings of a continued run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from admfast.cli.main import main

QUICK = ["--steps", "1", "--batch-size", "4", "--device", "cpu", "--grid-every", "0"]


@pytest.mark.parametrize(
    ("kind", "arguments", "allowed"),
    [
        ("diffusion", ["--preset", "64x64_diffusion"], ["imagenet64", "model", "--preset imagenet64"]),
        ("diffusion", ["--preset", "64x64_diffusion.pt"], ["imagenet64", "model", "--preset imagenet64"]),
        ("diffusion", ["--preset", "lsun_bedroom"], ["lsun-bedroom", "model", "--preset lsun-bedroom"]),
        ("diffusion", ["--preset", "digits32_diffusion"], ["model", "--preset digits32"]),
        (
            "classifier",
            ["--preset", "64x64_diffusion"],
            ["imagenet64", "model", "train diffusion --preset imagenet64"],
        ),
        ("upsampler", ["--preset", "imagenet64"], ["imagenet256", "train diffusion", "train classifier"]),
        ("diffusion", ["--preset", "imagenet65"], ["imagenet64", "digits32"]),
        ("diffusion", ["--from", "imagenet64"], ["weights file", "preset", "--preset imagenet64"]),
        (
            "diffusion",
            ["--from", "64x64_diffusion"],
            ["weights file", "model", "admfast fetch 64x64_diffusion"],
        ),
        ("diffusion", ["--from", "digits32_diffusion"], ["weights file", "model", "--preset digits32"]),
    ],
)
def test_a_name_of_another_option_is_answered_with_that_option(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    kind: str,
    arguments: list[str],
    allowed: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    option, value = arguments
    assert main(["train", kind, "--out", "run", "--data", "digits", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"admfast: {option}='{value}': ") and error.count("\n") == 1
    assert all(words in error for words in allowed), error
    assert not (tmp_path / "run").exists()


def test_a_file_with_the_name_of_a_preset_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet64").write_text("no weights")
    assert main(["train", "diffusion", "--out", "run", "--from", "imagenet64"]) == 2
    assert "preset" not in capsys.readouterr().err


def test_inspect_names_the_command_that_describes_a_system(capsys: Any) -> None:
    for name in ("digits32", "imagenet64", "64x64_diffusion"):
        assert main(["inspect", name]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"path='{name}': " in error and f"`admfast models {name}`" in error


def test_inspect_names_the_preset_of_a_model(capsys: Any) -> None:
    assert main(["inspect", "128x128_classifier", "--train"]) == 2
    error = capsys.readouterr().err
    assert "path='128x128_classifier': " in error and "imagenet128" in error and "model" in error


def recipe_in(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())["training"]["recipe"]


def test_a_continued_run_keeps_the_settings_that_it_was_started_with(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    start = ["train", "diffusion", "--out", str(run), *QUICK]
    settings = ["--microbatch", "2", "--checkpointing", "norms", "--set", "max_skipped=7"]
    assert main([*start, *settings]) == 0
    kept = {"steps": 1, "microbatch": 2, "checkpointing": "norms", "max_skipped": 7}
    assert main([*start, "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert {name: recipe_in(run)[name] for name in kept} == {**kept, "steps": 2}
    assert "steps was 1, is 2 now" in printed
    assert not any(f"{name} was" in printed for name in ("microbatch", "checkpointing", "max_skipped"))
    # A setting that the user gives replaces that of the run, and the change is printed.
    assert main([*start, "--steps", "3", "--microbatch", "4", "--set", "max_skipped=9"]) == 0
    printed = capsys.readouterr().out
    assert {name: recipe_in(run)[name] for name in kept} == {
        "steps": 3, "microbatch": 4, "checkpointing": "norms", "max_skipped": 9,
    }  # fmt: skip
    assert "microbatch was 2, is 4 now" in printed and "max_skipped was 7, is 9 now" in printed


def test_another_batch_size_is_refused_whatever_the_microbatch_of_the_run_is(
    tmp_path: Path, capsys: Any
) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "diffusion", "--out", run, *QUICK, "--microbatch", "4"]) == 0
    capsys.readouterr()
    assert main(["train", "diffusion", "--out", run, "--batch-size", "2", "--device", "cpu"]) == 2
    assert "--batch-size=2: " in capsys.readouterr().err


def test_every_setting_that_is_left_out_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = ["train", "diffusion", "--out", str(run), "--grid-every", "0", "--device", "cpu"]
    settings = ["--batch-size", "2", "--precision", "bf16", "--lr", "0.001", "--set", "diffusion_steps=50"]
    assert main([*start, "--steps", "1", *settings, "--set", "dropout=0.3"]) == 0
    before = recipe_in(run)
    assert main([*start, "--steps", "2"]) == 0
    assert recipe_in(run) == {**before, "steps": 2} and before["network"]["dropout"] == 0.3
    # With the preset named, its network and process must be those of the run.
    assert main([*start, "--preset", "digits32"]) == 2


def test_data_other_than_the_digits_are_named_again(tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "data.npz", np.zeros((4, 32, 32, 1), np.uint8), np.arange(4) % 2)
    start = ["train", "diffusion", "--out", str(tmp_path / "run"), "--batch-size", "2", "--grid-every", "0"]
    data = ["--data", str(tmp_path / "data.npz")]
    assert main([*start, *data, "--steps", "1", "--set", "num_classes=2", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*start, "--steps", "2", "--device", "cpu"]) == 2
    assert "--data=None: " in capsys.readouterr().err
    assert main([*start, *data, "--steps", "2", "--device", "cpu"]) == 0
