"""The stages of `bench.gpu`: what each runs, what it needs, and when it is finished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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
    """One process of a stage; `tests` says that it is pytest, which may find nothing to run."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    tests: bool = False


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
    mode = os.environ.get("ADMFAST_BUILD") or ("cuda" if plan.device == "cuda" else "auto")
    return [Step(f"ADMFAST_BUILD={mode}", (*pip, "-e", "."), {"ADMFAST_BUILD": mode})]


def build_info(plan: Plan) -> dict[str, Any]:
    """What the build wrote about itself; and a note, as with `auto` one that fell back passes too."""
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
    """What attention runs on, the kernels checked, the tests that need a GPU, parity where golden data lies.

    The tests come last: they take the longest, and what the time ends must not be the short reports. The
    small kernels run by themselves first: what is wrong without a sanitizer is not its finding, and what
    Triton compiled is then kept.
    """
    pytest = (sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    golden = plan.root / plan.golden
    found = {"ADMFAST_GOLDEN": str(golden)} if golden.is_dir() else {}
    python = (sys.executable, "-m")
    steps = [Step("attention", (*python, "bench.gpu.chosen", "--device", plan.device))]
    small = ("tests.tools.small_kernels", "--device", plan.device)
    steps.append(Step("small kernels", (*python, *small)))
    for tool in ("memcheck", "racecheck"):
        steps.append(Step(tool, (*python, "bench.gpu.sanitizer", tool, *small)))
    steps.append(Step("pytest -m gpu", (*pytest, "-m", "gpu"), found, tests=True))
    if found and (plan.root / "tests" / "parity").is_dir():
        parity = (*pytest, "-m", "not gpu and not slow", "tests/parity")
        steps.append(Step("parity", parity, found, tests=True))
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
    Stage("tests", 0.45, test_steps),
    bench_stage("ceilings", 0.30),
    *(bench_stage(name, 0.20, *more) for name, more in BENCHES.items()),
)


def choose(names: str | None, stages: tuple[Stage, ...] = STAGES) -> list[Stage]:
    """The stages named in a comma-separated text, in their order; all for None or ""; else ValueError."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    unknown = sorted(set(wanted) - {stage.name for stage in stages})
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        raise ValueError(f"stages={names!r}: no stage {', '.join(unknown)}; there are {known}")
    return [stage for stage in stages if not wanted or stage.name in wanted]
