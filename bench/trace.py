"""Where the time of a step goes, by torch's profiler: operations and kernels in classes, and the gaps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

# The first pattern that a name matches. A convolution of cuDNN's is built on a matrix product and has "gemm"
# in its name too, and so has attention: products come after them.
PATTERNS: tuple[tuple[str, str], ...] = (
    ("update", r"sampler_step|philox|noise_kernel|^update$"),
    ("embedding", r"^embedding$|index_select|gather_row|aten::(embedding|cos|sin)\b"),
    ("norm", r"group_?norm|RowwiseMoments|ComputeFusedParams"),
    ("attention", r"attention|flash|fmha|einsum|softmax|bmm|aten::matmul"),
    (
        "convolution",
        r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm|winograd|im2col|nchwToNhwc|nhwcToNchw",
    ),
    ("product", r"addmm|aten::(mm|linear)\b|gemm|gemv|cublas|cutlass|nvjet|splitK|MmBackward"),
)
OTHER = "elementwise and copies"
GAPS = "gaps"
CLASSES = ("convolution", "norm", "attention", "product", "embedding", "update", OTHER, GAPS)

LAUNCH = re.compile(r"^(cuda|cu)(Launch|GraphLaunch|Memcpy|Memset)")
_COMPILED = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in PATTERNS)


def classify(name: str) -> str:
    """The class of an operation or kernel by its name."""
    for kind, pattern in _COMPILED:
        if pattern.search(name):
            return kind
    return OTHER


@dataclass
class Trace:
    """A profiled stretch of steps; all numbers are of one step.

    wall_ms: on the clock, profiler included. ms: time by class, `gaps` being what none of them fills: Python
    and the framework on a CPU, an idle device on a GPU. Where kernels overlap, their classes' times add up to
    more than the time they fill. names: time and calls by the name of the operation or kernel. launches: what
    the host launched; kernels: what ran on the device.
    """

    wall_ms: float
    ms: dict[str, float]
    names: dict[str, tuple[float, float]] = field(default_factory=dict)
    launches: float = 0.0
    kernels: float = 0.0

    def shares(self) -> dict[str, float]:
        """Each class's part of the clock's time."""
        return {name: self.ms.get(name, 0.0) / self.wall_ms for name in CLASSES}


def traced(fn: Callable[[], object], device: torch.device, steps: int) -> Trace:
    """Profile one call of `fn`, which runs so many steps; it must have run before."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        with torch.profiler.record_function(WHOLE):
            fn()
            if cuda:
                torch.cuda.synchronize(device)
    events = profiler.events()
    assert events is not None
    return of_device(events, steps) if cuda else of_host(events, steps)


WHOLE = "all steps"


def of_host(events: Iterable[Any], steps: int) -> Trace:
    """The trace of steps on a CPU: each operation's own time, in the class of the outermost that has one.

    A copy inside a convolution thus counts as convolution.
    """
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    wall = sum(event.time_range.elapsed_us() for event in events if event.name == WHOLE)
    by_class: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.name == WHOLE or not _inside(event):
            continue
        own = event.self_cpu_time_total
        by_class[_class_of(event)] += own
        by_name[event.name][0] += own
        by_name[event.name][1] += 1
    by_class[GAPS] = max(0.0, wall - sum(by_class.values()))
    return _trace(wall, by_class, by_name, steps)


def of_device(events: Iterable[Any], steps: int) -> Trace:
    """The trace of steps on a GPU: kernels and copies by name; gaps are when none of them runs."""
    events = list(events)
    wall = sum(e.time_range.elapsed_us() for e in events if e.name == WHOLE and _on_host(e))
    by_class: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    spans = []
    launches = 0
    for event in events:
        if _on_host(event):
            launches += bool(LAUNCH.match(event.name))
            continue
        if event.name == WHOLE or getattr(event, "is_user_annotation", False):
            continue
        start, end = event.time_range.start, event.time_range.end
        spans.append((start, end))
        by_class[classify(event.name)] += end - start
        by_name[event.name][0] += end - start
        by_name[event.name][1] += 1
    by_class[GAPS] = max(0.0, wall - covered(spans))
    trace = _trace(wall, by_class, by_name, steps)
    trace.launches, trace.kernels = launches / steps, len(spans) / steps
    return trace


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _trace(wall_us: float, by_class: dict[str, float], by_name: dict[str, list[float]], steps: int) -> Trace:
    unit = 1e3 * steps
    names = {name: (time / unit, count / steps) for name, (time, count) in by_name.items()}
    return Trace(wall_us / unit, {name: time / unit for name, time in by_class.items()}, names)


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def _inside(event: Any) -> bool:
    """Whether an operation belongs to the steps (the profiler's own lie outside)."""
    while event is not None:
        if event.name == WHOLE:
            return True
        event = event.cpu_parent
    return False


def _class_of(event: Any) -> str:
    """The class of the outermost enclosing operation that has one, the operation itself included."""
    found = OTHER
    while event is not None:
        kind = classify(event.name)
        found = kind if kind != OTHER else found
        event = event.cpu_parent
    return found
