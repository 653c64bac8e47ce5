"""Tests of `admfast sample --num` and `admfast run`: processes that share a folder, signals, and mistakes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.cli.main import main
from admfast.cli.sample import own_device
from admfast.engine.step import PreparedStep
from admfast.files.npz import read_samples
from admfast.runs.manifest import read_manifest
from admfast.runs.shards import ShardFiles, shard_name

ROOT = Path(__file__).resolve().parents[2]
NUM = 40


def command(weights: Path, out: Path, *options: str, num: int = NUM) -> list[str]:
    """Return `admfast sample` of NUM images in shards of eight, with batches of four."""
    settings = "--steps 2 --batch 4 --shard 8 --device cpu"
    model = str(weights / "faces.safetensors")
    return ["sample", model, *settings.split(), "--num", str(num), "--out", str(out), *options]


def start(words: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "admfast", *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def parts(out: Path) -> list[Path]:
    return [*out.glob("parts/*/batch-*.npy"), *out.glob("shards/*.npz")]


def held(out: Path) -> list[str]:
    """Return the names of the leases of a run."""
    return sorted(path.name for path in out.glob("leases/*"))


def merged(out: Path, capsys) -> str:
    """Return the hash of the images and classes of a run, after `admfast run merge`."""
    assert main(["run", "merge", str(out), "--out", str(out / "all.npz"), "--overwrite"]) == 0
    assert str(out / "all.npz") in capsys.readouterr().out
    samples = read_samples(out / "all.npz")
    seeds = [np.load(path)["seeds"] for path in sorted((out / "shards").iterdir())]
    assert np.concatenate(seeds).tolist() == list(range(len(samples.images)))
    return hashlib.sha256(samples.images.tobytes() + samples.labels.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory) -> str:
    """Return the images of a run without a stop, in a process of one thread, like those that share a run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with start(command(weights, out)) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return str(out)


def one_line(process: subprocess.Popen[str], stderr: str) -> str:
    """Return the only line of an error, after the bar if it was shown."""
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("admfast: ") and stderr.count("admfast: ") == 1
    return last


