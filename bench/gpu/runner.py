"""Runs stages one after another within a budget, keeps what became of each, and goes on where one ended."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.process import run_step
from bench.gpu.stages import Plan, Stage
from bench.results import environment

SOURCES = ("admfast", "kernels", "csrc", "bench", "tests")
SUFFIXES = frozenset({".py", ".cpp", ".cu", ".h", ".cuh"})
PYTEST_NO_TESTS = 5
UNFINISHED = 3


def fingerprint(root: Path) -> str:
    """Twelve hexadecimal digits of all that is built, tested or measured: a result is of one source."""
    digest = hashlib.sha256()
    files = [root / "setup.py", root / "pyproject.toml"]
    for folder in SOURCES:
        files += [path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def run_stage(stage: Stage, plan: Plan, seconds: float, log: Path) -> dict[str, Any]:
    """Run a stage inside its share and return its entry: `status`, `seconds`, `note` and its steps.

    The status is the worst of its steps': failed, stopped, unfinished, "no tests" found at all, passed.
    """
    reason = stage.missing(plan)
    if reason:
        return {"status": "not there yet", "seconds": 0.0, "note": reason}
    end = time.monotonic() + seconds
    done: list[dict[str, Any]] = []
    for step in stage.steps(plan, seconds):
        entry = {"step": step.name} | run_step(step, plan, end - time.monotonic(), log)
        entry["status"] = _status(entry["exit"], entry["last"], step.tests)
        done.append(entry)
    order = ("failed", "stopped", "unfinished", "no tests", "passed")
    worst = min(done, key=lambda entry: order.index(entry["status"]))
    out = {
        "status": worst["status"],
        "seconds": round(sum(entry["seconds"] for entry in done), 1),
        "note": _note(worst, done),
        "steps": done,
    }
    return out | stage.record(plan) if out["status"] == "passed" else out


def _note(worst: dict[str, Any], done: list[dict[str, Any]]) -> str:
    """What the step that decided said last; where all went well, what every step did."""
    if worst["status"] == "stopped":
        return f"{worst['step']}: stopped after {worst['seconds']:.0f} s"
    return worst["last"] if worst["status"] != "passed" else "; ".join(entry["last"] for entry in done)


def _status(code: int | None, last: str, tests: bool) -> str:
    if code is None:
        return "stopped"
    if tests:
        # pytest also exits 0 when every test was skipped, as GPU tests are on a machine they don't recognise.
        ran = code != PYTEST_NO_TESTS and not (code == 0 and " passed" not in last)
        return ("passed" if code == 0 else "failed") if ran else "no tests"
    return {0: "passed", UNFINISHED: "unfinished"}.get(code, "failed")


def finished(stage: Stage, plan: Plan, entry: dict[str, Any] | None, source: str) -> bool:
    """Whether an earlier run's entry still speaks for these sources on this machine."""
    if entry is None or entry["status"] not in ("passed", "no tests") or entry.get("source") != source:
        return False
    return stage.standing(plan, entry)


def run_stages(
    plan: Plan, stages: Sequence[Stage], budget: float, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Run stages in order within `budget` seconds; time that one leaves over goes to those after it.

    Returns:
        Each stage's entry by name, as it also stands in `gpu.json`.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    path, log = plan.out / "gpu.json", plan.out / "gpu.log"
    state = _read_state(path)
    state |= environment(torch.device(plan.device)) | {"date": _now()}
    entries, source = state.setdefault("stages", {}), fingerprint(plan.root)
    waiting = [
        s for s in stages if not finished(s, plan, entries.get(s.name), source) and not s.missing(plan)
    ]
    end = time.monotonic() + budget
    for stage in stages:
        if finished(stage, plan, entries.get(stage.name), source):
            say(f"{stage.name}: {entries[stage.name]['status']} before, skipped")
            continue
        share = 0.0
        if stage in waiting:
            share = (end - time.monotonic()) * stage.weight / sum(s.weight for s in waiting)
            waiting.remove(stage)
            say(f"{stage.name}: up to {share:.0f} s")
        entry = run_stage(stage, plan, share, log) if share > 0 or stage.missing(plan) else _no_time()
        entries[stage.name] = entry | {"source": source, "date": _now()}
        _write_state(path, state)
        for step in entry.get("steps", []):
            if step["status"] == "failed":
                say(_tail(log, step["log_end"]))
        say(f"{stage.name}: {entry['status']} after {entry['seconds']:.0f} s")
    return {stage.name: entries[stage.name] for stage in stages}


def _no_time() -> dict[str, Any]:
    return {"status": "stopped", "seconds": 0.0, "note": "no time was left"}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the file as a whole, so that a stop in between leaves the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _tail(log: Path, end: int, lines: int = 30) -> str:
    """The last lines before byte `end`, where a step's output ends."""
    with log.open("rb") as file:
        start = file.seek(max(0, end - 16384))
        text = file.read(end - start).decode(errors="replace")
    return "\n".join("  | " + line for line in text.splitlines()[-lines:])


def exit_status(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """1 when a stage failed, 3 when one ran out of time, else 0."""
    states = {entry["status"] for entry in entries.values()}
    if "failed" in states:
        return 1
    return UNFINISHED if states & {"stopped", "unfinished"} else 0
