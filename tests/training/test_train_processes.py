"""Tests of training runs of several processes under torchrun, and of runs that are killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from admfast.cli.main import main
from admfast.distributed import World
from admfast.training.digit_images import digits_source
from admfast.training.loop import local_sample_ids
from admfast.training.samples import Samples, iterate_batches
from tests.training.recorded_run import file_of
from tests.training.small_runs import last_state, same, small_recipe, source

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--batch-size", "4", "--log-every", "1", "--grid-every", "0", "--set", "channel_mult=1"]
SMALL += ["--set", "attention_resolutions=2", "--set", "warmup=0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(out: Path, steps: int, *more: str) -> list[str]:
    return [
        "train",
        "diffusion",
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--save-every",
        "2",
        "--precision",
        "fp32",  # on a CPU with AMX the default is bf16, whose rounding is larger than the limit below
        *SMALL,
        *more,
    ]


def under_torchrun(processes: int, arguments: list[str], *more: str, module: str = "admfast") -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*run, *more, "-m", module, *arguments]


def steps_of(run: Path) -> int:
    """Return the number of rows in the log so far."""
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Wait until a run has made `steps` steps. It must not end before."""
    deadline = time.monotonic() + 240
    while steps_of(run) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def assert_equal_to_rounding(a: dict, b: dict) -> None:
    """Compare parameters that have a gradient.

    A bias before a norm with one channel per group cancels. Its gradient is rounding, about 1e-11, which Adam
    scales up to steps of the learning rate, so such parameters are left out.
    """
    moments = [state["exp_avg_sq"].mean().sqrt() for state in a["optimiser"]["state"].values()]
    assert max(moments) > 1e-4
    for (key, value), moment in zip(a["net"].items(), moments, strict=True):
        if moment > 1e-9:
            # Sums in another order differ by some float32 units per step, and Adam passes them on.
            torch.testing.assert_close(b["net"][key], value, rtol=1e-3, atol=2e-6, msg=key)


def test_processes_share_the_samples_of_every_step():
    recipe = small_recipe(batch_size=8, steps=3)
    whole = [list(sample_ids) for sample_ids in local_sample_ids(recipe, World(), 1)]
    assert whole == [list(range(8, 16)), list(range(16, 24))]
    for size in (2, 4):
        parts = [list(local_sample_ids(recipe, World(rank, size), 1)) for rank in range(size)]
        assert [[k for sample_ids in step for k in sample_ids] for step in zip(*parts, strict=True)] == whole


