"""`python -m bench.gpu`: everything that needs a GPU, in one command that knows how long it may take.

Stages run one after another as processes of their own, each stopped when its share of the time is over. What
was reached is written to `gpu.json` as it goes; a second run into the same folder skips what is finished and
goes on with the rest. The Python it is run with is the one it tests: nothing is downloaded.

Exit status: 0 when nothing failed, 3 when nothing failed but something ran out of time (run it again), 1 when
something failed, 2 without a CUDA device or for a wrong argument.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.results import environment, markdown_table

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("admfast", "kernels", "csrc", "bench", "tests")
SUFFIXES = frozenset({".py", ".cpp", ".cu", ".h", ".cuh"})
LOG_LIMIT = (
    4 << 20
)  # bytes a step may add to the log, so that a loop that prints can't make it too big to keep
PYTEST_NO_TESTS = 5
UNFINISHED = 3
# The benches after the ceilings, with what they are told beside device, folder and budget.
BENCHES: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "sampling": ("--ablate",),
    "profile": (),
    "training": (),
    "peers": (),
}


@dataclass(frozen=True)
class Plan:
    """What the stages are told: where the sources are, where results go, and on which device they run."""

    out: Path
    device: str = "cuda"
    root: Path = ROOT
    golden: Path = Path(".golden")


@dataclass(frozen=True)
class Step:
    """One process of a stage."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage: its weight in the shares of time, why it can't run ("" when it can), and its steps.

    `steps` is told the seconds of the stage's share, so that a bench can end by itself before it is stopped.
    `record` adds to the entry of a stage that passed; `standing` says whether a finished entry still holds
    on this machine.
    """

    name: str
    weight: float
    steps: Callable[[Plan, float], list[Step]]
    missing: Callable[[Plan], str] = lambda plan: ""
    record: Callable[[Plan], dict[str, Any]] = lambda plan: {}
    standing: Callable[[Plan, dict[str, Any]], bool] = lambda plan, entry: True


def build_steps(plan: Plan, seconds: float) -> list[Step]:
    """Install this checkout in place, from what is there: no network, no dependencies."""
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation")
    mode = os.environ.get("ADMFAST_BUILD", "auto")
    return [Step(f"ADMFAST_BUILD={mode}", (*pip, "-e", "."), {"ADMFAST_BUILD": mode})]


def build_info(plan: Plan) -> dict[str, Any]:
    """What the build wrote about itself; and a note, as a build that fell back to the CPU passes too."""
    path = plan.root / "admfast" / "_build_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    note = ", ".join(f"{name} {info[name]}" for name in ("built", "wanted", "reason") if info.get(name))
    return {"build_info": info, "note": note}


def build_stands(plan: Plan, entry: dict[str, Any]) -> bool:
    """Whether the build an entry speaks of is here: results may have been carried to a bare machine."""
    return "build_info" in entry and build_info(plan).get("build_info") == entry["build_info"]


def test_steps(plan: Plan, seconds: float) -> list[Step]:
    """The tests that need a GPU, and the parity tests where golden data lies beside the sources."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    golden = plan.root / plan.golden
    found = {"ADMFAST_GOLDEN": str(golden)} if golden.is_dir() else {}
    steps = [Step("pytest -m gpu", (*pytest, "-m", "gpu"), found)]
    if found and (plan.root / "tests" / "parity").is_dir():
        steps.append(Step("parity", (*pytest, "-m", "not gpu and not slow", "tests/parity"), found))
    return steps


def bench_stage(name: str, weight: float, *more: str) -> Stage:
    """A bench of this folder: `python -m bench.<name> --device D --out DIR --budget SECONDS`, and `more`."""

    def steps(plan: Plan, seconds: float) -> list[Step]:
        own = f"{max(seconds - 10, seconds / 2):.0f}"  # ten seconds to end by itself and write its table
        flags = ("--device", plan.device, "--out", str(plan.out), "--budget", own, *more)
        return [Step(f"bench.{name}", (sys.executable, "-m", f"bench.{name}", *flags))]

    def missing(plan: Plan) -> str:
        folder = plan.root / "bench"
        there = (folder / f"{name}.py").exists() or (folder / name / "__main__.py").exists()
        return "" if there else f"no bench/{name}.py"

    return Stage(name, weight, steps, missing)


STAGES: tuple[Stage, ...] = (
    Stage(
        "build",
        0.20,
        build_steps,
        missing=lambda plan: "" if (plan.root / "setup.py").exists() else "no setup.py",
        record=build_info,
        standing=build_stands,
    ),
    Stage("tests", 0.25, test_steps),
    bench_stage("ceilings", 0.30),
    *(bench_stage(name, 0.20, *more) for name, more in BENCHES.items()),
)


