"""Tests of runs in shards, in one process: files, going on, other requests, and failures in the middle."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument, NonFiniteError, OutputError
from admfast.files.npz import read_samples
from admfast.interrupts import signals_as_keyboard_interrupt
from admfast.runs import shards
from admfast.runs.leases import Leases
from admfast.runs.manifest import MANIFEST, RANDOM, random_labels, read_manifest
from admfast.runs.many import ShardedRun
from admfast.runs.shards import ShardFiles
from admfast.sampling.request import SampleRequest
from tests.small import cascade, pipeline, unet

NUM, BATCH, SHARD = 22, 3, 6  # four shards, the last of a batch and one image


def run_of(out: Path, **changes) -> ShardedRun:
    """Return a run of NUM images. `changes` are fields of ShardedRun or SampleRequest."""
    own = {entry.name for entry in dataclasses.fields(ShardedRun)}
    settings = {"batch_size": BATCH, "steps": 2, "guidance": 0.0}
    settings |= {name: value for name, value in changes.items() if name not in own}
    parts = {"pipe": pipeline(), "num": NUM, "shard_size": SHARD, "poll": 0.01}
    parts |= {name: value for name, value in changes.items() if name in own}
    return ShardedRun(request=SampleRequest(**settings), out=out, **parts)


def work(out: Path, **changes) -> ShardedRun:
    run = run_of(out, **changes)
    run.check()
    run.run()
    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def images_of(out: Path) -> np.ndarray:
    """Return the images of all shards; the seeds are checked to be all, each once."""
    found = [np.load(path) for path in sorted((out / "shards").glob("*.npz"))]
    seeds = np.concatenate([shard["seeds"] for shard in found])
    first = int(read_manifest(out).seeds.split("-")[0])
    assert seeds.dtype == np.uint64 and seeds.tolist() == list(range(first, first + len(seeds)))
    return np.concatenate([shard["arr_0"] for shard in found])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> np.ndarray:
    """Return the images of a run without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    work(out)
    return images_of(out)


def stop_after(batches: int) -> type[ShardedRun]:
    """Return a run that raises KeyboardInterrupt in the middle of the batch after so many."""

    class Stopped(ShardedRun):
        seen = 0

        def _advance(self, progress):
            super()._advance(progress)
            self.seen += 1
            if self.seen == 2 * batches + 1:
                raise KeyboardInterrupt

    return Stopped


def stopped(out: Path, batches: int, **changes) -> ShardedRun:
    """Work on a run, and stop in the middle of the batch after so many."""
    template = run_of(out, **changes)
    values = {entry.name: getattr(template, entry.name) for entry in dataclasses.fields(template)}
    run = stop_after(batches)(**values)
    run.check()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    return run


def test_the_files_and_images_of_a_run(tmp_path, whole):
    run = work(tmp_path / "run")
    assert files(tmp_path / "run") == [MANIFEST, *(f"shards/shard-{i:06d}.npz" for i in range(4))]
    assert run.made == NUM and np.array_equal(images_of(tmp_path / "run"), whole)
    labels = [read_samples(path).labels for path in sorted((tmp_path / "run" / "shards").iterdir())]
    assert np.concatenate(labels).tolist() == [seed % 4 for seed in range(NUM)]
    one_by_one = pipeline().sample(seeds=range(NUM), steps=2, guidance=0).numpy()
    assert np.abs(whole.astype(int) - one_by_one).max() <= 1
    again = work(tmp_path / "run")
    assert again.made == 0


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 7])
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, whole, batches):
    first = stopped(tmp_path, batches)
    images = sum(min(BATCH, len(part)) for i in range(4) for part in first.manifest.batches(i)[:2]) or 0
    assert first.made == min(BATCH * batches, images) and first.finished_images() == first.made
    assert not list((tmp_path / "leases").iterdir()), "the lease is released, so that others go on"
    second = work(tmp_path)
    assert second.made == NUM - first.made, "at most the open batch was lost"
    assert np.array_equal(images_of(tmp_path), whole)
    assert {name.split("/")[0] for name in files(tmp_path)} == {MANIFEST, "shards"}


