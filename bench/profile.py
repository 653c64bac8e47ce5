"""`python -m bench.profile`: profile the time of a step by class of operation and by operation.

It runs torch's profiler over the steps of `bench.sampling`: ours, and the published code's if its checkout is
named.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.command import Bench, bench_main
from bench.measure import Case, Settings, refuse_work
from bench.results import Row
from bench.sampling.contender import STEPS_PER_CHUNK, Contender, Entry
from bench.sampling.flags import add_flags
from bench.sampling.subject import Inputs, Subject, step_flop

# The class of an operation is that of the first pattern that matches its name. Products come last, because
# cuDNN's convolutions and attention may also have "gemm" in their names.
PATTERNS = {
    "update": r"sampler_step|philox|noise_kernel|^update$",
    "embedding": r"^embedding$|index_select|gather_row|aten::(embedding|cos|sin)\b",
    "norm": r"group_?norm|RowwiseMoments|ComputeFusedParams",
    "attention": r"attention|flash|fmha|einsum|softmax|bmm|aten::matmul",
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm|winograd|im2col|nchwToNhwc|nhwcToNchw",
    "product": r"addmm|aten::(mm|linear)\b|gemm|gemv|cublas|cutlass|nvjet|splitK|MmBackward",
}
OTHER = "elementwise and copies"
GAPS = "gaps"
CLASSES = ("convolution", "norm", "attention", "product", "embedding", "update", OTHER, GAPS)
LAUNCH = re.compile(r"^(cuda|cu)(Launch|GraphLaunch|Memcpy|Memset)")
WHOLE = "all steps"

# Number of profiled steps: as many as fit into SECONDS; see `choose_num_steps`.
SECONDS = 1.0
MAX_PROFILED_STEPS = 25
LISTED_OPERATIONS = 48  # operations that a row lists


def classify(name: str) -> str:
    """Return the class of an operation or kernel by its name."""
    found = (kind for kind, pattern in PATTERNS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHER)


@dataclass
class Trace:
    """Profile of several steps; all numbers are per step.

    wall_ms: wall-clock time, profiler included. ms: time by class; `gaps` is the rest: Python and the
    framework on a CPU, an idle device on a GPU. If kernels overlap, the times of their classes add up to more
    than the time that passes. names: time and calls by the name of the operation or kernel. launches: number
    of launches by the host. kernels: number of kernels and copies that ran on the device.
    """

    wall_ms: float
    ms: dict[str, float]
    names: dict[str, tuple[float, float]] = field(default_factory=dict)
    launches: float = 0.0
    kernels: float = 0.0

    @classmethod
    def sum_up(
        cls, wall_us: float, timed: Iterable[tuple[str, str, float]], busy_us: float, steps: int
    ) -> Trace:
        """Add up (class, name, microseconds) over several steps; the gaps are `wall_us` less `busy_us`."""
        by_class: dict[str, float] = defaultdict(float)
        by_name: dict[str, list[float]] = defaultdict(list)
        for kind, name, us in timed:
            by_class[kind] += us
            by_name[name].append(us)
        by_class[GAPS] = max(0.0, wall_us - busy_us)
        unit = 1e3 * steps
        names = {name: (sum(times) / unit, len(times) / steps) for name, times in by_name.items()}
        return cls(wall_us / unit, {name: time / unit for name, time in by_class.items()}, names)

    def row(self) -> Row:
        """Return the fields of a profile's row, with the operations that take longest."""
        names = sorted(self.names.items(), key=lambda item: -item[1][0])[:LISTED_OPERATIONS]
        row: Row = {
            "profiled_ms": round(self.wall_ms, 4),
            "class_ms": {name: round(self.ms.get(name, 0.0), 4) for name in CLASSES},
            "shares": {name: round(self.ms.get(name, 0.0) / self.wall_ms, 4) for name in CLASSES},
            "operations": [[name[:120], round(ms, 4), round(calls, 2)] for name, (ms, calls) in names],
        }
        return row | ({"launches": self.launches, "kernels": self.kernels} if self.kernels else {})


