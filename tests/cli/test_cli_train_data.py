"""Tests of `admfast train` with bad data, disks and folders: one line, status 2, and saved files are kept."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from admfast.checkpoints.snapshots import list_snapshots
from admfast.cli.main import main
from admfast.distributed import World
from admfast.errors import InvalidArgument, OutputError
from admfast.files.locks import LOCK
from admfast.training.folder import lock_run_folder

CLASSES = 10  # of the network
IMAGES = np.zeros((2 * CLASSES, 32, 32, 1), np.uint8)
SMALL = ["--batch-size", "2", "--log-every", "1", "--grid-every", "0", "--save-every", "2"]
SMALL += ["--set", "channel_mult=1", "--set", "attention_resolutions=2"]
Put = Callable[[Path], Path]


def train(run: Path, *more: str, steps: int = 2) -> int:
    return main(["train", "diffusion", "--out", str(run), "--steps", str(steps), *SMALL, *more])


def folder(place: Path, classes: int = CLASSES, size: int = 40, **also: bytes) -> Path:
    """Make a folder with two images per class. `also` holds more PNG files of the first class, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    for number in range(classes):
        (one := place / f"class{number}").mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.fromarray(noise).save(one / name)
    for name, content in also.items():
        (place / "class0" / f"{name}.png").write_bytes(content)
    return place


def emptied(place: Path) -> Path:
    for path in folder(place).rglob("*.png"):
        path.write_bytes(b"")
    return place


def of_folders(place: Path, *names: str) -> Path:
    for name in ("", *names):
        (place / name).mkdir()
    return place


def npz(labels: object, images: np.ndarray = IMAGES) -> Put:
    def put(place: Path) -> Path:
        np.savez(path := place.with_suffix(".npz"), images, np.array(labels))
        return path

    return put


def empty_npz(place: Path) -> Path:
    (path := place.with_suffix(".npz")).write_bytes(b"")
    return path


REFUSED: dict[str, Put] = {
    "empty folder": of_folders,
    "empty folders": lambda place: of_folders(place, "a", "b"),
    "one class of ten": lambda place: folder(place, 1),
    "eleven classes": npz([i % (CLASSES + 1) for i in range(len(IMAGES))]),
    "a class below 0": npz([*range(CLASSES)] * 2 + [-1], np.zeros((21, 32, 32, 1), np.uint8)),
    "a class that no network has": npz([*range(CLASSES), *[2**40] * CLASSES]),
    "labels that are no numbers of classes": npz([0.5] * len(IMAGES)),
    "fewer labels than images": npz([0] * CLASSES),
    "levels of another kind": npz([*range(CLASSES)] * 2, IMAGES.astype(np.float32)),
    "empty npz": empty_npz,
    "every file empty": emptied,
    "three texts": lambda place: folder(place, one=b"no", two=b"image", three=b"here"),
}