class SignalWhileTaking(Leases):
    """Leases that get a SIGTERM in the middle of the making of the first."""

    def acquire(self, name, report=dict):
        return super().acquire(name, lambda: signal.raise_signal(signal.SIGTERM) or report())


def test_no_lease_is_left_by_a_signal_while_it_is_taken(tmp_path):
    run = run_of(tmp_path, leases=SignalWhileTaking(tmp_path / "leases"))
    run.check()
    with pytest.raises(KeyboardInterrupt), signals_as_keyboard_interrupt():
        run.run()
    assert not list((tmp_path / "leases").iterdir())


def test_a_killed_process_s_leftovers_are_overwritten_and_removed(tmp_path, whole):
    stopped(tmp_path, 1)
    (tmp_path / "shards").mkdir()
    leftovers = [
        tmp_path / "parts" / "shard-000000" / ".batch-000001.npy.77-aa.tmp",
        tmp_path / "shards" / ".shard-000000.npz.77-aa.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    work(tmp_path)
    assert np.array_equal(images_of(tmp_path), whole) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None], ids=["empty", "cut", "other shape"])
def test_a_damaged_batch_is_made_again(tmp_path, whole, damage):
    stopped(tmp_path, 1)
    (part,) = tmp_path.glob("parts/*/*.npy")
    if damage is None:
        np.save(part, np.zeros((2, 8, 8, 1), np.uint8))
    else:
        part.write_bytes(damage)
    run = work(tmp_path)
    assert run.made == NUM and np.array_equal(images_of(tmp_path), whole)


def test_a_shard_that_was_written_before_the_kill_is_not_made_again(tmp_path, whole):
    """A process may be killed after it wrote a shard, before it removed the batches."""
    work(tmp_path)
    files_of_run = ShardFiles(tmp_path, read_manifest(tmp_path))
    files_of_run.write_part(1, 0, whole[6:9])
    (tmp_path / "leases").mkdir()
    run = work(tmp_path)
    assert run.made == 0 and not (tmp_path / "parts").exists()
    assert np.array_equal(images_of(tmp_path), whole)


def test_a_guided_run_and_a_cascade(tmp_path):
    run = work(tmp_path / "guided", guidance=1.0, num=4)
    assert set(run.manifest.weights) == {"net", "classifier"}
    up = work(tmp_path / "up", pipe=cascade(), num=4)
    assert up.manifest.shape == [16, 16, 1] and images_of(tmp_path / "up").shape == (4, 16, 16, 1)
    assert up.manifest.request["upsampler_steps"] == 3 and set(up.manifest.weights) == {"net", "upsampler"}


def test_seeds_begin_where_they_are_told_and_classes_are_as_told(tmp_path):
    work(tmp_path / "random", num=7, first_seed=100, classes=RANDOM)
    labels = [read_samples(path).labels for path in sorted((tmp_path / "random/shards").iterdir())]
    assert np.concatenate(labels).tolist() == random_labels(range(100, 107), 4)
    made = images_of(tmp_path / "random")
    wanted = pipeline().sample(random_labels(range(100, 107), 4), range(100, 107), steps=2, guidance=0)
    assert np.abs(made.astype(int) - wanted.numpy()).max() <= 1
    work(tmp_path / "listed", num=7, classes=[3, 1])
    labels = [read_samples(path).labels for path in sorted((tmp_path / "listed/shards").iterdir())]
    assert np.concatenate(labels).tolist() == [3, 1, 3, 1, 3, 1, 3]
    free = pipeline(net=unet(num_classes=None), classifier=None)
    work(tmp_path / "free", pipe=free, num=3)
    assert read_samples(tmp_path / "free/shards/shard-000000.npz").labels is None


