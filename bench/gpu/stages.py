"""The stages of `bench.gpu`: what each runs, what it needs, and when it is finished."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("admfast", "kernels", "csrc", "bench")
# What compiles many kernels or has hundreds of cases runs in several processes, which share the GPU; the
# longest last.
WORKERS = 4
PARALLEL = (
    "tests/parity/",
    "tests/ops/test_attention.py",
    "tests/ops/test_conv.py",
    "tests/ops/test_sampler_step.py",
    "tests/ops/test_group_norm.py",
    "tests/kernels/test_group_norm_gpu.py",
)
# How a test file says that it has tests for a GPU; those of this module, in tests/bench, only speak of it.
FOR_A_GPU = re.compile(r"mark\.gpu|\bDEVICES\b|\bON_A_GPU\b|\brunnable\(")


@dataclass(frozen=True)
class Plan:
    """Settings of all stages: folder of the sources, folder of the results, device."""

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
    """A stage: its weight in the shares of time, and its steps.

    `steps` is told the seconds of the stage's share, so that a bench can end by itself before it is stopped.
    `least` seconds are given however small the share is, as long as they are left; `whole` is given all that
    is left. `sources` are the folders that a result depends on. `record` adds to the entry of a stage that
    passed; `standing` says whether a finished entry still holds on this machine.
    """

    name: str
    weight: float
    steps: Callable[[Plan, float], list[Step]]
    record: Callable[[Plan], dict[str, Any]] = lambda plan: {}
    standing: Callable[[Plan, dict[str, Any]], bool] = lambda plan, entry: True
    least: float = 0.0
    whole: bool = False
    sources: tuple[str, ...] = PRODUCT


def build_steps(plan: Plan, seconds: float) -> list[Step]:
    """Install this checkout in place, from what is there: no network, no dependencies."""
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation")
    mode = os.environ.get("ADMFAST_BUILD") or ("cuda" if plan.device == "cuda" else "auto")
    environment = {"ADMFAST_BUILD": mode}
    if plan.device == "cuda" and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        # The architecture of this device only: each other one costs as much time again.
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    return [Step(f"ADMFAST_BUILD={mode}", (*pip, "-e", "."), environment)]


def build_info(plan: Plan) -> dict[str, Any]:
    """Return what the build wrote about itself; and a note, as with `auto` one that fell back passes too."""
    path = plan.root / "admfast" / "_build_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    note = ", ".join(f"{name} {info[name]}" for name in ("built", "wanted", "reason") if info.get(name))
    return {"build_info": info, "note": note}


def build_stands(plan: Plan, entry: dict[str, Any]) -> bool:
    """Tell whether the build an entry speaks of is here: results may have been carried to a bare machine."""
    return "build_info" in entry and build_info(plan).get("build_info") == entry["build_info"]


def smoke_steps(plan: Plan, seconds: float) -> list[Step]:
    """Every op once: which implementation runs and why not another, each kernel beside its reference."""
    python = (sys.executable, "-m")
    return [
        Step("info", (*python, "admfast", "info")),
        Step("small kernels", (*python, *small_kernels(plan))),
    ]


def sanitizer_steps(plan: Plan, seconds: float) -> list[Step]:
    """Return the small kernels under both tools of compute-sanitizer."""
    module = (sys.executable, "-m", "bench.gpu.sanitizer")
    return [Step(tool, (*module, tool, *small_kernels(plan))) for tool in ("memcheck", "racecheck")]


def small_kernels(plan: Plan) -> tuple[str, ...]:
    """Return the module that launches every kernel on small shapes, and its flags."""
    return ("tests.tools.small_kernels", "--device", plan.device)


def parity_steps(plan: Plan, seconds: float) -> list[Step]:
    """Networks, classifiers and trajectories on the device, beside the numbers of the published code."""
    return [pytest_step(plan, path) for path in gpu_test_files(plan) if path.startswith("tests/parity/")]


def test_steps(plan: Plan, seconds: float) -> list[Step]:
    """The tests that need a GPU, a step for each file, those that take longest last."""
    return [pytest_step(plan, path) for path in gpu_test_files(plan) if not path.startswith("tests/parity/")]


def gpu_test_files(plan: Plan) -> list[str]:
    """List the test files that may hold tests for a GPU, as paths from the root, the longest last."""
    found = []
    for path in sorted((plan.root / "tests").rglob("test_*.py")):
        name = path.relative_to(plan.root).as_posix()
        if not name.startswith("tests/bench/") and FOR_A_GPU.search(path.read_text(encoding="utf-8")):
            found.append(name)
    return sorted(found, key=lambda name: (rank(name), name))


def rank(name: str) -> int:
    """0 for a file of few tests, then the place in PARALLEL."""
    return next((i for i, start in enumerate(PARALLEL, 1) if name.startswith(start)), 0)


def pytest_step(plan: Plan, path: str) -> Step:
    """Return the GPU tests of one file, in several processes where it has many and xdist is installed."""
    command = (sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    if rank(path) and importlib.util.find_spec("xdist"):
        command += ("-n", str(WORKERS))
    golden = plan.root / plan.golden
    environment = {"ADMFAST_GOLDEN": str(golden)} if golden.is_dir() else {}
    return Step(path.removeprefix("tests/"), (*command, "-m", "gpu", path), environment, tests=True)


def bench_stage(name: str, weight: float, *more: str, module: str = "", least: float = 0.0) -> Stage:
    """Return a bench: `python -m bench.<module> --device D --out DIR --budget SECONDS`, and `more`.

    module: the stage's name by default.
    """

    def steps(plan: Plan, seconds: float) -> list[Step]:
        own = f"{max(seconds - 10, seconds / 2):.0f}"  # ten seconds to end by itself and write its table
        flags = ("--device", plan.device, "--out", str(plan.out), "--budget", own, *more)
        return [Step(f"bench.{name}", (sys.executable, "-m", f"bench.{module or name}", *flags))]

    return Stage(name, weight, steps, least=least)


# In the order of what is most worth knowing where time is short.
STAGES: tuple[Stage, ...] = (
    Stage("build", 1.0, build_steps, record=build_info, standing=build_stands, whole=True, sources=("csrc",)),
    Stage("smoke", 1.0, smoke_steps, least=120, sources=(*PRODUCT, "tests")),
    Stage("parity", 1.0, parity_steps, least=120, sources=(*PRODUCT, "tests")),
    bench_stage("sampling", 2.0, "--only", "matmul,steps", least=180),
    bench_stage("kernels", 1.0, least=90),
    Stage("sanitizers", 1.0, sanitizer_steps, sources=(*PRODUCT, "tests")),
    Stage("tests", 3.0, test_steps, sources=(*PRODUCT, "tests")),
    bench_stage("ceilings", 1.0),
    bench_stage("profile", 1.0),
    bench_stage("ablation", 1.0, "--ablate", "--only", "start,ablation", module="sampling"),
    bench_stage("peers", 1.0, "--peers", "--only", "matmul,steps", module="sampling"),
)


def choose(names: str | None, stages: tuple[Stage, ...] = STAGES) -> list[Stage]:
    """The stages named in a comma-separated text, in their order; all for None or ""; else ValueError."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    unknown = sorted(set(wanted) - {stage.name for stage in stages})
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        raise ValueError(f"stages={names!r}: no stage {', '.join(unknown)}; there are {known}")
    return [stage for stage in stages if not wanted or stage.name in wanted]