def lines_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Return the lines of standard error about skipped images, and the others."""
    lines = capsys.readouterr().err.splitlines()
    skipped = [line for line in lines if line.startswith("admfast: skipped a broken image: ")]
    return skipped, [line for line in lines if line not in skipped]


@pytest.mark.parametrize("put", REFUSED.values(), ids=REFUSED)
def test_data_that_no_run_can_use_is_one_line(tmp_path, capsys, put):
    data = put(tmp_path / "data")
    assert train(tmp_path / "run", "--data", str(data), steps=30) == 2
    skipped, [said] = lines_of(capsys)
    assert str(data) in said or said.startswith("admfast: --data=")
    assert len(skipped) <= 2


@pytest.mark.parametrize("content", [b"", b"a text, no image"], ids=["zero bytes", "a text"])
def test_one_broken_image_is_named_and_another_takes_its_place(tmp_path, capsys, content):
    data = folder(tmp_path / "data", broken=content)
    assert train(tmp_path / "run", "--data", str(data), steps=11) == 0  # an epoch
    [skipped], others = lines_of(capsys)
    assert "broken.png" in skipped and not others
    assert [s.step for s in list_snapshots(tmp_path / "run")][0] == 11


@pytest.mark.parametrize("crop", ["False", "True"])
def test_images_smaller_than_the_crop_are_enlarged(tmp_path, capsys, crop):
    data = folder(tmp_path / "data", size=5)
    assert train(tmp_path / "run", "--data", str(data), "--set", f"random_crop={crop}") == 0
    assert lines_of(capsys) == ([], [])


def test_one_class_is_enough_for_a_network_of_one(tmp_path):
    data = folder(tmp_path / "data", 1)
    assert train(tmp_path / "run", "--data", str(data), "--set", "num_classes=1") == 0


def contents(run: Path) -> dict[str, bytes]:
    """Return all files of a run's folder, by path."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "setting", ["num_res_blocks=2", "model_channels=64", "num_head_channels=16", "in_channels=3"]
)
def test_another_network_leaves_the_run_as_it_is(tmp_path, capsys, setting):
    assert train(tmp_path / "run") == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert train(tmp_path / "run", "--set", setting, steps=4) == 2
    assert lines_of(capsys)[1][0].startswith(f"admfast: {setting}")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "there", [[], ["runs"], ["runs", "runs/run"], ["runs", "runs/run", "runs/run/notes"]]
)
def test_a_recipe_that_makes_no_network_leaves_nothing(tmp_path, capsys, there):
    for folder in there:
        (tmp_path / folder).mkdir()
    run = tmp_path / "runs/run"
    for mistake in (["--set", "freeze=nothing.*"], ["--from", str(run)]):
        assert train(run, *mistake) == 2
        assert len(lines_of(capsys)[1]) == 1
        assert sorted(tmp_path.rglob("*")) == [tmp_path / folder for folder in there]
    assert train(run, "--set", "freeze=time_embed.*") == 0


def test_a_run_that_is_refused_keeps_what_others_put_beside_it(tmp_path, monkeypatch):
    run = tmp_path / "runs/run"

    def meanwhile(*given: object) -> None:
        (tmp_path / "runs/other").mkdir()
        raise InvalidArgument("refused")

    monkeypatch.setattr("admfast.training.loop.build_network", meanwhile)
    assert train(run) == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs/other"]


def test_a_lock_without_a_name_keeps_nobody_out_and_a_lock_of_a_run_stays(tmp_path, monkeypatch):
    """A refused run may remove its lock file after another process has opened the file."""
    locking = "admfast.files.locks.lock"
    monkeypatch.setattr(locking, lambda descriptor: (tmp_path / LOCK).unlink())
    with pytest.raises(OutputError, match="another process"), lock_run_folder(tmp_path, World()):
        pass
    monkeypatch.undo()
    assert train(tmp_path) == 0 and (tmp_path / LOCK).exists()
    assert train(tmp_path, "--seed", "5") == 2 and (tmp_path / LOCK).exists()


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, capsys):
    assert train(tmp_path) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    with lock_run_folder(tmp_path, World()):
        assert train(tmp_path, steps=4) == 2
    assert "another process" in lines_of(capsys)[1][0]
    assert contents(tmp_path) == before and LOCK in before
    assert train(tmp_path, steps=4) == 0


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a file system of `size` bytes, which is unmounted after the test."""
    place = tmp_path / "disk"

    def mounted(size: int) -> Path:
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.name != "posix" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small file system can't be mounted here")
        return place

    yield mounted
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("snapshots_that_fit", [0.5, 1.5])
def test_a_full_disk_leaves_what_was_saved_and_the_run_goes_on_elsewhere(
    tmp_path, capsys, small_disk, snapshots_that_fit
):
    assert train(tmp_path / "whole", steps=4) == 0
    size = list_snapshots(tmp_path / "whole")[0].path.stat().st_size
    run = small_disk(int(snapshots_that_fit * size)) / "run"
    capsys.readouterr()
    assert train(run, steps=4) == 2
    assert lines_of(capsys)[1][0].endswith("not written: the disk is full")
    saved = [snapshot.step for snapshot in list_snapshots(run)]
    assert saved == ([2] if snapshots_that_fit > 1 else [])
    assert not [path for path in run.rglob("*") if path.suffix == ".tmp"]
    subprocess.run(["cp", "-r", str(run), str(tmp_path / "moved")], check=True)
    assert train(tmp_path / "moved", steps=4) == 0
    assert [s.step for s in list_snapshots(tmp_path / "moved")][0] == 4
