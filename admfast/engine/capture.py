"""CUDA graphs of a prepared step: one of the guided body, one of the unguided."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from admfast.errors import first_line
from admfast.ops.dispatch import watch

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")
WARM_UPS = 3  # compiles kernels and lets cuDNN search, which neither may happen while capturing
# Streams of this priority come from a ring of their own: torch hands out 32 streams in turn, and a capture on
# one that a user's thread works on would take that thread's kernels in.
PRIORITY = -1
# torch allows one capture at a time in a process; cuDNN's setting is the process's too.
_CAPTURING = threading.Lock()


def capture(step: PreparedStep) -> None:
    """Run a step's rows by replaying graphs from now on; where CUDA refuses, as before, and say why.

    The step must not be filled yet: warming up writes to its buffers. Errors of the networks themselves show
    in the warm-up, and are raised, as is a lack of memory in the capture. Until this returns, another thread
    that draws from CUDA's default generator gets an error from torch: every capture takes the generator in.
    """
    device, outer = step.state.x.device, sys.exception()
    with _CAPTURING, torch.cuda.device(device), torch.no_grad(), _searching():
        here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device, priority=PRIORITY)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for guided, body in step.run.items():
                for _ in range(WARM_UPS):
                    step.counters.zero_()
                    with watch() as step.choices[guided]:  # a replay chooses nothing
                        body()
        here.wait_stream(side)
        torch.cuda.synchronize(device)
        # A workspace made while warming up lies outside the graphs' pool, where whoever clears it leaves
        # the graphs with an address that is no longer theirs; so does one that the graphs leave behind.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with _uncollected():
                step.run.update(_captured(step.run, side, here))
            step.captured = True
        except RuntimeError as error:
            first = first_of(error, outer)
            try:
                # An interrupt is no refusal either.
                if isinstance(first, torch.cuda.OutOfMemoryError) or not isinstance(first, Exception):
                    raise first from None
                step.refused = first_line(first)
            finally:
                # A frame that holds the error it raises is a cycle, which keeps the attempt's memory.
                del first
            LOG.warning("rows are launched one by one: no CUDA graph of the step (%s)", step.refused)
        finally:
            torch._C._cuda_clearCublasWorkspaces()


def _captured(
    bodies: dict[bool, Callable[[], None]], stream: torch.cuda.Stream, home: torch.cuda.Stream
) -> dict[bool, Callable[[], None]]:
    """Capture the bodies on `stream` and return their replays; they share a pool, as they never overlap."""
    pool, outer = torch.cuda.graph_pool_handle(), sys.exception()
    captured = {}
    for guided, body in bodies.items():
        graph, finished = torch.cuda.CUDAGraph(), False
        try:
            # torch's own stream for captures is of the device that was current when the process first
            # captured. Only this thread's calls are watched: a user's other threads may go on working.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                body()
                finished = True
        except RuntimeError as error:
            # Where the end of a capture raises, torch leaves its stream the current one.
            torch.cuda.set_stream(home)
            if finished or first_of(error, outer) is not error:
                _clean_up(stream.device, pool)
            raise
        captured[guided] = graph.replay
    return captured


def _clean_up(device: torch.device, pool: Any) -> None:
    """Give back what a capture that could not end still holds: its pool, and CUDA's default generator.

    torch 2.11 throws before it does so. Its allocator then frees nothing, even out of memory, and every later
    random number on the device is refused, until a capture has ended well. Later versions do it themselves.
    """
    if torch.__version__ >= "2.12":
        return
    torch._C._cuda_endAllocateToPool(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)
    number = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        number.add_(1)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's collector out of a capture: it may destroy an old graph, which ends the new one."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def first_of(error: BaseException, outer: BaseException | None) -> BaseException:
    """The error that led to this one: what ends a capture early makes its end raise another error.

    outer: what the caller was handling when the capture began, which did not lead to it.
    """
    while error.__context__ not in (None, outer):
        error = error.__context__
    return error


@contextlib.contextmanager
def _searching() -> Iterator[None]:
    """Let cuDNN measure its algorithms for every shape and take the fastest, unless they must be the same."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    if not cudnn.deterministic and not torch.are_deterministic_algorithms_enabled():
        cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = before
