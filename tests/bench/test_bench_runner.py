"""Tests that a bench keeps its budget, resumes, records failures as rows, and can always be stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import ceilings, command, measure, profile
from bench.command import MIN_CASE_SECONDS, UNFINISHED
from bench.measure import Case, Settings, TooSlow, Unavailable, WrongResult
from bench.results import ResultFile, Row, is_final, read_rows
from bench.runner import measure_case, run, select
from bench.sampling.__main__ import main as sampling

ROOT = Path(command.__file__).parents[1]
CPU = Settings(torch.device("cpu"), seconds=0.001, quick=True)


class Clock:
    """A fake clock, which each measurement advances by the time it pretends to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake_group(clock: Clock, kind: str, count: int, cost: float) -> Callable[[Settings], Iterator[Case]]:
    def measured(settings: Settings) -> Row:
        clock.now += cost
        return {"ms": 1.0}

    def cases(settings: Settings) -> Iterator[Case]:
        for n in range(count):
            yield Case(kind, "fp32", "fake", {"n": n}, measured)

    return cases


@pytest.mark.slow
def test_each_group_keeps_to_its_share_and_the_next_run_goes_on(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "c.jsonl"
    groups = {"a": (1.0, fake_group(clock, "a", 10, 1.0)), "b": (1.0, fake_group(clock, "b", 10, 1.0))}
    first = list(run(CPU, ResultFile(path), 8.0, groups, clock=clock))
    assert [(r.measured, r.left) for r in first] == [(4, 6), (4, 6)]
    second = list(run(CPU, ResultFile(path), 100.0, groups, clock=clock))
    assert [(r.found, r.measured, r.left) for r in second] == [(4, 6, 0), (4, 6, 0)]
    assert [r["shape"]["n"] for r in read_rows(path) if r["kind"] == "a"] == list(range(10))
    assert all(r["device"] and r["date"] and r["group"] in "ab" for r in read_rows(path))


def test_what_a_group_leaves_over_goes_to_the_next(tmp_path: Path) -> None:
    clock = Clock()
    groups = {"a": (1.0, fake_group(clock, "a", 1, 1.0)), "b": (1.0, fake_group(clock, "b", 10, 1.0))}
    reports = list(run(CPU, ResultFile(tmp_path / "c.jsonl"), 8.0, groups, clock=clock))
    assert [r.measured for r in reports] == [1, 7]


@pytest.mark.parametrize(("second", "kept"), [(0.01, 0.01), (0.9, 0.4)])
def test_a_disturbed_row_is_measured_again_when_asked_and_the_calmer_stays(
    tmp_path: Path, second: float, kept: float
) -> None:
    def next_wait(values: list[float], settings: Settings) -> Row:
        return {"waited": values.pop(0)}

    waits = {"calm": [0.01], "busy": [0.4, second]}

    def cases(settings: Settings) -> Iterator[Case]:
        for name, values in waits.items():
            yield Case("matmul", "fp32", "fake", {"n": name}, partial(next_wait, values))

    path, groups = tmp_path / "c.jsonl", {"a": (1.0, cases)}
    again = Settings(CPU.device, again=True)
    for settings, measured in ((CPU, 2), (CPU, 0), (again, 1)):
        (report,) = run(settings, ResultFile(path), 60.0, groups)
        assert report.measured == measured
    assert {r["shape"]["n"]: r["waited"] for r in read_rows(path)} == {"calm": 0.01, "busy": kept}


class Together:
    """Cases that are measured together; the case named x is unavailable."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.out: list[str] = []

    def leave_out(self, case: Case) -> None:
        assert not self.measured
        self.out.append(case.provider)

    def cases(self, names: str) -> list[Case]:
        return [Case("k", "fp32", n, {}, partial(self.row, n), measured_with=self) for n in names]

    def row(self, name: str, settings: Settings) -> Row:
        self.measured.append(name)
        if name == "x":
            raise Unavailable("no x")
        return {"ms": float(len(self.measured))}


def test_what_is_measured_together_is_measured_again_together(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "r.jsonl")
    for names, measured, out in (("ax", "ax", ""), ("ax", "", ""), ("abx", "ab", "x")):
        unit = Together()
        list(run(CPU, results, 60.0, {"g": (1.0, lambda s, unit=unit, names=names: unit.cases(names))}))
        assert ("".join(unit.measured), "".join(unit.out)) == (measured, out)
    assert {row["provider"]: row["status"] for row in results.rows} == {"a": "ok", "x": "none", "b": "ok"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unavailable("no such unit"), "none"),
        (WrongResult("off"), "wrong"),
        (TooSlow("an hour a call"), "too slow"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (TypeError("a slip"), "error"),
    ],
)
def test_a_failure_is_a_row_with_its_reason(error: Exception, status: str) -> None:
    def fails(settings: Settings) -> Row:
        raise error

    row = measure_case(Case("matmul", "fp32", "torch", {"n": 1}, fails), CPU)
    assert row["status"] == status
    assert str(error)[:20] in row["reason"]
    assert "ms" not in row


def test_a_refusal_of_the_package_is_none_too() -> None:
    from admfast import errors

    def refused(settings: Settings) -> Row:
        raise errors.Unavailable("impl='x': can't")

    assert measure_case(Case("kind", "fp32", "x", {}, refused), CPU)["status"] == "none"


def test_a_lost_device_ends_the_run() -> None:
    def fails(settings: Settings) -> Row:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        measure_case(Case("matmul", "fp32", "torch", {"n": 1}, fails), CPU)


def test_select() -> None:
    every = {name: (1.0, lambda settings: ()) for name in ceilings.NAMES}
    assert list(select(None, every)) == list(every)
    assert list(select("sampler, copy", every)) == ["copy", "sampler"]
    for bad in ("copy,fast", ""):
        with pytest.raises(ValueError, match="only="):
            select(bad, every)


def hanging(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tests.bench.hanging", "--device", "cpu", "--out", str(folder), *flags]


def test_a_case_that_hangs_in_c_becomes_a_row_and_the_rest_is_measured(tmp_path: Path) -> None:
    ran = subprocess.run(hanging(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    rows = {row["provider"]: row for row in read_rows(tmp_path / "hanging.jsonl")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "first": "ok",
        "hangs": "too slow",
        "last": "ok",
    }
    assert rows["hangs"]["device"] and rows["hangs"]["key"] and rows["hangs"]["reason"]
    assert "too slow" in (tmp_path / "hanging.md").read_text()


def test_a_case_ends_with_the_budget_and_is_tried_again(tmp_path: Path) -> None:
    flags = ["--limit", "3600", "--budget", "6"]
    ran = subprocess.run(hanging(tmp_path, *flags), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == UNFINISHED, ran.stderr
    rows = {row["provider"]: row for row in read_rows(tmp_path / "hanging.jsonl")}
    assert {name: row["status"] for name, row in rows.items()} == {"first": "ok", "hangs": "too slow"}
    assert is_final(rows["first"], 3600.0) and not is_final(rows["hangs"], 3600.0)


def test_a_worker_ends_with_the_budget_between_cases_too() -> None:
    silent = [sys.executable, "-c", "import ctypes; ctypes.PyDLL(None).pause()"]
    assert command.run_worker(silent, time.monotonic() + 1.0) == (UNFINISHED, None)


def test_what_was_too_slow_is_tried_again_with_more_time(tmp_path: Path) -> None:
    limits: list[float] = []

    def measured(settings: Settings) -> Row:
        limits.append(settings.limit)
        raise TooSlow("an hour a call")

    groups = {"a": (1.0, lambda settings: [Case("k", "fp32", "p", {}, measured, limit=100.0)])}
    for budget in (1.0, 40.0, 300.0, 300.0):
        list(run(CPU, ResultFile(tmp_path / "r.jsonl"), budget, groups, clock=lambda: 0.0))
    assert limits == [MIN_CASE_SECONDS, 40.0, 100.0]


def test_a_worker_that_crashes_is_told_by_the_exit_status(tmp_path: Path) -> None:
    ran = subprocess.run(hanging(tmp_path, "--crash"), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    rows = {row["provider"]: row["status"] for row in read_rows(tmp_path / "hanging.jsonl")}
    assert rows == {"first": "ok", "hangs": "error"}


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_ends_at_once_whatever_runs_in_it(sign: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        hanging(tmp_path, "--limit", "600"), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not read_rows(tmp_path / "hanging.jsonl") and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(sign)
        assert process.wait(timeout=10) == 128 + sign
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "first" in (tmp_path / "hanging.md").read_text()


def test_a_call_that_would_take_too_long_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROW_SECONDS", 0.5)
    calls: list[str] = []

    def small() -> None:
        calls.append("small")
        time.sleep(0.02)

    with pytest.raises(TooSlow):
        measure.measure_call(lambda: calls.append("whole"), CPU, small_call=(small, 100))
    assert set(calls) == {"small"}
    measure.measure_call(lambda: calls.append("whole"), CPU, small_call=(small, 1))
    assert "whole" in calls
    with pytest.raises(TooSlow):
        measure.measure_call(lambda: time.sleep(0.2), CPU)
    monkeypatch.undo()
    with pytest.raises(TooSlow):
        measure.measure_call(lambda: time.sleep(0.02), dataclasses.replace(CPU, limit=0.2))


def test_work_is_refused_by_the_time_of_a_product() -> None:
    measure.refuse_work(1e6, "fp32", CPU)
    with pytest.raises(TooSlow):
        measure.refuse_work(1e18, "bf16", CPU)


def test_an_exhausted_budget_is_told_by_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--quick", "--only", "copy", "--out", str(tmp_path), "--inside"]
    assert ceilings.main([*flags, "--budget", "1e-9"]) == UNFINISHED
    assert read_rows(tmp_path / "ceilings.jsonl") == []
    assert ceilings.main(flags) == 0
    assert [row["status"] for row in read_rows(tmp_path / "ceilings.jsonl")] == ["ok"]
    assert "## Copies" in (tmp_path / "ceilings.md").read_text()
    size = (tmp_path / "ceilings.jsonl").stat().st_size
    assert ceilings.main(flags) == 0
    assert (tmp_path / "ceilings.jsonl").stat().st_size == size


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        *((ceilings.main, flags) for flags in (["--only", "speed"], ["--device", "tpu"], ["--budget", "0"])),
        *((sampling, flags) for flags in (["--systems", "cifar"], ["--batches", "0"], ["--batches", "a"])),
        *((sampling, flags) for flags in (["--peers", "x"], ["--precisions", "fp8"])),
        (profile.main, ["--systems", "cifar"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(
    main: Callable[[list[str]], int], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--inside", "--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[1] in error
