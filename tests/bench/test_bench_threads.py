"""Tests of the bench of threads: a row for each number of threads, on an idle and on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from admfast.host import PASSIVE_WAIT
from bench import threads
from bench.results import read_rows


@pytest.mark.slow
def test_every_number_of_threads_is_measured_idle_and_busy(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--quick", "--inside", "--only", "passive", "--out", str(tmp_path)]
    assert threads.main(flags) == 0
    rows = read_rows(tmp_path / "threads.jsonl")
    assert {row["status"] for row in rows} == {"ok"}
    assert {(row["provider"], row["shape"]["beside"]) for row in rows} == {
        (f"{count} threads", busy) for count in threads.thread_counts() for busy in (0, 1)
    }
    assert sum(row["also"] == "chosen" for row in rows) == 2
    assert "## A guided step by its number of threads" in (tmp_path / "threads.md").read_text()


def test_waiting_is_what_the_process_is_started_with(monkeypatch) -> None:
    seen = []

    def run(command, env, **more):
        seen.append({name: env.get(name) for name in PASSIVE_WAIT})
        return subprocess.CompletedProcess(command, 0, stdout="{}")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    for waiting in ("active", "passive"):
        threads.measure_in_process("tiny", 1, waiting, 0)
    assert seen == [dict.fromkeys(PASSIVE_WAIT), PASSIVE_WAIT]


def test_a_busy_process_ends_with_the_one_that_began_it() -> None:
    code = f"""
import os, subprocess, sys
command = [sys.executable, "-c", {threads.BUSY_LOOP!r}.format(os.getpid())]
print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid)
"""
    pid = int(subprocess.check_output([sys.executable, "-c", code], timeout=60))
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