def fingerprint(root: Path) -> str:
    """Twelve hexadecimal digits of all that is built, tested or measured: a result is of one source."""
    digest = hashlib.sha256()
    files = [root / "setup.py", root / "pyproject.toml"]
    for folder in SOURCES:
        files += [path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def run_step(step: Step, plan: Plan, seconds: float, log: Path) -> dict[str, Any]:
    """Run one step for at most `seconds`, its output appended to `log`.

    Returns:
        `exit` (None when it was stopped), `seconds`, and `last`, the last line it printed.
    """
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(step.command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            step.command,
            cwd=plan.root,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    return {"exit": code, "seconds": round(time.monotonic() - begin, 1), "last": _trim(log, start)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and whatever it started: an interrupt first, so that it can write what it has."""
    for sign, patience in ((signal.SIGINT, 6.0), (signal.SIGKILL, 6.0)):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # compile workers outlive their parent
    except ProcessLookupError:
        pass


def _trim(log: Path, start: int) -> str:
    """Cut what was added since `start` to LOG_LIMIT bytes, in its middle; returns its last line with text."""
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
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def run_stage(stage: Stage, plan: Plan, seconds: float, log: Path) -> dict[str, Any]:
    """Run a stage inside its share and return its entry: `status`, `seconds`, `note` and its steps.

    The status is the worst of its steps': failed, stopped, unfinished, passed, or "no tests" found at all.
    """
    reason = stage.missing(plan)
    if reason:
        return {"status": "not there yet", "seconds": 0.0, "note": reason}
    end = time.monotonic() + seconds
    done: list[dict[str, Any]] = []
    for step in stage.steps(plan, seconds):
        entry = {"step": step.name} | run_step(step, plan, end - time.monotonic(), log)
        entry["status"] = _status(entry["exit"], entry["last"], stage.name)
        done.append(entry)
    order = ("failed", "stopped", "unfinished", "passed", "no tests")
    worst = min(done, key=lambda entry: order.index(entry["status"]))
    out = {
        "status": worst["status"],
        "seconds": round(sum(entry["seconds"] for entry in done), 1),
        "note": f"stopped after {worst['seconds']:.0f} s" if worst["status"] == "stopped" else worst["last"],
        "steps": done,
    }
    return out | stage.record(plan) if out["status"] == "passed" else out


def _status(code: int | None, last: str, stage: str) -> str:
    if code is None:
        return "stopped"
    if stage == "tests":
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
        if entry["status"] == "failed":
            say(_tail(log))
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


def _tail(log: Path, lines: int = 30) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
        text = file.read().decode(errors="replace")
    return "\n".join("  | " + line for line in text.splitlines()[-lines:])


def exit_status(entries: Mapping[str, Mapping[str, Any]]) -> int:
    """1 when a stage failed, 3 when one ran out of time, else 0."""
    states = {entry["status"] for entry in entries.values()}
    if "failed" in states:
        return 1
    return UNFINISHED if states & {"stopped", "unfinished"} else 0


def choose(names: str | None, stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """The stages named in a comma-separated text, in their order; all for None or ""; else ValueError."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    unknown = sorted(set(wanted) - {stage.name for stage in stages})
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        raise ValueError(f"stages={names!r}: no stage {', '.join(unknown)}; there are {known}")
    return [stage for stage in stages if not wanted or stage.name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the stages, print the table; returns the exit status."""
    arguments = _parser().parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.allow_cpu:
        print(f"bench.gpu: no CUDA device (torch {torch.__version__}); nothing was run", file=sys.stderr)
        return 2
    try:
        stages = choose(arguments.stages)
        budget = float(arguments.budget)
        if budget <= 0:
            raise ValueError(f"budget={budget:g}: must be above 0 seconds")
    except ValueError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    plan = Plan(Path(arguments.out).resolve(), "cuda" if cuda else "cpu")
    try:
        entries = run_stages(plan, stages, budget, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"bench.gpu: stopped; what was reached is in {plan.out}", file=sys.stderr)
        return UNFINISHED
    rows = [(name, e["status"], f"{e['seconds']:.0f} s", e.get("note", "")) for name, e in entries.items()]
    print("\n" + markdown_table(("stage", "status", "time", "note"), rows) + f"\nresults and log: {plan.out}")
    return exit_status(entries)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    names = ",".join(stage.name for stage in STAGES)
    environ = os.environ.get
    parser.add_argument("--stages", default=environ("STAGES"), help=f"some of {names} (STAGES; default: all)")
    parser.add_argument(
        "--budget", default=environ("BUDGET") or "540", help="seconds for all (BUDGET; default: 540)"
    )
    parser.add_argument("--out", default=environ("OUT") or "out/gpu", help="folder (OUT; default: out/gpu)")
    parser.add_argument("--allow-cpu", action="store_true", help="run the stages on a CPU, to try them out")
    return parser


if __name__ == "__main__":
    # A shell that starts a job in the background has it ignore interrupts, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