# What a run refuses


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"steps": 3}, "steps=2, not 3"),
        ({"solver": "ddim"}, "solver='ddpm', not 'ddim:eta=0.0'"),
        ({"num": 23}, "images=22, not 23; seeds='0-21', not '0-22'"),
        ({"first_seed": 5}, "seeds='0-21', not '5-26'"),
        ({"classes": RANDOM}, "classes='balanced', not 'random'"),
        ({"classes": [1, 2]}, r"classes='balanced', not \[1, 2\]"),
        ({"batch_size": 2}, "batch_size=3, not 2"),
        ({"shard_size": 3}, "shard_size=6, not 3"),
        ({"guidance": 1.0}, "guidance=0.0, not 1.0; weights.classifier=None"),
        ({"clip": False}, "clip=True, not False"),
        ({"size": 16}, r"shape=\[8, 8, 1\], not \[16, 16, 1\]; size="),
    ],
    ids=str,
)
def test_another_request_is_refused_with_the_difference(tmp_path, changes, difference):
    stopped(tmp_path, 1)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(OutputError, match=difference) as caught:
        run_of(tmp_path, **changes).check()
    assert str(caught.value).count("\n") == 0 and "another folder" in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_other_weights_are_refused_also_of_a_single_value(tmp_path):
    work(tmp_path, num=2)
    pipe = pipeline()
    with torch.no_grad():
        pipe.net.out[2].bias[0] += 2**-20
    with pytest.raises(OutputError, match="weights.net='.*', not '.*'"):
        run_of(tmp_path, num=2, pipe=pipe).check()


def test_settings_that_are_given_or_left_out_are_the_same(tmp_path):
    pipe = pipeline()
    work(tmp_path, num=2, steps=None, guidance=None)
    run_of(tmp_path, num=2, pipe=pipe, steps=4, guidance=1.0, size="8x8", solver="ddpm").check()
    run = run_of(tmp_path, num=2, pipe=pipe, steps=None, guidance=None, batch_size=None, shard_size=None)
    run.check()
    assert (run.manifest.batch_size, run.manifest.shard_size) == (BATCH, SHARD), "those of the folder's run"


@pytest.mark.parametrize(
    "num, batch, shard",
    [(50_000, 64, 256), (50_000, 32, 256), (10**7, 32, 1024), (10**7, 7, 1001), (10**7, 3000, 3000)]
    + [(9, 4, 4), (200, 1, 1), (201, 1, 2)],
)
def test_the_default_shard_is_a_part_of_the_run_and_not_too_large(tmp_path, num, batch, shard):
    run = run_of(tmp_path, num=num, batch_size=batch, shard_size=None)
    run.check()
    assert run.manifest.shard_size == shard


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num": 0}, "^num=0: "),
        ({"shard_size": 0}, "^shard=0: "),
        ({"shard_size": 4}, "^shard=4: a multiple of the batch size, 3"),
        ({"classes": [0, 4]}, "^classes=4: "),
        ({"first_seed": 2**64 - NUM + 1}, "^seeds="),
        ({"steps": 1001}, "^steps=1001: "),
        ({"num": 10**12}, "^num=1000000000000: "),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(InvalidArgument, match=message):
        run_of(tmp_path / "out", **changes).check()
    assert files(tmp_path) == []


def test_folders_of_other_things_are_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="training run"):
        run_of(tmp_path).check()
    (tmp_path / "run.json").unlink()
    (tmp_path / "grid.png").write_text("")
    with pytest.raises(OutputError, match="1 files of samples without a manifest"):
        run_of(tmp_path).check()


# Failures in the middle


def test_nan_is_one_error_and_the_finished_batches_stay(tmp_path, whole):
    pipe, calls = pipeline(), []

    def hook(module, args, kwargs):
        calls.append(None)
        if len(calls) == 4:
            with torch.no_grad():
                module.out[2].bias.fill_(float("nan"))

    pipe.net.register_forward_pre_hook(hook, with_kwargs=True)
    run = run_of(tmp_path, pipe=pipe)
    run.check()
    with pytest.raises(NonFiniteError, match="net.out.2"):
        run.run()
    assert run.finished_images() == 2 * BATCH and not list((tmp_path / "leases").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["batch-000001", "shard-000001", "batch-000000"])
def test_a_disk_that_fails_in_the_middle_loses_nothing(tmp_path, whole, monkeypatch, number, name):
    """The file system fails at every new file from one on: it is full, or was made read-only."""
    own, failing = os.open, []

    def fail(path, flags, *arguments):
        if flags & os.O_CREAT and (failing or name in str(path)):
            failing.append(path)
            raise OSError(number, os.strerror(number), str(path))
        return own(path, flags, *arguments)

    run = run_of(tmp_path)
    run.check()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(OutputError, match=f"{name}.*: not written: ") as caught:
            run.run()
    assert str(caught.value).count("\n") == 0
    assert run.finished_images() == run.made
    second = work(tmp_path)
    assert second.made == NUM - run.made and np.array_equal(images_of(tmp_path), whole)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "leases").exists()


