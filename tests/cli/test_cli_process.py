"""The command line as a process: signals, disks and outputs that are full, and what a stream can't hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from admfast.files.images import read_image
from admfast.files.npz import read_samples

ROOT = Path(__file__).resolve().parents[2]


def pngs(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "images").glob("*.png"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_leaves_what_is_finished(weights, tmp_path, number):
    out = tmp_path / "out"
    options = ["--steps", "2", "--seeds", "0-99999", "--batch", "1", "--device", "cpu", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "admfast", "sample", str(weights / "faces.safetensors"), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while len(pngs(out)) < 3 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    made = len(pngs(out))
    assert f"{made} of 100000 images are finished and kept in {out}" in stdout.splitlines()
    assert len(read_samples(out / f"samples_{made}x8x8x1.npz").images) == made
    assert read_image(out / "grid.png").shape[2] == 3 and not list(out.glob("**/*.tmp"))


LIMITED = """
import resource, sys
from admfast.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "limit, file, images", [(20, "images/000000_class0_seed0.png", 0), (400, "samples_", 2)]
)
def test_a_full_disk_is_one_line(weights, tmp_path, limit, file, images):
    """A file that may not grow fails as a disk that is full does, and needs no special disk."""
    out = tmp_path / "out"
    command = [
        "sample",
        str(weights / "faces.safetensors"),
        "--steps",
        "1",
        "--seeds",
        "0-1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"admfast: {out}/{file}")
    assert last.endswith("not written: the file would exceed the largest size allowed here")
    kept = [line for line in done.stdout.splitlines() if "kept in" in line]
    assert kept == ([f"{images} of 2 images are finished and kept in {out}"] if images else [])
    assert len(pngs(out)) == images and not list(out.glob("**/*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "admfast", "models"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2 and done.stderr == "admfast: standard output: not written: the disk is full\n"
