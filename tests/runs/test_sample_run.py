"""Tests of sampling many images into a folder: files, overwriting, and stopping early."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument, NonFiniteError, OutputError
from admfast.files.images import read_image
from admfast.files.locks import folder_locked
from admfast.files.npz import read_samples
from admfast.runs import sampling
from admfast.runs.manifest import MANIFEST
from admfast.runs.progress import step_shares
from admfast.runs.sampling import SampleRun
from admfast.sampling.request import SampleRequest
from tests.small import cascade, pipeline, unet

SEEDS, CLASSES = [5, 6, 7, 8, 9], [0, 1, 2, 3, 0]
REQUEST = SampleRequest(CLASSES, SEEDS, steps=3, batch_size=2)


def run_of(out: Path, **changes) -> SampleRun:
    """Return a run of five images in batches of two. `changes` are fields of SampleRun or SampleRequest."""
    own = {entry.name for entry in dataclasses.fields(SampleRun)}
    settings = {"classes": CLASSES, "seeds": SEEDS, "batch_size": 2, "steps": 3}
    settings |= {name: value for name, value in changes.items() if name not in own}
    parts = {name: value for name, value in changes.items() if name in own}
    return SampleRun(**{"pipe": pipeline(), "request": SampleRequest(**settings), "out": out, **parts})


def files(folder: Path) -> list[str]:
    """Return the files below a folder, without manifests."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return sorted(str(path.relative_to(folder)) for path in paths)


def images_of(out: Path) -> np.ndarray:
    """Return the images of the PNG files, in order."""
    return np.stack([read_image(path) for path in sorted((out / "images").glob("*.png"))])


def stop_at(step: int) -> type[SampleRun]:
    """Return a run that raises KeyboardInterrupt in callback number `step`, counted over all batches."""

    class Stopped(SampleRun):
        def _sample_batch(self, first, size, steps, bar):
            advance = bar.advance

            def counting(*arguments):
                advance(*arguments)
                self.seen = getattr(self, "seen", 0) + 1
                if self.seen == step:
                    raise KeyboardInterrupt

            bar.advance = counting
            try:
                super()._sample_batch(first, size, steps, bar)
            finally:
                bar.advance = advance

    return Stopped


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_do_not_share_a_folder(tmp_path, overwrite):
    run_of(tmp_path / "old").run()
    for out in (tmp_path / "old", tmp_path / "new"):
        before = files(out)
        out.mkdir(exist_ok=True)
        with folder_locked(out, "sampling"):
            with pytest.raises(OutputError, match="another process is sampling"):
                run_of(out, overwrite=overwrite).run()
        assert files(out) == before
    run_of(tmp_path / "new").run()
    assert not any(".lock" in name for name in files(tmp_path))