# Several processes


def test_shards_beyond_the_run_do_not_count(tmp_path, whole):
    work(tmp_path)
    shards = tmp_path / "shards"
    (shards / "shard-000001.npz").rename(shards / "shard-000099.npz")
    assert ShardFiles(tmp_path, read_manifest(tmp_path)).finished_images() < NUM
    (tmp_path / "parts" / "shard-000098").mkdir(parents=True)
    work(tmp_path)
    (shards / "shard-000099.npz").unlink()
    assert np.array_equal(images_of(tmp_path), whole)


def test_processes_begin_at_different_shards(tmp_path):
    taken = []

    class Watched(ShardedRun):
        def _take(self, shard):
            taken.append(shard)
            return super()._take(shard)

    for rank in range(4):
        template = run_of(tmp_path / str(rank), rank=rank, processes=4)
        run = Watched(**{e.name: getattr(template, e.name) for e in dataclasses.fields(template)})
        run.check()
        run.run()
        assert taken == [rank, (rank + 1) % 4, (rank + 2) % 4, (rank + 3) % 4]
        taken.clear()


def foreign_lease(out: Path, shard: int) -> Path:
    """Write a lease of a shard as a process of another machine does."""
    (out / "leases").mkdir(parents=True, exist_ok=True)
    path = out / "leases" / f"shard-{shard:06d}.0"
    path.write_text(json.dumps({"machine": "other", "host": "far", "pid": 1, "locked": True, "count": 5}))
    return path


def test_the_shard_of_a_dead_machine_is_made_by_one_that_still_runs(tmp_path, whole):
    """All other shards come first; then the process waits until the lease has not changed for long enough."""
    foreign_lease(tmp_path, 1)
    run = run_of(tmp_path, leases=Leases(tmp_path / "leases", lifetime=0.5))
    run.check()
    run.run()
    assert run.made == NUM and np.array_equal(images_of(tmp_path), whole)


def test_a_process_whose_shard_was_taken_over_goes_on_with_others(tmp_path, whole):
    """As after a suspension: its successor finishes the shard, and nothing is there twice."""

    class Suspended(ShardedRun):
        def _make_batch(self, shard, number, images):
            super()._make_batch(shard, number, images)
            if shard == 0 and number == 0:
                # Another process took the lease over and finished the shard meanwhile.
                other = work(tmp_path / "elsewhere")
                (tmp_path / "run" / "shards").mkdir()
                source = other.files.path(0)
                source.rename(self.files.path(0))
                self.files.remove_parts(0)

    template = run_of(tmp_path / "run")
    run = Suspended(**{e.name: getattr(template, e.name) for e in dataclasses.fields(template)})
    run.check()
    run.run()
    assert run.made == NUM - SHARD + BATCH and np.array_equal(images_of(tmp_path / "run"), whole)
    assert not (tmp_path / "run" / "parts").exists()


def test_a_write_that_fails_because_the_shard_was_taken_over_is_no_error(tmp_path, whole, monkeypatch):
    own = shards.write_bytes

    def lose(path, data):
        if "batch-000001" in str(path) and "shard-000000" in str(path):
            (tmp_path / "leases" / "shard-000000.1").write_text("{}")
            monkeypatch.undo()
            raise OutputError(f"{path}: not written: the folder is gone")
        own(path, data)

    monkeypatch.setattr(shards, "write_bytes", lose)
    run = run_of(tmp_path, leases=Leases(tmp_path / "leases", lifetime=0.3))
    run.check()
    run.run()
    assert np.array_equal(images_of(tmp_path), whole)


def test_without_sizes_the_pipeline_s_batch_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.sampling.plan.default_batch_size", lambda *_: 5)
    run = run_of(tmp_path, batch_size=None, shard_size=None)
    run.check()
    assert (run.manifest.batch_size, run.manifest.shard_size) == (5, 5)
