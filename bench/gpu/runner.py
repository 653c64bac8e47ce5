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

from bench.command import UNFINISHED
from bench.gpu.process import run_step
from bench.gpu.stages import Plan, Stage
from bench.results import environment

SUFFIXES = frozenset({".py", ".cpp", ".cu", ".h", ".cuh"})
PYTEST_NO_TESTS = 5
STATUSES = ("failed", "stopped", "unfinished", "no tests", "passed")
DONE = ("no tests", "passed")


def fingerprint(root: Path, folders: Sequence[str]) -> str:
    """Twelve hexadecimal digits of the sources in these folders: a result is of one source."""
    digest = hashlib.sha256()
    files = [root / "setup.py", root / "pyproject.toml"]
    for folder in folders:
        files += [path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def run_stage(
    stage: Stage,
    plan: Plan,
    seconds: float,
    log: Path,
    before: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """Run a stage inside its share and return its entry: `status`, `seconds`, `note` and its steps.

    The status is the worst of its steps': failed, stopped, unfinished, "no tests" found at all, passed. What
    passed `before` isn't run again, what was run before and didn't pass comes last. A step gets half of the
    time that is left, the last one all: one that hangs leaves time for those after it.

    Args:
        before: what became of the same stage's steps, of the same sources, in an earlier run.
        keep: called with the entry as far as it is after every step.
    """
    end = time.monotonic() + seconds
    earlier = {entry["step"]: dict(entry) for entry in before}
    steps = stage.steps(plan, seconds)
    order = [step.name for step in steps]
    done = [earlier[name] for name in order if earlier.get(name, {}).get("status") in DONE]
    waiting = [step for step in steps if step.name not in {entry["step"] for entry in done}]
    waiting.sort(key=lambda step: step.name in earlier)
    unseen = [
        {"step": s.name, "status": "stopped", "seconds": 0.0, "last": "no time was left"} for s in waiting
    ]
    for number, step in enumerate(waiting, 1):
        left = end - time.monotonic()
        limit = left if number == len(waiting) else left / 2
        if limit > 0:
            entry = {"step": step.name} | run_step(step, plan, limit, log)
            entry["status"] = _status(entry["exit"], entry["last"], step.tests)
            unseen.pop(0)
            done.append(entry)
            keep(_entry(order, done + unseen))
    out = _entry(order, done + unseen)
    return out | stage.record(plan) if out["status"] == "passed" else out


def _entry(order: Sequence[str], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a stage's entry from its steps'."""
    steps = sorted(steps, key=lambda entry: order.index(entry["step"]))
    if not steps:
        return {"status": "no tests", "seconds": 0.0, "note": "nothing to run", "steps": []}
    worst = min(steps, key=lambda entry: STATUSES.index(entry["status"]))
    return {
        "status": worst["status"],
        "seconds": round(sum(entry["seconds"] for entry in steps), 1),
        "note": _note(worst, steps),
        "steps": steps,
    }


def _note(worst: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    """Return what the step that decided said last; where all went well, what every step did."""
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


def finished(stage: Stage, plan: Plan, entry: dict[str, Any]) -> bool:
    """Tell whether an earlier run's entry of the same sources ({} for none) ends a stage on this machine."""
    return entry.get("status") in DONE and stage.standing(plan, entry)


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
    entries = state.setdefault("stages", {})
    sources = {stage.name: fingerprint(plan.root, stage.sources) for stage in stages}

    def old(stage: Stage) -> dict[str, Any]:
        """Return the entry of an earlier run, as far as it is of the same sources."""
        entry = entries.get(stage.name) or {}
        return entry if entry.get("source") == sources[stage.name] else {}

    waiting = [s for s in stages if not finished(s, plan, old(s))]
    end = time.monotonic() + budget
    for stage in stages:
        before = old(stage)
        if finished(stage, plan, before):
            say(f"{stage.name}: {before['status']} before, skipped")
            continue
        share = _share(stage, end - time.monotonic(), sum(s.weight for s in waiting if not s.whole))
        waiting.remove(stage)
        say(f"{stage.name}: up to {share:.0f} s")

        def keep(entry: dict[str, Any], name: str = stage.name) -> None:
            entries[name] = entry | {"source": sources[name], "date": _now()}
            _write_state(path, state)

        # A stage that was finished, on another machine, begins anew.
        steps = [] if before.get("status") in DONE else before.get("steps", [])
        if share > 0:
            entry = run_stage(stage, plan, share, log, steps, keep)
        else:
            entry = {"status": "stopped", "seconds": 0.0, "note": "no time was left"}
            entry |= {"steps": steps} if steps else {}
        keep(entry)
        for step in entry.get("steps", []):
            if step["status"] == "failed" and step not in steps:
                say(_tail(log, step["log_end"]))
        say(f"{stage.name}: {entry['status']} after {entry['seconds']:.0f} s")
    return {stage.name: entries[stage.name] for stage in stages}


def _share(stage: Stage, left: float, weights: float) -> float:
    """Return the seconds that a stage may take of those that are left."""
    if stage.whole:
        return left
    return min(left, max(left * stage.weight / weights, stage.least))


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