def test_images_grid_and_npz(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    written = run_of(out).run()
    assert written == [out / "grid.png", out / "samples_5x8x8x1.npz"]
    names = [
        f"images/{i:06d}_class{c}_seed{s}.png" for i, (c, s) in enumerate(zip(CLASSES, SEEDS, strict=True))
    ]
    assert files(out) == ["grid.png", *names, "samples_5x8x8x1.npz"]
    samples = read_samples(written[1])
    assert samples.labels.tolist() == CLASSES
    assert np.array_equal(images_of(out), samples.images)
    wanted = pipeline().sample(CLASSES, SEEDS, steps=3).numpy()
    assert np.abs(samples.images.astype(int) - wanted).max() <= 1
    grid = read_image(written[0])
    # Four rows of classes, two columns, tiles of 64 pixels.
    assert grid.shape[2] == 3 and grid.shape[0] > 4 * 64 and 2 * 64 < grid.shape[1] < 3 * 64
    bar = capsys.readouterr().err
    assert "100%" in bar and "images/s" in bar


def test_images_without_classes(tmp_path):
    pipe = pipeline(net=unet(num_classes=None), classifier=None, guidance=0.0)
    grid, npz = run_of(tmp_path, pipe=pipe, classes=None).run()
    assert read_samples(npz).labels is None
    assert sorted(path.name for path in (tmp_path / "images").iterdir())[0] == "000000_seed5.png"
    assert read_image(grid).shape[1] > 3 * 64, "five images should have three columns"


@pytest.mark.parametrize("channels", [3, 4])
def test_colour(tmp_path, channels):
    net = unet(in_channels=channels, out_channels=2 * channels)
    pipe = pipeline(net=net, classifier=None, guidance=0.0)
    run_of(tmp_path, pipe=pipe).run()
    assert images_of(tmp_path).shape == (5, 8, 8, channels)


@pytest.mark.parametrize(
    "changes",
    [{"dims": 1}, {"dims": 3}, {"in_channels": 5, "out_channels": 10}, {"in_channels": 2, "out_channels": 4}],
)
def test_images_that_no_png_holds_are_refused_before_anything_is_sampled(tmp_path, changes):
    pipe = pipeline(net=unet(**changes), classifier=None, guidance=0.0)
    with pytest.raises(InvalidArgument, match="PNG files are 2-D, of 1, 3 or 4 channels"):
        run_of(tmp_path / "out", pipe=pipe)
    assert files(tmp_path) == []


def test_images_are_written_batch_by_batch(tmp_path):
    held = []

    class Watched(SampleRun):
        def _sample_batch(self, *args):
            super()._sample_batch(*args)
            held.append(len(images_of(tmp_path)))

    Watched(pipeline(), SampleRequest(CLASSES, SEEDS, steps=1, batch_size=2), tmp_path).run()
    assert held == [2, 4, 5]


def test_without_a_batch_size_the_pipeline_s_is_taken(tmp_path, monkeypatch):
    pipe, held, run = pipeline(), [], sampling.run
    monkeypatch.setattr("admfast.sampling.plan.default_batch_size", lambda *_: 3)
    monkeypatch.setattr(
        sampling, "run", lambda plan, *notes: (held.append(plan.shape[0]), run(plan, *notes))[1]
    )
    run_of(tmp_path, pipe=pipe, batch_size=None).run()
    assert held == [3, 2]


def test_long_grids_are_cut_and_wide_ones_broken(tmp_path, monkeypatch):
    def size(count: int) -> tuple[int, ...]:
        out = tmp_path / str(count)
        grid, npz = run_of(out, seeds=range(count), classes=[0] * count, steps=1).run()
        assert len(read_samples(npz).images) == count
        return read_image(grid).shape

    one, three = size(1), size(3)
    assert one[0] == three[0] and three[1] > 2 * one[1]
    monkeypatch.setattr("admfast.runs.sampling.GRID_COLUMNS", 2)
    two_wide = size(4)
    assert two_wide[0] > one[0] + 64
    assert two_wide[1] < three[1]
    monkeypatch.setattr("admfast.runs.sampling.GRID_LIMIT", 1)
    assert size(5) == one


# Intermediates and progress


def test_intermediates_of_every_so_many_steps(tmp_path):
    run_of(tmp_path, intermediates=2, steps=4).run()
    found = [name for name in files(tmp_path) if name.startswith("intermediates")]
    assert found == [f"intermediates/{i:06d}_step{step:04d}.png" for i in range(5) for step in (2, 4)]


def test_a_cascade_s_intermediates_have_names_of_their_own(tmp_path):
    run_of(tmp_path, pipe=cascade(), seeds=[1], classes=[0], intermediates=1, steps=2).run()
    found = {
        name: read_image(tmp_path / name).shape[0] for name in files(tmp_path) if name.startswith("inter")
    }
    base = {f"intermediates/000000_step{step:04d}.png": 8 for step in (1, 2)}
    up = {f"intermediates/000000_upsampler_step{step:04d}.png": 16 for step in (1, 2, 3)}
    assert found == {**base, **up}
    assert images_of(tmp_path).shape == (1, 16, 16, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 2},
        {"steps": 2, "upsampler_steps": 1},
        {"respacing": "2,1"},
        {"respacing": "ddim5", "solver": "ddim", "guidance": 0},
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_bar_ends_with_the_images(tmp_path, settings):
    seen = []

    class Counted(SampleRun):
        def _sample_batch(self, first, size, shares, bar):
            super()._sample_batch(first, size, shares, bar)
            seen.append((bar.bar.n, bar.bar.total))

    Counted(cascade(), SampleRequest([0, 1], [0, 1], **settings), tmp_path).run()
    assert seen == [(pytest.approx(2), 2)] and seen[0][0] <= 2


@pytest.mark.filterwarnings("error")
def test_nine_ninths_are_not_more_than_the_whole(tmp_path, capsys):
    """In floating point nine ninths exceed 1; the bar would warn and show a negative time."""
    run_of(tmp_path, seeds=[1], classes=[0], steps=9).run()
    assert "-00:00" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, (8, 16)])
def test_a_step_counts_by_its_pixels(tmp_path, size):
    run = run_of(tmp_path, pipe=cascade(classifier=None, guidance=0.0), steps=5, size=size)
    shares = step_shares(run.check())
    assert shares["upsampler"] == pytest.approx(4 * shares["base"])
    assert 5 * shares["base"] + 3 * shares["upsampler"] == pytest.approx(1)


