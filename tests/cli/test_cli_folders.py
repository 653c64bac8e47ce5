"""Tests of `admfast --version`, and of the folders that `admfast sample` and `admfast train` write to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import admfast
from admfast.cli.main import main
from admfast.training import loop

TRAIN = ["train", "diffusion", "--steps", "1", "--batch-size", "2", "--grid-every", "0", "--device", "cpu"]


def sample_command(weights: Path, out: Path, *options: str) -> list[str]:
    model = str(weights / "faces.safetensors")
    return ["sample", model, "--steps", "2", "--device", "cpu", "--out", str(out), *options]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_refused(capsys, command: list[str], *parts: str) -> None:
    """Check that a command ends with status 2 and one line that contains all parts."""
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.startswith("admfast: ") and line.count("\n") == 1
    assert all(part in line for part in parts), line


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"admfast {admfast.__version__}\n"
    assert main(["--help"]) == 0
    assert "--version" in capsys.readouterr().out


def test_samples_are_not_written_into_the_folder_of_a_training_run(weights, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TRAIN, "--out", str(run)]) == 0, capsys.readouterr().err
    before = files(run)
    capsys.readouterr()
    for options in ([], ["--overwrite"]):
        assert_refused(capsys, sample_command(weights, run, *options), f"--out='{run}'", "run.json", "train")
    assert files(run) == before


def test_training_does_not_write_into_a_folder_of_samples(weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(sample_command(weights, out)) == 0, capsys.readouterr().err
    before = files(out)
    capsys.readouterr()
    assert_refused(capsys, [*TRAIN, "--out", str(out)], f"'{out}'", "3 files of samples", "sample")
    assert files(out) == before


@pytest.mark.parametrize("made", [True, False], ids=["old-folder", "new-folder"])
def test_a_training_run_whose_first_step_fails_leaves_its_folder_free(tmp_path, capsys, monkeypatch, made):
    def fail(self, batch):
        raise torch.OutOfMemoryError("out of memory")

    out = tmp_path / "run"
    if made:
        out.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(loop.Learner, "update", fail)
        with pytest.raises(torch.OutOfMemoryError):
            main([*TRAIN, "--out", str(out)])
    assert not (out / "run.json").exists()
    # Another recipe, which a begun run would refuse
    assert main([*TRAIN, "--seed", "5", "--out", str(out)]) == 0, capsys.readouterr().err
    assert (out / "run.json").exists()


def test_a_sampling_run_that_finishes_no_image_leaves_no_file(weights, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    command = sample_command(weights, tmp_path / "new/out", "--intermediates", "1")
    with monkeypatch.context() as patched:
        patched.setattr("admfast.sampling.loop.to_uint8", fail)  # after all steps, with their intermediates
        with pytest.raises(torch.OutOfMemoryError):
            main(command)
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0, capsys.readouterr().err