def trace_steps(contender: Contender, steps: int) -> Trace:
    """Profile a contender's first steps; it must have run before, to be warm."""
    from torch.profiler import ProfilerActivity, profile

    cuda = contender.device.type == "cuda"
    with contender.running():
        contender.begin()
        contender.name_parts()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
            with torch.profiler.record_function(WHOLE):
                for i in range(steps):
                    contender.step(i)
                if cuda:
                    torch.cuda.synchronize(contender.device)
    events = profiler.events()
    assert events is not None
    return trace_from_device(events, steps) if cuda else trace_from_host(events, steps)


def trace_from_host(events: Iterable[Any], steps: int) -> Trace:
    """Return the trace of steps on a CPU, from the time that each operation takes without those inside it.

    The time counts for the class of the outermost operation around it that has one: a copy inside a
    convolution counts as convolution.
    """
    events = [event for event in events if _on_host(event)]
    wall = sum(event.time_range.elapsed_us() for event in events if event.name == WHOLE)
    inside = [event for event in events if event.name != WHOLE and WHOLE in _names_above(event)]
    timed = [(_class_of(event), event.name, event.self_cpu_time_total) for event in inside]
    return Trace.sum_up(wall, timed, sum(us for _, _, us in timed), steps)


def trace_from_device(events: Iterable[Any], steps: int) -> Trace:
    """Return the trace of steps on a GPU: kernels and copies by name, and gaps in which none of them runs."""
    host = [event for event in events if _on_host(event)]
    wall = sum(event.time_range.elapsed_us() for event in host if event.name == WHOLE)
    ran = [
        event
        for event in events
        if not (_on_host(event) or event.name == WHOLE or getattr(event, "is_user_annotation", False))
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in ran]
    timed = [(classify(e.name), e.name, end - start) for e, (start, end) in zip(ran, spans, strict=True)]
    trace = Trace.sum_up(wall, timed, union_length(spans), steps)
    trace.launches = sum(bool(LAUNCH.match(event.name)) for event in host) / steps
    trace.kernels = len(spans) / steps
    return trace


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def _names_above(event: Any) -> list[str]:
    """Return the names of an operation and of all operations around it, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _class_of(event: Any) -> str:
    """Return the class of the outermost operation that has one, among an operation and those around it."""
    kinds = [classify(name) for name in _names_above(event)]
    return next((kind for kind in reversed(kinds) if kind != OTHER), OTHER)


def choose_num_steps(ms: float, longest: int, quick: bool) -> int:
    """Return how many steps of `ms` milliseconds to profile.

    It is one chunk of embeddings (`STEPS_PER_CHUNK` steps) if more than a third of it fits into `SECONDS`.
    """
    count = 2 if quick else max(1, min(MAX_PROFILED_STEPS, round(1e3 * SECONDS / ms)))
    return min(STEPS_PER_CHUNK if count > STEPS_PER_CHUNK / 3 else count, longest)


def _profile(entry: Entry, subject: Subject, batch: int, settings: Settings) -> Row:
    """Return the row of a step; there is no trial, because a profile compares nothing."""
    refuse_work(step_flop(subject) * batch, entry.dtype, settings)
    contender = entry.make(subject, Inputs.of(subject, batch, settings.device))
    with contender.running():
        contender.ready()
    steps = choose_num_steps(contender.time_steps(1).ms, subject.steps, settings.quick)
    plain = contender.time_steps(steps)
    row = trace_steps(contender, steps).row()
    return row | {"steps": steps, "ms": round(plain.ms, 4)} | contender.note()


def groups(arguments: argparse.Namespace, settings: Settings) -> Any:
    """Return one group, with a row for every step and contender."""
    from bench.sampling.choice import choose

    chosen = choose(arguments, settings)

    def cases(settings: Settings) -> Iterator[Case]:
        for one in chosen.comparisons(settings):
            for entry in one.entries:
                shape = {"system": one.subject.name, "batch": one.batch, "step": one.kind}
                measure = partial(_profile, entry, one.subject, one.batch)
                yield Case("profile", entry.dtype, entry.name, shape, measure, limit=one.case(entry).limit)

    return {"profile": (1.0, cases)}


SUMMARY = "Profile the guided step: time by class of operation, gaps, longest operations."
main = partial(bench_main, Bench("profile", SUMMARY, ("profile",), groups, add_flags))

if __name__ == "__main__":
    sys.exit(main())
