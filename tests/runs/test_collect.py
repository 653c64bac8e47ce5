"""Tests of a run's status, and of its images as one npz, as PNG files and as tar files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from admfast.errors import InvalidArgument, OutputError
from admfast.files.image_files import sample_name
from admfast.files.images import read_image, write_png
from admfast.files.npz import read_samples
from admfast.runs.collect import FinishedRun, export_png, export_webdataset, merge
from admfast.runs.leases import Leases
from admfast.runs.manifest import MANIFEST, Manifest, create_manifest
from admfast.runs.shards import LEASES, ShardFiles, shard_name
from admfast.runs.status import run_status

ROOT = Path(__file__).resolve().parents[2]
ONE = Manifest(
    files="npz", images=11, seeds="5-15", classes="balanced", num_classes=4, shape=[4, 6, 1], batch_size=2,
    shard_size=4, model="small", weights={"net": "aa"}, precision="float32", process={}, request={"steps": 3},
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 1), dtype=np.uint8)
LABELS = [seed % 4 for seed in range(5, 16)]


def make(folder: Path, manifest: Manifest = ONE, shards: int = 3, images: np.ndarray = IMAGES) -> ShardFiles:
    """Write a run with its first shards finished."""
    folder.mkdir(exist_ok=True)
    create_manifest(folder, manifest)
    files = ShardFiles(folder, manifest)
    for shard in range(shards):
        for number, batch in enumerate(manifest.batches(shard)):
            files.write_part(shard, number, images[batch.start : batch.stop])
        assert files.finish(shard)
    return files


def make_pngs(folder: Path) -> None:
    """Write the same images as a run of PNG files."""
    (folder / "images").mkdir(parents=True)
    create_manifest(folder, replace(ONE, files="png", shard_size=11))
    for i, (label, image) in enumerate(zip(LABELS, IMAGES, strict=True)):
        write_png(folder / "images" / sample_name(i, label, 5 + i), image)


@pytest.mark.parametrize("make_run", [make, make_pngs], ids=["npz", "png"])
def test_all_images_in_one_npz(tmp_path, make_run):
    make_run(tmp_path / "run")
    counted = []
    merge(FinishedRun(tmp_path / "run", counted.append), tmp_path / "new" / "all.npz")
    samples = read_samples(tmp_path / "new" / "all.npz")
    assert np.array_equal(samples.images, IMAGES) and samples.labels.tolist() == LABELS
    with np.load(tmp_path / "new" / "all.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"], "no more than the published file has"
    assert sum(counted) == 11
    with pytest.raises(OutputError, match="exists already"):
        merge(FinishedRun(tmp_path / "run"), tmp_path / "new" / "all.npz")
    merge(FinishedRun(tmp_path / "run"), tmp_path / "new" / "all.npz", overwrite=True)


def test_without_classes_there_are_no_labels(tmp_path):
    make(tmp_path / "run", replace(ONE, classes=None, num_classes=None))
    merge(FinishedRun(tmp_path / "run"), tmp_path / "all.npz")
    assert read_samples(tmp_path / "all.npz").labels is None
    export_webdataset(FinishedRun(tmp_path / "run"), tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "shard-000000.tar") as archive:
        assert archive.getnames()[:4] == [f"{i:09d}.{end}" for i in (0, 1) for end in ("png", "json")]


@pytest.mark.parametrize("make_run", [make, make_pngs], ids=["npz", "png"])
def test_png_files(tmp_path, make_run):
    make_run(tmp_path / "run")
    out = tmp_path / "new" / "images"
    export_png(FinishedRun(tmp_path / "run"), out)
    names = [f"{i:06d}_class{LABELS[i]}_seed{5 + i}.png" for i in range(11)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert np.array_equal(np.stack([read_image(out / name) for name in names]), IMAGES)
    with pytest.raises(OutputError, match="exists already"):
        export_png(FinishedRun(tmp_path / "run"), out)
    others = ["000011_class0_seed16.png", "000003_class0_seed77.png"]  # of another run
    for name in (*others, "mine.png"):
        write_png(out / name, IMAGES[0])
    export_png(FinishedRun(tmp_path / "run"), out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [*names, "mine.png"]


@pytest.mark.parametrize("make_run", [make, make_pngs], ids=["npz", "png"])
def test_tar_files_as_webdataset_reads_them(tmp_path, make_run):
    make_run(tmp_path / "run")
    for out in ("a", "b"):
        export_webdataset(FinishedRun(tmp_path / "run"), tmp_path / out)
    tars = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in tars] == [f"shard-{i:06d}.tar" for i in range(3 if make_run is make else 1)]
    members = {}
    for path in tars:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        with tarfile.open(path) as archive:
            for entry in archive:
                key, _, ending = entry.name.partition(".")
                members.setdefault(key, {})[ending] = archive.extractfile(entry).read()
    assert list(members) == [f"{i:09d}" for i in range(11)]
    for i, member in enumerate(members.values()):
        (tmp_path / "one.png").write_bytes(member["png"])
        assert np.array_equal(read_image(tmp_path / "one.png"), IMAGES[i])
        assert int(member["cls"]) == LABELS[i]
        assert json.loads(member["json"]) == {"seed": 5 + i, "class": LABELS[i]}
    with pytest.raises(OutputError, match="exists already"):
        export_webdataset(FinishedRun(tmp_path / "run"), tmp_path / "a")
    (tmp_path / "c").mkdir()
    for folder in ("a", "c"):
        (tmp_path / folder / "shard-000007.tar").touch()  # of a larger run
    with pytest.raises(OutputError, match="exists already"):
        export_webdataset(FinishedRun(tmp_path / "run"), tmp_path / "c")
    assert (tmp_path / "c" / "shard-000007.tar").exists()
    export_webdataset(FinishedRun(tmp_path / "run"), tmp_path / "a", overwrite=True)
    assert sorted((tmp_path / "a").iterdir()) == tars


@pytest.mark.parametrize("collect", [merge, export_png, export_webdataset])
def test_a_run_that_is_not_finished_is_refused(tmp_path, collect):
    make(tmp_path / "run", shards=2)
    with pytest.raises(InvalidArgument, match="^run=.*1 of 3 shards are missing"):
        collect(FinishedRun(tmp_path / "run"), tmp_path / "out")
    make_pngs(tmp_path / "pngs")
    (tmp_path / "pngs" / "images" / "000010_class3_seed15.png").unlink()
    with pytest.raises(InvalidArgument, match="^run=.*000010_class3_seed15.png is missing"):
        collect(FinishedRun(tmp_path / "pngs"), tmp_path / "out")
    assert not (tmp_path / "out").is_file() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("place", [".", "shards/shard-000000.npz", "parts/x.npz", "images/x.npz"])
@pytest.mark.parametrize("collect", [merge, export_png, export_webdataset])
def test_the_files_of_the_run_are_not_written_over(tmp_path, collect, place):
    make(tmp_path / "run")
    before = (tmp_path / "run" / "shards" / "shard-000000.npz").read_bytes()
    with pytest.raises(InvalidArgument, match="^out="):
        collect(FinishedRun(tmp_path / "run"), tmp_path / "run" / place, overwrite=True)
    assert (tmp_path / "run" / "shards" / "shard-000000.npz").read_bytes() == before


def test_damaged_and_exchanged_shards_are_named(tmp_path):
    files = make(tmp_path / "run")
    path, data = files.path(1), files.path(1).read_bytes()
    path.write_bytes(files.path(0).read_bytes())
    with pytest.raises(InvalidArgument, match="shard-000001.npz.*seeds that the manifest names"):
        merge(FinishedRun(tmp_path / "run"), tmp_path / "all.npz")
    for change in (data[: len(data) // 2], b""):
        path.write_bytes(change)
        with pytest.raises(InvalidArgument, match="shard-000001.npz"):
            merge(FinishedRun(tmp_path / "run"), tmp_path / "all.npz")
    pixels = data.index(IMAGES[4].tobytes())
    path.write_bytes(data[:pixels] + bytes([data[pixels] ^ 1]) + data[pixels + 1 :])
    with pytest.raises(InvalidArgument, match="shard-000001.npz.*CRC.*remove it"):
        merge(FinishedRun(tmp_path / "run"), tmp_path / "all.npz")
    assert not (tmp_path / "all.npz").exists() and not list(tmp_path.glob(".*"))


# Status


def test_the_status_of_a_run(tmp_path):
    files = make(tmp_path, shards=1)
    status = run_status(tmp_path)
    assert (status.finished_images, status.finished_shards, status.open_shards) == (4, 1, 0)
    assert status.workers == () and status.rate == 0 and status.seconds_left is None
    files.write_part(2, 1, IMAGES[10:])
    lease = Leases(tmp_path / LEASES).acquire(shard_name(2), lambda: {"images": 6, "seconds": 3.0})
    status = run_status(tmp_path, sleep=lambda seconds: pytest.fail("processes of this machine are known"))
    assert (status.finished_images, status.finished_shards, status.open_shards) == (5, 1, 1)
    (worker,) = status.workers
    assert (worker.shard, worker.pid, worker.images, worker.alive) == ("shard-000002", os.getpid(), 6, True)
    assert status.rate == 2 and status.seconds_left == 3
    lease.release()
    make(tmp_path)
    assert run_status(tmp_path).seconds_left == 0


def test_processes_of_other_machines_are_watched(tmp_path):
    make(tmp_path, shards=0)
    (tmp_path / LEASES).mkdir()
    record = {
        "machine": "other",
        "host": "far",
        "pid": 7,
        "locked": True,
        "count": 1,
        "images": 2,
        "seconds": 1,
    }
    for shard in range(2):
        (tmp_path / LEASES / f"{shard_name(shard)}.3").write_text(json.dumps(record))

    def beat(seconds):
        (tmp_path / LEASES / f"{shard_name(1)}.3").write_text(json.dumps({**record, "count": 2, "images": 4}))

    status = run_status(tmp_path, beat)
    assert [(worker.host, worker.images, worker.alive) for worker in status.workers] == [
        ("far", 2, False), ("far", 4, True),
    ]  # fmt: skip
    assert status.rate == 4


def test_the_status_of_a_run_of_png_files(tmp_path):
    make_pngs(tmp_path)
    assert (run_status(tmp_path).finished_images, run_status(tmp_path).finished_shards) == (11, 1)
    write_png(tmp_path / "images" / "mine.png", IMAGES[0])
    next((tmp_path / "images").glob("*seed*")).unlink()
    assert (run_status(tmp_path).finished_images, run_status(tmp_path).open_shards) == (10, 1)


WITHOUT_TORCH = """
import sys
from admfast.cli.main import main
for command in ("status run", "merge run --out all.npz", "export run --out pngs",
                "export run --out tars --to webdataset"):
    assert main(["run", *command.split()]) == 0, command
assert "torch" not in sys.modules
print(int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_collecting_takes_little_memory_and_no_torch(tmp_path):
    """The run has 400 MB of images, more than the process may hold."""
    shape, count = [512, 512, 3], 510
    manifest = replace(ONE, images=count, seeds=f"0-{count - 1}", shape=shape, batch_size=15, shard_size=255)
    make(tmp_path / "run", manifest, 2, np.zeros((count, *shape), np.uint8))
    assert sum(path.stat().st_size for path in (tmp_path / "run" / "shards").iterdir()) > 400e6
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300
    assert len(list((tmp_path / "pngs").iterdir())) == count
    assert os.path.getsize(tmp_path / "all.npz") > 400e6 and (tmp_path / "run" / MANIFEST).exists()