def test_images_of_another_size(tmp_path):
    _, npz = run_of(tmp_path, size=(8, 16), guidance=0).run()
    assert npz.name == "samples_5x8x16x1.npz" and images_of(tmp_path).shape == (5, 8, 16, 1)
    with pytest.raises(OutputError, match="^out="):
        run_of(tmp_path, size=(16, 8), guidance=0).run()


# Existing files


def test_samples_that_are_there_are_kept_unless_told(tmp_path):
    run_of(tmp_path).run()
    before = contents(tmp_path)
    (tmp_path / MANIFEST).rename(tmp_path / "hidden")
    with pytest.raises(OutputError) as caught:
        run_of(tmp_path).run()
    assert str(caught.value) == (
        f"out={str(tmp_path)!r}: holds 7 files of samples already; give another folder, or --overwrite"
    )
    (tmp_path / "hidden").rename(tmp_path / MANIFEST)
    with pytest.raises(OutputError) as caught:
        run_of(tmp_path, steps=2, guidance=0.5).run()
    assert str(caught.value) == (
        f"out={str(tmp_path)!r}: holds images of another request (steps=3, not 2; guidance=1.0, not 0.5); "
        "give another folder, or --overwrite"
    )
    assert contents(tmp_path) == before
    run_of(tmp_path, overwrite=True, seeds=[1], classes=[3]).run()
    assert files(tmp_path) == ["grid.png", "images/000000_class3_seed1.png", "samples_1x8x8x1.npz"]


def test_overwriting_leaves_other_files_and_removes_intermediates(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run_of(tmp_path, intermediates=1).run()
    run_of(tmp_path, overwrite=True, seeds=[1], classes=[3]).run()
    assert files(tmp_path)[-2:] == ["notes.txt", "samples_1x8x8x1.npz"] and len(files(tmp_path)) == 4


@pytest.mark.parametrize("settings", [{"steps": 0}, {"solver": "ddin"}, {"guidance": float("nan")}])
def test_a_run_that_cannot_begin_removes_nothing(tmp_path, settings):
    run_of(tmp_path).run()
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(InvalidArgument):
        run_of(tmp_path, overwrite=True, **settings).run()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_folders_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out, folder in (("file", "file"), ("file/below", "file")):
        with pytest.raises(OutputError, match=f"{folder}: not written: it is a file"):
            run_of(tmp_path / out).run()
    (tmp_path / "images").write_text("")
    with pytest.raises(OutputError, match="images: not written: it is a file"):
        run_of(tmp_path).run()


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in files(out)}


def test_files_of_others_are_left_alone(tmp_path):
    mine = ["images/photo.png", "intermediates/notes.png", "samples_mine.npz", "images/000001_class2.png"]
    run_of(tmp_path, intermediates=1).run()
    for name in mine:
        (tmp_path / name).write_text("mine")
    run_of(tmp_path, overwrite=True, seeds=[1], classes=[3]).run()
    assert set(mine) < set(files(tmp_path)) and len(files(tmp_path)) == len(mine) + 3
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "images" / "photo.png").write_text("mine")
    run_of(other, seeds=[1], classes=[3]).run()
    assert (other / "images" / "photo.png").read_text() == "mine"


def failing(monkeypatch, name: str, at: int) -> None:
    """Make call number `at` of one of the run's writers fail with a full disk."""
    own, calls = getattr(sampling, name), []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) == at:
            raise OutputError(f"{path}: not written: the disk is full")
        own(path, *arguments)

    monkeypatch.setattr(sampling, name, full)


@pytest.mark.parametrize(
    "writer, at, kept",
    [("write_png", 1, 0), ("write_png", 4, 3), ("write_streamed", 1, 5), ("write_grid", 1, 5)],
)
def test_a_full_disk_leaves_the_old_samples_and_what_is_finished(tmp_path, monkeypatch, writer, at, kept):
    run_of(tmp_path).run()
    before = contents(tmp_path)
    failing(monkeypatch, writer, at)
    run = run_of(tmp_path, overwrite=True, seeds=[11, 12, 13, 14, 15])
    with pytest.raises(OutputError, match="the disk is full"):
        run.run()
    assert {name: data for name, data in contents(tmp_path).items() if "unfinished" not in name} == before
    if not kept:
        assert not (tmp_path / "unfinished").exists()
        return
    assert (run.written_folder, run.finished) == (tmp_path / "unfinished", kept)
    assert len(images_of(run.written_folder)) == kept
    whole = {"grid.png": "write_grid", f"samples_{kept}x8x8x1.npz": "write_streamed"}
    for name, by in whole.items():
        assert (run.written_folder / name).exists() == (by != writer)


