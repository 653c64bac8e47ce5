"""CUDA graphs of a prepared step: one of the guided body, one of the unguided."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from admfast.errors import first_line

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")
WARM_UPS = 3  # compiles kernels and lets cuDNN search, which neither may happen while capturing
# torch allows one capture at a time in a process; cuDNN's setting is the process's too.
_CAPTURING = threading.Lock()


def capture(step: PreparedStep) -> None:
    """Run a step's rows by replaying graphs from now on; where CUDA refuses, as before, and say why.

    The step must not be filled yet: warming up writes to its buffers. Errors of the networks themselves show
    in the warm-up, and are raised, as is a lack of memory in the capture.
    """
    device, outer = step.state.x.device, sys.exception()
    with _CAPTURING, torch.cuda.device(device), torch.no_grad(), _searching():
        here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for body in step.run.values():
                for _ in range(WARM_UPS):
                    step.counters.zero_()
                    body()
        here.wait_stream(side)
        torch.cuda.synchronize(device)
        try:
            step.run.update(_captured(step.run, side))
        except RuntimeError as error:
            first = first_of(error, outer)
            if isinstance(first, torch.cuda.OutOfMemoryError):
                raise first from None
            step.refused = first_line(first)
            LOG.warning("rows are launched one by one: no CUDA graph of the step (%s)", step.refused)
        finally:
            # Where the end of a capture raises, torch leaves its stream the current one.
            torch.cuda.set_stream(here)


def _captured(
    bodies: dict[bool, Callable[[], None]], stream: torch.cuda.Stream
) -> dict[bool, Callable[[], None]]:
    """The replays of the bodies, captured on `stream` and with one pool of memory, as they never overlap."""
    pool, captured = torch.cuda.graph_pool_handle(), {}
    for guided, body in bodies.items():
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for captures is of the device that was current when the process first captured.
        # Only this thread's calls are watched: a user's other threads may go on working.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            body()
        captured[guided] = graph.replay
    return captured


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
