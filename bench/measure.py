"""Measurement of one case: compare its output with a reference, then time it.

All benches use the same timers: Triton's `do_bench` on a GPU, `torch.utils.benchmark` on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import benchmark

from bench.results import Row

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
ROW_SECONDS = 60.0  # limit for the calls of a row
CASE_SECONDS = 2 * ROW_SECONDS  # limit for the whole row: inputs, comparison and compilation too
CALLS = 6  # fewest calls of a row: to compare, to find the size of a sample, to time

ROOT = Path(__file__).resolve().parents[1]

T = TypeVar("T")


class Unavailable(Exception):
    """This device or this torch can't run the case; the message is the row's reason."""


class WrongResult(Exception):
    """The output differs from the reference; the message is the row's reason."""


class TooSlow(Exception):
    """The row would exceed its time limit; the message is the row's reason."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    seconds: time for the samples of one row. quick: only test the bench itself. again: measure disturbed rows
    once more. begin: called with each case before it begins, so that a case that hangs can be stopped. limit:
    seconds that a case may take.
    """

    device: torch.device
    seconds: float = 0.06
    quick: bool = False
    again: bool = False
    begin: Callable[[Case], None] = lambda case: None
    limit: float = CASE_SECONDS

    @property
    def cuda(self) -> bool:
        """Tell whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    def some(self, by_device: Mapping[str, Sequence[T]], few: int = 1) -> Sequence[T]:
        """Return the device's values, only the first `few` of them if `quick`."""
        return by_device[self.device.type][: few if self.quick else None]


Measure = Callable[[Settings], Row]


@dataclass(frozen=True)
class Case:
    """A row before it is measured: its name, and the function that measures it and returns its fields.

    measure: builds inputs, compares and times. note: further fields of the row. limit: seconds after which it
    is stopped and its row says "too slow". measured_with: an object shared by the cases that are measured
    at the same time; its `leave_out(case)` leaves out one that can't be measured.
    """

    kind: str
    dtype: str
    provider: str
    shape: Mapping[str, Any]
    measure: Measure
    note: Row = field(default_factory=dict)
    limit: float = CASE_SECONDS
    measured_with: Any = None


def measure_call(
    fn: Callable[[], Any],
    settings: Settings,
    *,
    check: Callable[[Any], float] | None = None,
    flop: float | None = None,
    nbytes: float | None = None,
    small_call: tuple[Callable[[], object], float] | None = None,
    gradient: bool = False,
) -> Row:
    """Compare and time `fn`; return the row's fields.

    Args:
        fn: the call. It runs in inference mode unless it takes a `gradient`.
        settings: device and seconds.
        check: the relative error of what `fn` returns; raises WrongResult.
        flop, nbytes: operations and bytes of one call, for the rates.
        small_call: a call on a part of the input, and the number of such parts in the whole input; it is
            timed first, to estimate the time of `fn`.
        gradient: whether `fn` takes a gradient.

    Raises:
        TooSlow: the calls of this row would take longer than `ROW_SECONDS` or half of its limit.
    """
    with contextlib.nullcontext() if gradient else torch.inference_mode():
        if small_call is not None:
            # Twice, because the first call may initialise a library.
            refuse_slow(small_call[1] * min(seconds_of(small_call[0]) for _ in range(2)), settings.limit)
        out = fn()
        error = None if check is None else check(out)
        del out
        seconds_per_call = seconds_of(fn)  # not the first call, which may compile or search
        refuse_slow(seconds_per_call, settings.limit)
        peak = peak_mb(fn, settings.device)
        queue_before, begin = queue_seconds(), time.perf_counter()
        times_ms = (_cuda_times if settings.cuda else _cpu_times)(fn, settings.seconds, seconds_per_call)
        waited_share = max(0.0, queue_seconds() - queue_before) / (time.perf_counter() - begin)
    row: Row = quantiles(times_ms) | {"samples": len(times_ms), "waited": round(waited_share, 3)}
    if flop is not None:
        row |= {"flop": int(flop), "tflops": round_to_5_digits(flop / row["ms"] / 1e9)}
    if nbytes is not None:
        row |= {"bytes": int(nbytes), "gbps": round_to_5_digits(nbytes / row["ms"] / 1e6)}
    if peak is not None:
        row["peak_mb"] = round_to_5_digits(peak)
    return row if error is None else row | {"rel_err": float(f"{error:.2e}")}


