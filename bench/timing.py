"""The one timer of all benches: medians and quantiles.

On a GPU by Triton's `do_bench`, on a CPU by `torch.utils.benchmark`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import benchmark


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20 % and 80 % quantile, and how many samples they rest on."""

    ms: float
    ms_q20: float
    ms_q80: float
    samples: int


def summarise(times_ms: Sequence[float]) -> Timing:
    """Median and quantiles of times in milliseconds; raises ValueError on an empty sequence."""
    if not times_ms:
        raise ValueError("times_ms is empty: nothing was timed")
    times = torch.tensor(list(times_ms), dtype=torch.float64)
    q20, median, q80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, q20, q80, len(times_ms))


def measure(fn: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """Time `fn` for about `seconds` after a warm-up, and at least three times.

    On a GPU the L2 cache is overwritten before each sample and the clock is the device's own events: work
    that a host issues too slowly is counted as it is, with its gaps. On a CPU torch's current thread count
    is used.
    """
    if device.type == "cuda":
        return summarise(_cuda_times(fn, seconds))
    return summarise(_cpu_times(fn, seconds))


def _cuda_times(fn: Callable[[], object], seconds: float) -> list[float]:
    from triton.testing import do_bench  # type: ignore[import-untyped]

    fn()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    once_ms = (time.perf_counter() - begin) * 1e3
    # do_bench takes int(rep / estimate) samples and its estimate includes the flush: leave it room for three.
    rep = max(seconds * 1e3, 4 * once_ms)
    times = do_bench(fn, warmup=rep / 4, rep=rep, return_mode="all")
    return [float(t) for t in times]


def _cpu_times(fn: Callable[[], object], seconds: float) -> list[float]:
    fn()
    begin = time.perf_counter()
    fn()
    once = time.perf_counter() - begin
    timer = benchmark.Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    times: list[float] = []
    # blocked_autorange stops as soon as min_run_time has passed, be it after a single slow sample.
    while len(times) < 3:
        times += timer.blocked_autorange(min_run_time=max(seconds, 2.5 * once)).times
    return [t * 1e3 for t in times]


@dataclass(frozen=True)
class Spell:
    """Steps run one after another: milliseconds a step, on the clock and until the host had issued it.

    waited: the part of the time that the process's threads were ready but had no CPU. cpu_ms: CPU time of all
    threads; with one thread on a busy machine it says more than the clock.
    """

    ms: float
    host_ms: float
    waited: float
    cpu_ms: float = 0.0


def spell(step: Callable[[int], object], count: int, device: torch.device) -> Spell:
    """Run step(0) .. step(count - 1) and time them together, as a loop runs them.

    From an idle device to an idle device: where the host is the slower one, its time is what counts. No cache
    is flushed, as none is between the steps of a sampling loop.
    """
    _synchronise(device)
    queued, used, begin = queue_seconds(), time.process_time(), time.perf_counter()
    for i in range(count):
        step(i)
    issued = time.perf_counter()
    _synchronise(device)
    seconds = time.perf_counter() - begin
    used = time.process_time() - used
    waited = max(0.0, queue_seconds() - queued) / seconds
    unit = 1e3 / count
    return Spell(unit * seconds, unit * (issued - begin), waited, unit * used)


def in_turns(
    takers: Mapping[str, Callable[[int], Spell]],
    seconds: float,
    rounds: int,
    *,
    together: int = 1,
    longest: int = 1000,
    budget: float = math.inf,
) -> dict[str, list[Spell]]:
    """Samples of several, taken in turns, so that what a machine does meanwhile meets all of them alike.

    Args:
        takers: taker(count) runs so many steps and says what they took. Each has run once before.
        seconds: a sample lasts about so long, or one step; the step that finds the size is then the first.
        rounds: samples of each; every second round goes backwards through them.
        together: steps that share work done once for so many; a sample that comes near is a multiple of it.
        longest: steps of a sample at most.
        budget: seconds after which no further round begins.
    """
    end = time.monotonic() + budget
    ones = {name: taker(1) for name, taker in takers.items()}
    counts = {}
    for name, one in ones.items():
        count = math.ceil(1e3 * seconds / one.ms)
        if count > together / 3:
            count = math.ceil(count / together) * together
        counts[name] = min(count, longest)
    spells: dict[str, list[Spell]] = {name: [] for name in takers}
    for i in range(rounds):
        if i and time.monotonic() > end:
            break
        for name in list(takers)[:: -1 if i % 2 else 1]:
            known = i == 0 and counts[name] == 1
            spells[name].append(ones[name] if known else takers[name](counts[name]))
    return spells


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def queue_seconds() -> float:
    """Seconds this process's threads were so far ready but without a CPU; 0 where the system can't say.

    What else runs on a machine shows here and hardly in a quantile: two threads that meet after each
    operation wait a scheduler's slice, milliseconds, for whichever was put aside.
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # a thread that ended meanwhile
    return total / 1e9


def peak_mb(fn: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory (1e6 bytes) allocated during a second call of `fn`, inputs included; None on a CPU.

    The second call, because the first may search for an algorithm and borrow workspace for it.
    """
    if device.type != "cuda":
        return None
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def captured(fn: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `repeats` calls of `fn`, captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            fn()
    return graph
