"""A run of many images into a folder: what is written, when, and what is left when it stops early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument, NonFiniteError, OutputError
from admfast.files.images import read_image
from admfast.files.npz import read_samples
from admfast.runs.sampling import SampleRun
from tests.small import cascade, pipeline, unet

SEEDS, CLASSES = [5, 6, 7, 8, 9], [0, 1, 2, 3, 0]


def run_of(out: Path, **changes) -> SampleRun:
    settings = {"pipe": pipeline(), "classes": CLASSES, "seeds": SEEDS, "out": out, "batch_size": 2}
    return SampleRun(**{**settings, "settings": {"steps": 3}, **changes})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def images_of(out: Path) -> np.ndarray:
    """The PNG files, in order."""
    return np.stack([read_image(path) for path in sorted((out / "images").glob("*.png"))])


def stop_at(step: int) -> type[SampleRun]:
    """A run that Ctrl-C reaches in that callback, counted over all batches."""

    class Stopped(SampleRun):
        def _batch(self, first, size, steps, bar):
            update = bar.update

            def counting(n):
                update(n)
                self.seen = getattr(self, "seen", 0) + 1
                if self.seen == step:
                    raise KeyboardInterrupt

            bar.update = counting
            try:
                super()._batch(first, size, steps, bar)
            finally:
                bar.update = update

    return Stopped


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
    assert read_image(grid).shape[1] > 3 * 64, "five images: three columns"


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
        def _batch(self, *args):
            super()._batch(*args)
            held.append(len(images_of(tmp_path)))

    Watched(pipeline(), CLASSES, SEEDS, tmp_path, {"steps": 1}, batch_size=2).run()
    assert held == [2, 4, 5]


def test_without_a_batch_size_the_pipeline_s_is_taken(tmp_path, monkeypatch):
    pipe, held = pipeline(), []
    sample = pipe.sample
    monkeypatch.setattr(type(pipe), "images_at_a_time", 3)
    monkeypatch.setattr(
        pipe,
        "sample",
        lambda classes, seeds, **options: (held.append(len(seeds)), sample(classes, seeds, **options))[1],
    )
    run_of(tmp_path, pipe=pipe, batch_size=None).run()
    assert held == [3, 2]


def test_long_grids_are_cut_and_wide_ones_broken(tmp_path, monkeypatch):
    def size(count: int) -> tuple[int, ...]:
        out = tmp_path / str(count)
        grid, npz = run_of(out, seeds=range(count), classes=[0] * count, settings={"steps": 1}).run()
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
    run_of(tmp_path, intermediates=2, settings={"steps": 4}).run()
    found = [name for name in files(tmp_path) if name.startswith("intermediates")]
    assert found == [f"intermediates/{i:06d}_step{step:04d}.png" for i in range(5) for step in (2, 4)]


def test_a_cascade_s_intermediates_have_names_of_their_own(tmp_path):
    run_of(tmp_path, pipe=cascade(), seeds=[1], classes=[0], intermediates=1, settings={"steps": 2}).run()
    found = {
        name: read_image(tmp_path / name).shape[0] for name in files(tmp_path) if name.startswith("inter")
    }
    base = {f"intermediates/000000_step{step:04d}.png": 8 for step in (1, 2)}
    up = {f"intermediates/000000_upsampler_step{step:04d}.png": 16 for step in (1, 2, 3)}
    assert found == {**base, **up}
    assert images_of(tmp_path).shape == (1, 16, 16, 1)


@pytest.mark.parametrize(
    "settings, rows",
    [
        ({}, 4 + 3),
        ({"steps": 2}, 2 + 3),
        ({"steps": 2, "upsampler_steps": 1}, 2 + 1),
        ({"respacing": "2,1"}, 3 + 3),
        ({"respacing": "ddim5", "solver": "ddim"}, 5 + 3),
    ],
)
def test_the_bar_counts_the_steps_that_are_run(tmp_path, settings, rows):
    seen = []

    class Counted(SampleRun):
        def _batch(self, first, size, steps, bar):
            super()._batch(first, size, steps, bar)
            seen.append((bar.n, bar.total))

    Counted(cascade(), [0, 1], [0, 1], tmp_path, settings).run()
    assert seen == [(2 * rows, 2 * rows)]


# What was there before


def test_samples_that_are_there_are_kept_unless_told(tmp_path):
    run_of(tmp_path).run()
    before = files(tmp_path)
    with pytest.raises(OutputError) as caught:
        run_of(tmp_path).run()
    assert str(caught.value) == (
        f"out={str(tmp_path)!r}: holds 7 files of samples already; give another folder, or --overwrite"
    )
    assert files(tmp_path) == before
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
        run_of(tmp_path, overwrite=True, settings=settings).run()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_folders_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out, folder in (("file", "file"), ("file/below", "file/below")):
        with pytest.raises(OutputError, match=f"{out}/images: not written: .*/{folder} is not a folder"):
            run_of(tmp_path / out).run()
    (tmp_path / "images").write_text("")
    with pytest.raises(OutputError, match="images: not written: File exists"):
        run_of(tmp_path).run()


# Stopped early


@pytest.mark.parametrize("step, finished", [(1, 0), (3, 0), (4, 2), (6, 2), (8, 4)])
def test_ctrl_c_leaves_the_finished_images_with_grid_and_npz(tmp_path, step, finished):
    run = stop_at(step)(pipeline(), CLASSES, SEEDS, tmp_path, {"steps": 3}, batch_size=2)
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
        stop_at(2)(pipeline(), CLASSES, SEEDS, tmp_path, {"steps": 3}, 2, overwrite=True).run()
    assert files(tmp_path) == before


def test_nan_in_a_later_batch_leaves_the_finished_images(tmp_path):
    pipe = pipeline()
    calls = []

    def hook(module, args, kwargs):
        calls.append(None)
        if len(calls) == 5:
            module.out[2].bias.data.fill_(float("nan"))

    pipe.net.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(NonFiniteError, match=r"is net.out.2 \(Conv2d\)"):
        run_of(tmp_path, pipe=pipe).run()
    assert read_samples(tmp_path / "samples_2x8x8x1.npz").labels.tolist() == [0, 1]
    assert torch.isfinite(pipe.net.out[2].weight).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"intermediates": -1}, "intermediates=-1: 0 for none, or every so many steps"),
        ({"batch_size": 0}, "batch_size=0: 1 or more"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    with pytest.raises(InvalidArgument, match=message):
        run_of(tmp_path, **changes)