def refuse_slow(seconds: float, limit: float) -> None:
    """Raise TooSlow if `CALLS` calls of `seconds` each would be too long for a case with this limit."""
    allowed = min(ROW_SECONDS, limit / 2)
    if CALLS * seconds > allowed:
        raise TooSlow(f"about {seconds:.3g} s a call; a row's calls may take {allowed:.0f} s")


def refuse_work(flop: float, dtype: str, settings: Settings) -> None:
    """Raise TooSlow if `CALLS` calls of `flop` operations exceed the limit at a matrix product's rate."""
    n = 512
    a = torch.ones(n, n, device=settings.device, dtype=DTYPES.get(dtype, torch.float32))
    seconds = min(seconds_of(lambda: a @ a) for _ in range(3)) * flop / (2 * n**3)
    if CALLS * seconds > settings.limit:
        raise TooSlow(f"about {seconds:.3g} s a call; all may take {settings.limit:.0f} s")


def seconds_of(fn: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    begin = time.perf_counter()
    fn()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def round_to_5_digits(value: float) -> float:
    """Round to five significant digits, the precision of numbers in rows."""
    return float(f"{value:.5g}")


def quantiles(times_ms: Sequence[float]) -> Row:
    """Return {"ms", "ms_q20", "ms_q80"}: median, 20 % and 80 % quantile of times in milliseconds.

    Raises: ValueError for an empty sequence.
    """
    if not times_ms:
        raise ValueError("times_ms is empty: nothing was timed")
    times = torch.tensor(list(times_ms), dtype=torch.float64)
    found = torch.quantile(times, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return {name: round_to_5_digits(ms) for name, ms in zip(("ms", "ms_q20", "ms_q80"), found, strict=True)}


def check_error(out: torch.Tensor, ref64: torch.Tensor, limit: float) -> float:
    """Return |out - ref| / |ref| in float64; raise WrongResult if it exceeds `limit` or is NaN."""
    out, ref64 = out.detach(), ref64.detach().double().cpu()
    error = float((out.double().cpu() - ref64).norm() / ref64.norm())
    if not error <= limit:
        raise WrongResult(f"relative error {error:.2e} exceeds {limit:.2e}")
    return error


def product_limit(
    dtype: str, length: int, out_dtype: torch.dtype | None = None, *, fast: bool = False
) -> float:
    """Return the largest relative error allowed for a sum of `length` products.

    It is output rounding plus accumulation. The reference uses the same rounded operands, so their rounding
    adds no error, except in tf32, which rounds each operand to 10 bits inside. Accumulators are float32, and
    their errors grow like a random walk. Tensor cores keep 13 bits of an fp8 sum; with fast accumulation
    every 32 products are added to such a sum.
    """
    rounding = torch.finfo(out_dtype or DTYPES[dtype]).eps
    if dtype == "tf32":
        rounding += 2 * 2.0**-10
    if dtype == "fp8":
        rounding += (length / 32 if fast else 128 / 32) * 2.0**-13
    return rounding + torch.finfo(torch.float32).eps * length**0.5


@contextlib.contextmanager
def numerics(dtype: str) -> Iterator[None]:
    """Let float32 products run in tf32 (dtype "tf32") or full float32 (any other), and cuDNN search.

    cuDNN tries its algorithms once per shape and keeps the fastest. The former settings are restored.
    """
    cudnn, tf32 = torch.backends.cudnn, dtype == "tf32"
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark = tf32, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, at most 300 characters, or else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def unavailable(reason: str) -> Measure:
    """Return a `measure` for a case that can't be measured, which raises Unavailable with the reason."""

    def refuse(settings: Settings) -> Row:
        raise Unavailable(reason)

    return refuse


def compile_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with torch.compile; first reset Dynamo, which stops after eight compilations."""
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, dynamic=False)


def _cuda_times(fn: Callable[[], object], seconds: float, seconds_per_call: float) -> list[float]:
    """Return milliseconds by the device's events; the L2 cache is overwritten before each sample."""
    from triton.testing import do_bench  # type: ignore[import-untyped]

    # do_bench takes int(rep / estimate) samples; its estimate includes the flush: leave time for three.
    rep = 1e3 * max(seconds, 4 * seconds_per_call)
    return [float(t) for t in do_bench(fn, warmup=rep / 4, rep=rep, return_mode="all")]


def _cpu_times(fn: Callable[[], object], seconds: float, seconds_per_call: float) -> list[float]:
    """Return wall-clock milliseconds with torch's number of threads, in at least three samples."""
    timer = benchmark.Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    times: list[float] = []
    # blocked_autorange stops as soon as min_run_time has passed, even after a single slow sample.
    while len(times) < 3:
        times += timer.blocked_autorange(min_run_time=max(seconds, 2.5 * seconds_per_call)).times
    return [t * 1e3 for t in times]


def queue_seconds() -> float:
    """Return the seconds that threads of this process were ready but had no CPU so far; 0 if unknown.

    Other load on the machine shows here more clearly than in quantiles: when two threads synchronise after
    each operation and one is descheduled, the other waits for a time slice of milliseconds.
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # the thread has ended
    return total / 1e9


def run_in_process(code: str, environment: Mapping[str, str]) -> Any:
    """Run Python code in a new process, and return the JSON in the last line that it prints.

    Raises: RuntimeError with the last line of its errors if it fails or prints nothing.
    """
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (finished.stderr if finished.returncode else finished.stdout).strip().splitlines()
    if finished.returncode or not lines:
        raise RuntimeError(
            f"the process ended with {finished.returncode}: {lines[-1] if lines else 'silent'}"
        )
    return json.loads(lines[-1])


def peak_mb(fn: Callable[[], object], device: torch.device) -> float | None:
    """Return the largest device memory (1e6 bytes) during a call of `fn`, inputs included; None on a CPU.

    `fn` must have run before, because its first call may take memory to search for an algorithm.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


@dataclass(frozen=True)
class Sample:
    """Times of steps that ran one after another.

    ms: wall-clock milliseconds per step. host_ms: milliseconds per step until the host had issued it. waited:
    the share of the time in which threads were ready but had no CPU. cpu_ms: CPU time of all threads per
    step; with one thread on a busy machine it is more reliable than the clock.
    """

    ms: float
    host_ms: float
    waited: float
    cpu_ms: float = 0.0


def sample(step: Callable[[int], object], count: int) -> Sample:
    """Run step(0) to step(count - 1) as a loop does, and time them together.

    The time is from an idle device to an idle device, so it is the host's time if the host is slower. No
    cache is flushed, as in a sampling loop.
    """

    def synchronise() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    synchronise()
    queue_before, cpu_seconds, begin = queue_seconds(), time.process_time(), time.perf_counter()
    for i in range(count):
        step(i)
    issued_at = time.perf_counter()
    synchronise()
    seconds = time.perf_counter() - begin
    cpu_seconds = time.process_time() - cpu_seconds
    waited = max(0.0, queue_seconds() - queue_before) / seconds
    ms_per_step = 1e3 / count
    return Sample(ms_per_step * seconds, ms_per_step * (issued_at - begin), waited, ms_per_step * cpu_seconds)


def sample_in_turns(
    samplers: Mapping[T, Callable[[int], Sample]],
    seconds: float,
    rounds: int,
    *,
    steps_per_chunk: int = 1,
    max_steps: int = 1000,
    budget: float = math.inf,
) -> dict[T, list[Sample]]:
    """Sample several contenders in turns, so that other load on the machine affects all of them alike.

    Args:
        samplers: by name, functions that run `count` steps and return their sample. Each has run before.
        seconds: approximate length of a sample, which has at least one step. If it has just one, the step
            that measured this length is the first sample.
        rounds: number of samples of each; every second round takes them in reverse order.
        steps_per_chunk: number of steps that share some work. A sample of more than a third of it is rounded
            up to a multiple.
        max_steps: largest number of steps of a sample.
        budget: seconds after which no further round begins.
    """
    end = time.monotonic() + budget
    single_steps = {name: sampler(1) for name, sampler in samplers.items()}
    counts = {}
    for name, single in single_steps.items():
        count = math.ceil(1e3 * seconds / single.ms)
        if count > steps_per_chunk / 3:
            count = math.ceil(count / steps_per_chunk) * steps_per_chunk
        counts[name] = min(count, max_steps)
    samples: dict[T, list[Sample]] = {name: [] for name in samplers}
    for i in range(rounds):
        if i and time.monotonic() > end:
            break
        for name in list(samplers)[:: -1 if i % 2 else 1]:
            already_sampled = i == 0 and counts[name] == 1
            samples[name].append(single_steps[name] if already_sampled else samplers[name](counts[name]))
    return samples
