"""The stages of `bench.gpu` with their steps, the most informative stages first."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("admfast", "kernels", "csrc", "bench")
WHEELS = ".wheels"  # a folder that git ignores, for wheels that travel with the tree
# The quick ones first; `peers` measures the other precisions.
FIRST_STEPS = ("--systems", "imagenet64,imagenet256", "--batches", "1,8", "--precisions", "auto")
# Test files that compile many kernels or have hundreds of cases. They run in WORKERS processes, which share
# the GPU. The longest come last.
WORKERS = 4
PARALLEL_TESTS = (
    "tests/parity/",
    "tests/ops/test_attention.py",
    "tests/ops/test_conv.py",
    "tests/ops/test_sampler_step.py",
    "tests/ops/test_group_norm.py",
    "tests/kernels/test_group_norm_gpu.py",
)
# Text in a test file that has tests for a GPU. Files in tests/bench contain it but have no such tests.
GPU_TEST_MARK = re.compile(r"mark\.gpu|\bDEVICES\b|\bON_A_GPU\b|\brunnable\(")


@dataclass(frozen=True)
class Plan:
    """Settings of all steps: folder of the results, device, root folder of the sources."""

    out: Path
    device: str = "cuda"
    root: Path = ROOT


@dataclass(frozen=True)
class Step:
    """A step of a stage, which is one process.

    Attributes:
        limit: seconds after which it is stopped.
        tests: whether it is pytest, which may find nothing to run.
        bench: whether it gets `--budget`, so that it ends by itself before it is stopped.
        before_new_steps: whether it comes before new steps even if it did not pass before.
        sources: the folders on which its result depends.
        writes: a file that it writes. A step that passed is run again if this file has changed or is missing,
            because the results may have been copied to another machine.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    tests: bool = False
    bench: bool = False
    before_new_steps: bool = False
    sources: tuple[str, ...] = (*SOURCE_FOLDERS, "tests")
    writes: Path | None = None

    def written_text(self) -> str | None:
        """Return the text of the file that it writes, or None if there is none."""
        path = self.writes if self.writes and self.writes.exists() else None
        return path and path.read_text(encoding="utf-8")


def build_steps(plan: Plan) -> list[Step]:
    """Return the step that installs this checkout in place, without network and dependencies."""
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation")
    mode = os.environ.get("ADMFAST_BUILD") or ("cuda" if plan.device == "cuda" else "auto")
    environment = {"ADMFAST_BUILD": mode}
    if plan.device == "cuda" and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        # Only the architecture of this device: each further one would take as much time again.
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    options = {
        "before_new_steps": True,
        "sources": ("csrc",),
        "writes": plan.root / "admfast" / "_build_info.json",
    }
    return [Step("build", (*pip, "-e", "."), 600.0, environment, **options)]  # type: ignore[arg-type]


def smoke_steps(plan: Plan) -> list[Step]:
    """Return the steps that show each op's implementations and compare each kernel with its reference."""
    python = (sys.executable, "-m")
    return [
        Step("smoke: info", (*python, "admfast", "info"), 120.0),
        Step("smoke: small kernels", (*python, *small_kernels(plan)), 120.0),
    ]


def sanitizer_steps(plan: Plan) -> list[Step]:
    """Return the steps that run the small kernels under both tools of compute-sanitizer."""
    module = (sys.executable, "-m", "bench.gpu.sanitizer")
    tools = ("memcheck", "racecheck")
    return [Step(f"sanitizers: {tool}", (*module, tool, *small_kernels(plan)), 120.0) for tool in tools]


def small_kernels(plan: Plan) -> tuple[str, ...]:
    """Return the module that launches every kernel on small shapes, and its flags."""
    return ("tests.tools.small_kernels", "--device", plan.device)


def parity_steps(plan: Plan) -> list[Step]:
    """Return the steps that compare networks, classifiers and trajectories with published numbers."""
    return [pytest_step(plan, path) for path in gpu_test_files(plan) if path.startswith("tests/parity/")]


def test_steps(plan: Plan) -> list[Step]:
    """Return one step for each file with tests that need a GPU, the longest last."""
    return [pytest_step(plan, path) for path in gpu_test_files(plan) if not path.startswith("tests/parity/")]


