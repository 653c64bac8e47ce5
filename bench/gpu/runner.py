"""Run steps one after another within a budget, record their results, and skip those that passed before."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.command import UNFINISHED
from bench.gpu.stages import Plan, Step
from bench.results import environment

Entry = dict[str, Any]

SUFFIXES = frozenset({".py", ".cpp", ".cu", ".h", ".cuh"})
PYTEST_NO_TESTS = 5
FINAL_STATUSES = ("no tests", "passed")
LOG_LIMIT = 4 << 20  # bytes that a step may add to the log, in case it prints endlessly
PRINT_NOW = functools.partial(print, flush=True)
BENCH_ENDING = 10.0  # seconds that a bench may take to write its table


def run_steps(
    plan: Plan, steps: Sequence[Step], budget: float, say: Callable[[str], None] = PRINT_NOW
) -> dict[str, Entry]:
    """Run steps within `budget` seconds; steps that were tried before come after new ones.

    Returns:
        The entry of every step by its name, in the order of the steps. An entry has `status` (passed, failed,
            stopped, unfinished, or "no tests" if none ran), `seconds`, `note` (the last line that the step
            printed), the hash of its sources, and its date. All entries are also written to `gpu.json` after
            every step.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    path, log = plan.out / "gpu.json", plan.out / "gpu.log"
    state = _read_state(path)
    state |= environment(torch.device(plan.device)) | {"date": _now()}
    entries = state.setdefault("steps", {})
    sources = {step.name: fingerprint(plan.root, step.sources) for step in steps}
    waiting = []
    for step in steps:
        old = entries.get(step.name, {})
        if (
            old.get("source") == sources[step.name]
            and old["status"] in FINAL_STATUSES
            and old["wrote"] == step.written_text()
        ):
            say(f"{step.name}: {old['status']} before, skipped")
        else:
            waiting.append(step)
            entries.setdefault(step.name, {"status": "stopped", "seconds": 0.0, "note": "no time was left"})
    waiting.sort(key=lambda step: "source" in entries[step.name] and not step.before_new_steps)
    end = time.monotonic() + budget
    for step in waiting:
        limit = min(step.limit, end - time.monotonic())
        if limit <= 0:
            continue
        say(f"{step.name}: up to {limit:.0f} s")
        entry, tail = run_step(step, plan, limit, log)
        entries[step.name] = entry | {
            "source": sources[step.name],
            "date": _now(),
            "wrote": step.written_text(),
        }
        _write_state(path, state)
        if entry["status"] == "failed":
            say(tail)
        say(f"{step.name}: {entry['status']} after {entry['seconds']:.0f} s")
    _write_state(path, state)
    return {step.name: entries[step.name] for step in steps}


def fingerprint(root: Path, folders: Sequence[str]) -> str:
    """Return 12 hexadecimal digits of a hash of the sources in these folders, to which a result belongs."""
    digest = hashlib.sha256()
    files = [root / "setup.py", root / "pyproject.toml"]
    for folder in folders:
        files += [path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def run_step(step: Step, plan: Plan, seconds: float, log: Path) -> tuple[Entry, str]:
    """Run one step for at most `seconds`, and append its output to `log`; return its entry and last lines."""
    begin = time.monotonic()
    command = list(step.command)
    if step.bench:
        command += ["--budget", f"{max(seconds - BENCH_ENDING, seconds / 2):.0f}"]
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command,
            cwd=plan.root,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            pass  # it is stopped below
        finally:
            _end(process)
    lines = _trim(log, start) or [""]
    last = lines[-1].strip()[:160]
    entry = {
        "status": _status(code, last, step.tests),
        "seconds": round(time.monotonic() - begin, 1),
        "note": last,
    }
    return entry, "\n".join("  | " + line for line in lines[-30:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and the processes that it started, first by an interrupt, so that it can save results."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(timeout=6.0)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # compile workers outlive their parent
    except ProcessLookupError:
        pass


def _trim(log: Path, start: int) -> list[str]:
    """Cut the middle of the log after `start` to keep LOG_LIMIT bytes; return its last nonempty lines."""
    with log.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size - start > LOG_LIMIT:
            file.seek(size - LOG_LIMIT // 2)
            tail = file.read()
            file.seek(start + LOG_LIMIT // 2)
            file.truncate()
            file.write(b"\n... shortened ...\n" + tail)
            size = file.tell()
        file.seek(max(start, size - 65536))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _status(code: int | None, last: str, tests: bool) -> str:
    if code is None:
        return "stopped"
    # pytest also exits with 0 if all tests were skipped, as GPU tests are on an unknown GPU.
    if tests and (code == PYTEST_NO_TESTS or (code == 0 and " passed" not in last)):
        return "no tests"
    return {0: "passed", UNFINISHED: "failed" if tests else "unfinished"}.get(code, "failed")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the whole file at once, so that the old one stays if this process is stopped."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def exit_status(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """Return 1 if a step failed, else 3 if one ran out of time, else 0."""
    states = {entry["status"] for entry in entries.values()}
    return 1 if "failed" in states else UNFINISHED if states & {"stopped", "unfinished"} else 0
