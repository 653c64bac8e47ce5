"""Tests that the same `admfast sample` without `--num` goes on after an interruption."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from admfast.errors import OutputError
from admfast.runs.folder import SampleFolder
from admfast.runs.manifest import MANIFEST
from admfast.runs.sampling import SampleRun
from admfast.sampling.request import SampleRequest
from tests.runs.test_sample_run import CLASSES, REQUEST, SEEDS, contents, files, images_of, run_of, stop_at
from tests.small import cascade, pipeline


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the files of a run without a stop."""
    out = tmp_path_factory.mktemp("whole")
    run_of(out).run()
    return contents(out)


@pytest.mark.parametrize("step", [4, 5, 7, 8, 9])
def test_a_stopped_run_goes_on_to_the_same_files(tmp_path, whole, step):
    first = stop_at(step)(pipeline(), REQUEST, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.finished == first.made == 2 * ((step - 1) // 3)
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    second = run_of(tmp_path)
    written = second.run()
    assert contents(tmp_path) == whole, "other bits, or the npz of the first part is left"
    assert second.made == 5 - first.made and second.finished == 5
    assert {path: path.stat().st_mtime_ns for path in dates} == dates, "finished images were made again"
    assert written == [tmp_path / "grid.png", tmp_path / "samples_5x8x8x1.npz"]


def test_a_killed_run_goes_on_to_the_same_files(tmp_path, whole, monkeypatch):
    """A killed process writes neither grid nor npz, and leaves half a file."""
    monkeypatch.setattr(SampleRun, "_write_grid_and_npz", lambda self: [])
    monkeypatch.setattr(SampleFolder, "publish", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        stop_at(6)(pipeline(), REQUEST, tmp_path).run()
    (tmp_path / ".lock").write_text("")
    monkeypatch.undo()
    assert len(files(tmp_path)) == 3
    run_of(tmp_path).run()
    assert contents(tmp_path) == whole


def test_a_finished_run_makes_nothing_again(tmp_path, whole):
    run_of(tmp_path).run()
    again = run_of(tmp_path)
    assert again.run() == [tmp_path / "grid.png", tmp_path / "samples_5x8x8x1.npz"]
    assert again.made == 0 and again.finished == 5 and contents(tmp_path) == whole


def test_an_image_that_was_removed_is_made_again_with_its_batch(tmp_path, whole):
    run_of(tmp_path).run()
    (tmp_path / "images" / "000001_class1_seed6.png").unlink()
    again = run_of(tmp_path)
    again.run()
    assert again.made == 2 and contents(tmp_path) == whole


def test_images_beyond_the_grid_and_before_the_stop_are_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.runs.sampling.GRID_LIMIT", 3)
    run_of(tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        stop_at(5)(pipeline(), REQUEST, tmp_path / "out").run()
    run_of(tmp_path / "out").run()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_finished_is_kept_also_if_it_is_not_the_beginning(tmp_path):
    run_of(tmp_path).run()
    (tmp_path / "images" / "000000_class0_seed5.png").unlink()
    run = stop_at(1)(pipeline(), REQUEST, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.finished == 4
    with np.load(tmp_path / "samples_4x8x8x1.npz") as archive:
        assert archive["arr_1"].tolist() == CLASSES[1:]
        assert np.array_equal(archive["arr_0"], images_of(tmp_path))


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"steps": 4}, "steps=3, not 4"),
        ({"seeds": [5, 6, 7, 8, 10]}, "seeds='5-9', not '5-8,10'"),
        ({"classes": [0, 1, 2, 3, 1]}, "classes="),
        ({"batch_size": 3}, "batch_size=2, not 3"),
        ({"guidance": 2.0}, "guidance=1.0, not 2.0"),
    ],
    ids=str,
)
def test_other_settings_are_refused_with_the_difference(tmp_path, changes, difference):
    with pytest.raises(KeyboardInterrupt):
        stop_at(5)(pipeline(), REQUEST, tmp_path).run()
    before = contents(tmp_path)
    run = run_of(tmp_path, **changes)
    for action in (run.check, run.run):
        with pytest.raises(OutputError, match=difference) as caught:
            action()
        assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_other_settings_are_taken_where_no_image_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stop_at(2)(pipeline(), REQUEST, tmp_path).run()
    assert list(tmp_path.iterdir()) == []
    # As a killed process leaves it
    (tmp_path / "images").mkdir()
    run = run_of(tmp_path, steps=4)
    run.check()
    (tmp_path / MANIFEST).write_text(dataclasses.replace(run._manifest, images=9, seeds="0-8").to_json())
    run.run()
    assert len(files(tmp_path)) == 7


def test_an_unfinished_replacement_goes_on_in_its_folder(tmp_path, whole):
    run_of(tmp_path, steps=2).run()
    with pytest.raises(KeyboardInterrupt):
        stop_at(5)(pipeline(), REQUEST, tmp_path, overwrite=True).run()
    second = run_of(tmp_path / "unfinished")
    second.run()
    assert second.made == 3 and contents(tmp_path / "unfinished") == whole


def test_replaced_samples_go_on_by_the_new_manifest(tmp_path, whole):
    run_of(tmp_path, steps=2).run()
    run_of(tmp_path, overwrite=True).run()
    assert contents(tmp_path) == whole
    (tmp_path / "images" / "000004_class0_seed9.png").unlink()
    run_of(tmp_path).run()
    assert contents(tmp_path) == whole


def test_a_folder_of_shards_is_not_replaced(tmp_path):
    run = run_of(tmp_path)
    run.check()
    (tmp_path / MANIFEST).write_text(dataclasses.replace(run._manifest, files="npz").to_json())
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds a run of 5 images in shards"):
            run_of(tmp_path, overwrite=overwrite).run()


def test_a_run_in_shards_that_began_after_the_check_is_not_replaced(tmp_path, monkeypatch):
    run, check = run_of(tmp_path), SampleFolder.check
    others = dataclasses.replace(run.check() and run._manifest, files="npz").to_json()

    def overtaken(self, manifest):
        check(self, manifest)
        (tmp_path / MANIFEST).write_text(others)

    monkeypatch.setattr(SampleFolder, "check", overtaken)
    with pytest.raises(OutputError, match="holds a run of 5 images in shards"):
        run.run()
    assert (tmp_path / MANIFEST).read_text() == others and not (tmp_path / "images").exists()


def test_without_a_batch_size_that_of_the_run_is_taken(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        stop_at(5)(pipeline(), REQUEST, tmp_path).run()
    run_of(tmp_path, batch_size=None).run()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("name", ["noise", "step_noise"])
def test_noise_that_is_given_is_part_of_the_settings(tmp_path, name):
    import torch

    def noise(seed: int) -> torch.Tensor:
        shape = [*([3] if name == "step_noise" else []), 5, 1, 8, 8]
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    run_of(tmp_path, **{name: noise(0)}).run()
    assert SampleRun(pipeline(), run_of(tmp_path, **{name: noise(0)}).request, tmp_path).run()
    with pytest.raises(OutputError, match=f"{name}='.*', not '.*'"):
        run_of(tmp_path, **{name: noise(1)}).run()


def test_a_cascade_goes_on(tmp_path):
    request = SampleRequest([0, 1, 2], SEEDS[:3], steps=2, upsampler_steps=2, batch_size=1)
    SampleRun(cascade(), request, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        stop_at(6)(cascade(), request, tmp_path / "out").run()
    second = SampleRun(cascade(), request, tmp_path / "out")
    second.run()
    assert second.made == 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")