def gpu_test_files(plan: Plan) -> list[str]:
    """Return the test files that may have tests for a GPU, as paths from the root, the longest last."""
    found = []
    for path in sorted((plan.root / "tests").rglob("test_*.py")):
        name = path.relative_to(plan.root).as_posix()
        if not name.startswith("tests/bench/") and GPU_TEST_MARK.search(path.read_text(encoding="utf-8")):
            found.append(name)
    return sorted(found, key=lambda name: (parallel_rank(name), name))


def parallel_rank(name: str) -> int:
    """Return 0 for a file with few tests, else its position in PARALLEL, from 1."""
    return next((i for i, start in enumerate(PARALLEL_TESTS, 1) if name.startswith(start)), 0)


def pytest_step(plan: Plan, path: str) -> Step:
    """Return the step for the GPU tests of a file, in parallel if it has many and xdist is installed."""
    command = (sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    if parallel_rank(path) and importlib.util.find_spec("xdist"):
        command += ("-n", str(WORKERS))
    golden = plan.root / ".golden"
    environment = {"ADMFAST_GOLDEN": str(golden)} if golden.is_dir() else {}
    return Step(path, (*command, "-m", "gpu", path), 240.0, environment, tests=True)


def xformers_steps(plan: Plan) -> list[Step]:
    """Return the steps that install xformers' wheel into a folder of its own, test it and measure it.

    The other stages don't see that folder, because attention would choose xformers wherever it is installed.
    """
    name = "xformers"
    wheels = sorted((plan.root / WHEELS).glob("xformers-*.whl"))
    if not wheels:
        says = f"print('not run: no wheel of xformers in {WHEELS}/')"
        return [Step(name, (sys.executable, "-c", says), 20.0, tests=True, sources=())]
    folder = plan.root / "build" / name
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade")
    install = (*pip, "--target", str(folder), str(wheels[-1]))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    pytest = (sys.executable, "-m", "pytest", "-q", "-rsfE", "--tb=short", "-p", "no:cacheprovider")
    files = ("tests/ops/test_attention.py", "tests/ops/test_attention_kernels.py")
    (bench,) = bench_steps(name, 90.0, "--only", "attention", module="kernels", out=name)(plan)
    return [
        Step(
            f"{name}: install",
            install,
            60.0,
            before_new_steps=True,
            sources=(),
            writes=folder / name / "version.py",
        ),
        Step(
            f"{name}: tests",
            (*pytest, "-m", "gpu", "-k", name, *files),
            120.0,
            environment,
            tests=True,
        ),
        replace(bench, name=f"{name}: bench", environment=environment),
    ]


def bench_steps(
    name: str, limit: float, *more: str, module: str = "", out: str = ""
) -> Callable[[Plan], list[Step]]:
    """Return a function that makes the step `python -m bench.MODULE`; by default MODULE is `name`.

    out: a folder for its results within that of the plan.
    """

    def steps(plan: Plan) -> list[Step]:
        flags = ("--device", plan.device, "--out", str(plan.out / out), *more)
        command = (sys.executable, "-m", f"bench.{module or name}", *flags)
        return [Step(name, command, limit, bench=True, sources=SOURCE_FOLDERS)]

    return steps


STAGES: dict[str, Callable[[Plan], list[Step]]] = {
    "build": build_steps,
    "smoke": smoke_steps,
    "parity": parity_steps,
    "sampling": bench_steps("sampling", 240.0, *FIRST_STEPS, "--only", "matmul,steps"),
    "kernels": bench_steps("kernels", 150.0),
    "xformers": xformers_steps,
    "sanitizers": sanitizer_steps,
    "tests": test_steps,
    "ceilings": bench_steps("ceilings", 150.0),
    "profile": bench_steps("profile", 150.0),
    "ablation": bench_steps("ablation", 240.0, "--ablate", "--only", "start,ablation", module="sampling"),
    "peers": bench_steps("peers", 600.0, "--peers", "--only", "matmul,steps", module="sampling"),
}


def choose(names: str | None, plan: Plan) -> list[Step]:
    """Return the steps of the stages in a comma-separated text, in the order of STAGES; all for None or "".

    Raises: ValueError for an unknown stage.
    """
    chosen = [name.strip() for name in (names or "").split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(STAGES)):
        raise ValueError(f"stages={names!r}: no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return [step for name, steps in STAGES.items() if not chosen or name in chosen for step in steps(plan)]