def test_a_run_its_status_and_its_images(weights, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(weights, out)) == 0
    said = capsys.readouterr().out
    assert re.search(r"^images +40 of 8x8, 4 at a time, in 5 shards of 8$", said, re.M)
    assert re.search(r"^seeds +0-39$", said, re.M) and re.search(r"^classes +balanced$", said, re.M)
    assert re.search(r"^40 of 40 images by this process in .* s \(.* images/s\), peak memory", said, re.M)
    assert said.splitlines()[-1] == f"all 40 images are finished: admfast run merge {out} --out FILE.npz"
    assert main(command(weights, out)) == 0
    assert "0 of 40 images by this process" in capsys.readouterr().out
    assert main(["run", "status", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^images +40 of 40 \(100.0 %\)$", said, re.M)
    assert re.search(r"^shards +5 done, 0 open, 0 left$", said, re.M)
    merged(out, capsys)
    for to, count in (("png", 40), ("webdataset", 5)):
        assert main(["run", "export", str(out), "--out", str(tmp_path / to), "--to", to]) == 0
        assert len(list((tmp_path / to).iterdir())) == count
    assert read_samples(out / "all.npz").labels.tolist() == [seed % 4 for seed in range(40)]


def test_the_status_shows_who_works(weights, tmp_path, capsys, monkeypatch):
    out, shown, own = tmp_path / "run", [], PreparedStep.advance

    def advance(step, i):
        if len(parts(out)) == 4 and not shown:
            shown.append(None)
            capsys.readouterr()
            assert main(["run", "status", str(out)]) == 0
            shown.append(capsys.readouterr().out)
        own(step, i)

    monkeypatch.setattr(PreparedStep, "advance", advance)
    assert main(command(weights, out)) == 0
    assert re.search(r"^processes +1 at work$", shown[1], re.M)
    assert re.search(rf"^{shard_name(3)} .* {os.getpid()} .* works$", shown[1], re.M)
    assert re.search(r"^images +28 of 40 \(70.0 %\)$", shown[1], re.M)
    assert re.search(r"^shards +3 done, 1 open, 1 left$", shown[1], re.M)


@pytest.mark.parametrize("options, message", [
    (["--num", "0"], "--num=0: "),
    (["--num", "many"], "--num='many': a whole number"),
    (["--num", "4", "--per-class", "2"], "--per-class=2: not together with --num"),
    (["--num", "4", "--overwrite"], "--overwrite=True: not together with --num"),
    (["--num", "4", "--intermediates", "2"], "--intermediates=2: not together with --num"),
    (["--num", "4", "--low-res", "a.npz"], "--low-res=PosixPath('a.npz'): not together with --num"),
    (["--num", "4", "--seeds", "0-3"], "--seeds='0-3': with --num a single number"),
    (["--num", "4", "--shard", "0"], "--shard=0: 1 or more"),
    (["--num", "4", "--batch", "3", "--shard", "4"], "--shard=4: a multiple of the batch size, 3"),
    (["--num", "4", "--classes", "9"], "--classes=9: "),
    (["--shard", "4"], "--shard=4: only with --num"),
    (["--classes", "random", "--per-class", "2"], "--classes='random': not with --per-class"),
])  # fmt: skip
def test_mistakes_are_one_line(weights, tmp_path, capsys, options, message):
    model = str(weights / "faces.safetensors")
    assert main(["sample", model, "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"admfast: {message}") and said.err.count("\n") == 1 and said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, message", [
    (["status", "gone"], "--run='gone': the folder of `admfast sample`"),
    (["merge", "gone", "--out", "a.npz"], "--run='gone': the folder of `admfast sample`"),
    (["merge", "gone", "--out", "a.tar"], "--out='a.tar': a name that ends in .npz"),
    (["export", "gone", "--out", "a", "--to", "tar"], "--to='tar': one of: png, webdataset"),
    (["merge", "gone"], "admfast run merge: Missing option '--out'"),
])  # fmt: skip
def test_mistakes_of_the_other_commands(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message.removeprefix("--") in said, said


@pytest.mark.parametrize("classes", ["random", "balanced"])
def test_classes_by_a_word_are_the_same_in_both_kinds_of_runs(weights, tmp_path, capsys, classes):
    model = [
        "sample",
        str(weights / "faces.safetensors"),
        "--steps",
        "1",
        "--classes",
        classes,
        "--device",
        "cpu",
    ]
    assert main([*model, "--seeds", "3-9", "--out", str(tmp_path / "png")]) == 0
    assert main([*model, "--seeds", "3", "--num", "7", "--out", str(tmp_path / "run")]) == 0
    small = read_samples(tmp_path / "png" / "samples_7x8x8x1.npz")
    many = read_samples(tmp_path / "run" / "shards" / "shard-000000.npz")
    assert small.labels.tolist() == many.labels.tolist() and np.array_equal(small.images, many.images)
    assert (small.labels.tolist() == [seed % 4 for seed in range(3, 10)]) == (classes == "balanced")
    assert main(["run", "status", str(tmp_path / "png")]) == 0
    assert "7 of 7 (100.0 %)" in capsys.readouterr().out


def test_the_same_command_goes_on_after_ctrl_c(weights, tmp_path, monkeypatch, capsys):
    words = ["sample", str(weights / "faces.safetensors"), "--seeds", "0-5", "--batch", "2", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    calls, own = [], PreparedStep.advance

    def interrupted(step, i):
        own(step, i)
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PreparedStep, "advance", interrupted)
        assert main([*words, "--out", str(tmp_path / "out")]) == 130
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^2 of 6 images, of which 4 were finished already, in .* s \(.* images/s\)", said, re.M)
    found, wanted = ({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
                     for out in (tmp_path / "out", tmp_path / "whole"))  # fmt: skip
    assert found == wanted
    assert main([*words, "--out", str(tmp_path / "out"), "--steps", "3"]) == 2
    assert "(steps=2, not 3)" in capsys.readouterr().err


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (own_device(None), own_device("cpu"), own_device("cuda:3")) == (None, "cpu", "cuda:3")
    for name in ("SLURM_LOCALID", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3" if name == "LOCAL_RANK" else "1")
        number = os.environ[name]
        assert (own_device(None), own_device("cuda")) == (f"cuda:{number}", f"cuda:{number}")
        assert (own_device("cpu"), own_device("cuda:0")) == ("cpu", "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert own_device(None) == "cuda:2", "more processes than GPUs share them"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(None) is None


# Processes


def test_sigterm_keeps_what_is_finished_and_the_same_command_goes_on(weights, whole, tmp_path, capsys):
    out = tmp_path / "run"
    with start(command(weights, out, num=100_000)) as process:
        while len(parts(out)) < 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - sent < 10
    assert stderr.splitlines()[-1] == "admfast: interrupted by SIGTERM" and "Traceback" not in stderr
    count = int(re.search(r"^(\d+) of 100000 images are finished and kept in", stdout, re.M)[1])
    assert count >= 8 and count % 4 == 0  # three files are a shard and its two batches, or more
    assert not list(out.rglob("*.tmp")) and not list((out / "leases").iterdir())
    assert main(["run", "merge", str(out), "--out", str(tmp_path / "a.npz")]) == 2
    assert "shards are missing" in capsys.readouterr().err


def test_two_that_start_at_the_same_moment_share_the_work(weights, whole, tmp_path, capsys):
    out = tmp_path / "run"
    processes = [start(command(weights, out)) for _ in range(2)]
    made = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        made.append(int(re.search(r"^(\d+) of 40 images by this process", stdout, re.M)[1]))
    assert sum(made) == NUM, "an image was made twice, or by nobody"
    assert merged(out, capsys) == merged(Path(whole), capsys)


def test_of_two_requests_at_the_same_moment_one_is_refused(weights, tmp_path):
    out = tmp_path / "run"
    processes = [start(command(weights, out, "--steps", str(steps))) for steps in (2, 3)]
    ended = [(process, *process.communicate(timeout=300)) for process in processes]
    assert sorted(process.returncode for process, _, _ in ended) == [0, 2]
    (refused,) = [(process, stderr) for process, _, stderr in ended if process.returncode == 2]
    assert re.search(r"holds images of another request \(steps=[23], not [23]\)", one_line(*refused))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_work_of_a_killed_process_is_picked_up_by_one_that_runs(weights, whole, tmp_path, capsys):
    """The second process starts while the first holds a shard, and ends with all shards finished."""
    out = tmp_path / "run"
    with start(command(weights, out)) as first:
        try:
            while not parts(out) and first.poll() is None:
                time.sleep(0.01)
            first.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            assert held(out), "stopped between two shards"
            with start(command(weights, out)) as second:
                while not (len(list(out.glob("shards/*.npz"))) == 4 and len(held(out)) == 1):
                    assert second.poll() is None, "it does not wait for the shard of the first"
                    time.sleep(0.02)
                first.kill()
                killed = time.monotonic()
                _, stderr = second.communicate(timeout=300)
                assert second.returncode == 0, stderr
                assert time.monotonic() - killed < 30
        finally:
            first.kill()
    assert merged(out, capsys) == merged(Path(whole), capsys)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_twenty_kills_of_two_processes_lose_and_double_nothing(tmp_path, capsys):
    """Ten times both processes are killed at random moments of their work."""
    settings = "sample digits32 --num 400 --steps 3 --guidance 0 --batch 2 --shard 50 --device cpu --out"
    with start([*settings.split(), str(tmp_path / "whole")]) as process:
        process.communicate(timeout=600)
        assert process.returncode == 0
    wanted, out, chance = merged(tmp_path / "whole", capsys), tmp_path / "run", random.Random(0)
    for _ in range(10):
        processes = [start([*settings.split(), str(out)]) for _ in range(2)]
        files = ShardFiles(out, read_manifest(tmp_path / "whole"))
        before = files.finished_images()
        while files.finished_images() == before:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        for process in processes:
            assert process.poll() is None, "the run was finished before the last kill"
            process.kill()
            time.sleep(chance.uniform(0, 0.1))
        for process in processes:
            process.communicate(timeout=60)
        left = files.finished_images()
    assert left < 400
    with start([*settings.split(), str(out)]) as process:
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert f"\n{400 - left} of 400 images by this process" in stdout, "a finished image was made again"
    assert merged(out, capsys) == wanted
    assert not list(out.rglob("*.tmp")) and not (out / "leases").exists() and not (out / "parts").exists()


@pytest.mark.slow
def test_processes_of_torchrun_share_a_run(weights, whole, tmp_path, capsys):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "admfast"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # To torchrun, --num is short for several of its own options.
    words = ["--num-images" if word == "--num" else word for word in command(weights, out)]
    done = subprocess.run(
        [*torchrun, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    made = re.findall(r"^(\d+) of 40 images by this process", done.stdout, re.M)
    assert len(made) == 2 and sum(map(int, made)) == NUM
    assert done.stdout.count("system") == 1, "only the first process prints the settings"
    assert merged(out, capsys) == merged(Path(whole), capsys)