def test_two_processes_are_one_and_one_goes_on_alone(tmp_path, capfd):
    assert main(command(tmp_path / "one", 4)) == 0
    done = subprocess.run(
        under_torchrun(2, command(tmp_path / "two", 4, "--microbatch", "1")),
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4 of 4") == 1, "only one process should print"
    assert_equal_to_rounding(last_state(tmp_path / "one"), last_state(tmp_path / "two"))
    capfd.readouterr()
    assert main(command(tmp_path / "two", 6)) == 0
    assert "processes differs: 1 now, 2 when the run began" in capfd.readouterr().out
    assert main(command(tmp_path / "one", 6)) == 0
    assert_equal_to_rounding(last_state(tmp_path / "one"), last_state(tmp_path / "two"))


def test_a_kill_and_a_sigterm_from_outside(tmp_path):
    """As from a scheduler, SIGTERM reaches the workers too."""
    steps = 40  # many more than run before a signal comes
    assert main(command(tmp_path / "whole", steps)) == 0
    run = tmp_path / "killed"
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = steps_of(run)
        process = subprocess.Popen(
            [sys.executable, "-m", "admfast", *command(run, steps, "--workers", "1")],
            env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_for(process, run, max(3, before + 1))
        os.killpg(process.pid, number)
        assert process.wait(120) == (143 if number == signal.SIGTERM else -number)
    assert main(command(run, steps)) == 0
    same(last_state(run), last_state(tmp_path / "whole"))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS doesn't say who sent a signal")
def test_a_worker_of_the_data_ends_for_its_parent_alone():
    """If all processes of a job get SIGTERM, workers must continue, because the run still needs them."""
    ahead = iterate_batches(Samples(source(), 0, 8, 1), ([k] for k in itertools.count()), workers=1)
    next(ahead)
    [worker] = multiprocessing.active_children()
    subprocess.run(["/bin/sh", "-c", f"kill -TERM {worker.pid}; kill -INT {worker.pid}"], check=True)
    assert [next(ahead).sample_ids for _ in range(8)] == [(k,) for k in range(1, 9)]
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
    ahead.close()


def few_digits(path: Path, count: int) -> Path:
    """Write the first digits as an npz, so that an epoch has few steps, and return its path."""
    source = digits_source()
    np.savez(path, np.stack([source.decode(i) for i in range(count)]), np.array(source.labels[:count]))
    return path


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """Four kills come during start-up, two in the first of six epochs, the others at any later step."""
    steps, epoch, run = 60, 10, tmp_path / "killed"
    data = ["--data", str(few_digits(tmp_path / "digits.npz", 4 * epoch)), "--set", "ema_power=0.1"]
    assert main(command(tmp_path / "whole", steps, *data)) == 0
    moments, found = random.Random(0), []
    early = moments.sample(range(1, epoch - 2), 2)
    late = moments.sample(range(epoch, steps - 3), 14)
    moments_to_kill = sorted([0, 0, *early, *late])
    moments_to_kill[10:10] = [0, 0]
    for target in moments_to_kill:
        process = subprocess.Popen(
            [sys.executable, "-m", "admfast", *command(run, steps, *data)], env=ENVIRONMENT, cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        if target:
            wait_for(process, run, target)
        # The kill comes between the imports and the first step, or between a step and its snapshot.
        time.sleep(moments.random() * (0.1 if target else 4))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        found.append((target, steps_of(run)))
    print("killed after (step drawn, rows of the log):", found)
    assert sum(0 < rows < epoch for _, rows in found) >= 2
    assert main(command(run, steps, *data)) == 0
    same(last_state(run), last_state(tmp_path / "whole"))


@pytest.mark.slow
def test_twenty_steps_of_two_processes_are_those_of_one(tmp_path):
    batches = {}
    for count in (1, 2):
        (run := tmp_path / str(count)).mkdir()
        arguments = [str(run), *command(run, 20)]
        started = under_torchrun(count, arguments, module="tests.training.recorded_run")
        subprocess.run(started, env=ENVIRONMENT, cwd=ROOT, check=True)
        parts = [torch.load(file_of(run, rank)) for rank in range(count)]
        batches[count] = [joined(step) for step in zip(*parts, strict=True)]
    assert len(batches[1]) == 20
    same(batches[2], batches[1])
    assert_equal_to_rounding(last_state(tmp_path / "1"), last_state(tmp_path / "2"))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the processes' parts of a step's batch."""
    sample_ids = tuple(k for part in parts for k in part["sample_ids"])
    tensors = [name for name, value in parts[0].items() if isinstance(value, torch.Tensor)]
    return {"sample_ids": sample_ids, **{name: torch.cat([part[name] for part in parts]) for name in tensors}}


def workers_of(launcher: int) -> list[int]:
    """Return the ids of the processes that torchrun started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"PPid:\t{launcher}\n" in (folder / "status").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the workers in /proc")
def test_a_job_whose_worker_is_killed_goes_on_by_itself(tmp_path):
    subprocess.run(under_torchrun(2, command(tmp_path / "whole", 12)), env=ENVIRONMENT, cwd=ROOT, check=True)
    run = tmp_path / "killed"
    job = subprocess.Popen(under_torchrun(2, command(run, 12), "--max-restarts=1"), env=ENVIRONMENT, cwd=ROOT)
    wait_for(job, run, 5)
    os.kill(workers_of(job.pid)[-1], signal.SIGKILL)
    died, behind = time.monotonic(), steps_of(run)
    while steps_of(run) <= behind and job.poll() is None:
        time.sleep(0.1)
    assert time.monotonic() - died < 60
    assert job.wait(300) == 0
    same(last_state(run), last_state(tmp_path / "whole"))