def test_ctrl_c_while_overwriting_keeps_the_old_and_what_is_finished(tmp_path):
    run_of(tmp_path).run()
    before = contents(tmp_path)
    for place in ("unfinished", "unfinished-2"):
        run = stop_at(6)(pipeline(), REQUEST, tmp_path, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            run.run()
        assert run.written_folder == tmp_path / place
        assert len(read_samples(tmp_path / place / "samples_2x8x8x1.npz").images) == 2
        assert len(images_of(run.written_folder)) == 2
    assert {name: data for name, data in contents(tmp_path).items() if "unfinished" not in name} == before


def test_ctrl_c_does_not_stop_the_replacing_halfway(tmp_path, monkeypatch):
    run_of(tmp_path).run()
    own = os.replace

    def interrupted(source, target):
        if "unfinished" in str(source) and Path(target).parent != Path(source).parent:
            os.kill(os.getpid(), signal.SIGINT)
        own(source, target)

    monkeypatch.setattr("admfast.runs.folder.os.replace", interrupted)
    run = run_of(tmp_path, overwrite=True, seeds=[1], classes=[3])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert files(tmp_path) == ["grid.png", "images/000000_class3_seed1.png", "samples_1x8x8x1.npz"]
    assert run.written_folder == tmp_path and not (tmp_path / "unfinished").exists()


def test_images_beyond_the_grid_are_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.runs.sampling.GRID_LIMIT", 2)
    run = run_of(tmp_path)
    _, npz = run.run()
    assert len(run._grid_images) == 2
    assert np.array_equal(read_samples(npz).images, images_of(tmp_path)) and len(images_of(tmp_path)) == 5


# Stopped early


@pytest.mark.parametrize("step, finished", [(1, 0), (3, 0), (4, 2), (6, 2), (8, 4)])
def test_ctrl_c_leaves_the_finished_images_with_grid_and_npz(tmp_path, step, finished):
    run = stop_at(step)(pipeline(), REQUEST, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    if not finished:
        assert files(tmp_path) == []
        return
    samples = read_samples(tmp_path / f"samples_{finished}x8x8x1.npz")
    assert samples.labels.tolist() == CLASSES[:finished]
    assert np.array_equal(images_of(tmp_path), samples.images)
    assert read_image(tmp_path / "grid.png").shape[0] > finished * 64


def test_ctrl_c_while_overwriting_before_the_first_image_keeps_the_old(tmp_path):
    run_of(tmp_path).run()
    before = files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stop_at(2)(pipeline(), REQUEST, tmp_path, overwrite=True).run()
    assert files(tmp_path) == before


def test_nan_in_a_later_batch_leaves_the_finished_images(tmp_path):
    pipe = pipeline()
    calls = []

    def hook(module, args, kwargs):
        calls.append(None)
        if len(calls) == 3:  # the last call of the first batch; the second batch notices changed weights
            with torch.no_grad():
                module.out[2].bias.fill_(float("nan"))

    pipe.net.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(NonFiniteError, match=r"is net.out.2 \(Conv2d\)"):
        run_of(tmp_path, pipe=pipe).run()
    assert read_samples(tmp_path / "samples_2x8x8x1.npz").labels.tolist() == [0, 1]
    assert torch.isfinite(pipe.net.out[2].weight).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"intermediates": -1}, "intermediates=-1: 0 for none, or every so many steps"),
        ({"batch_size": 0}, "^batch_size=0: "),
        ({"classes": [0, 9]}, "^classes=9: "),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    with pytest.raises(InvalidArgument, match=message):
        run_of(tmp_path, **changes)


@pytest.mark.parametrize("name, value", [("output", "float"), ("callback", print)])
def test_a_run_refuses_what_it_can_not_do(tmp_path, name, value):
    with pytest.raises(InvalidArgument, match=f"^request=.*{name}"):
        run_of(tmp_path / "out", **{name: value})


@pytest.mark.parametrize("name", ["noise", "step_noise"])
def test_given_noise_is_shared_out_to_the_batches(tmp_path, name):
    noise = torch.randn(*([3] if name == "step_noise" else []), 5, 1, 8, 8)
    run_of(tmp_path / "out", **{name: noise}).run()
    wanted = pipeline().sample(CLASSES, SEEDS, steps=3, **{name: noise})
    # Batches of another size round differently, which sometimes moves a value to the next level.
    assert np.abs(images_of(tmp_path / "out").astype(int) - wanted.numpy().astype(int)).max() <= 1
