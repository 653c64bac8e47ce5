"""Capture CUDA graphs of a prepared step: one for each kind of row."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from admfast.engine.guidance import RowKind
from admfast.errors import first_line
from admfast.ops.dispatch import record_choices

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")
WARM_UPS = 3  # these compile kernels and let cuDNN search; neither is possible during a capture
# torch hands out 32 streams in turn for each priority. A capture on a stream that a user's thread uses would
# record that thread's kernels, so captures have a priority of their own.
CAPTURE_PRIORITY = -1
# torch allows one capture at a time in a process, and cuDNN's setting belongs to the process too.
_CAPTURING = threading.Lock()


def capture(step: PreparedStep) -> None:
    """Capture a step's bodies, so that its rows replay graphs; if CUDA refuses, log why and change nothing.

    The step must not be filled yet: the warm-up writes to its buffers. Errors of the networks occur in the
    warm-up and are raised, as is running out of memory during the capture. Until this returns, torch raises
    an error in other threads that draw from CUDA's default generator, because every capture occupies it.
    """
    device, outer = step.state.x.device, sys.exception()
    with _CAPTURING, torch.cuda.device(device), torch.no_grad(), _cudnn_search():
        caller_stream, capture_stream = (
            torch.cuda.current_stream(device),
            torch.cuda.Stream(device, priority=CAPTURE_PRIORITY),
        )
        capture_stream.wait_stream(caller_stream)
        with torch.cuda.stream(capture_stream):
            for kind, body in step.bodies.items():
                for _ in range(WARM_UPS):
                    step.counters.zero_()
                    # Recorded now, because a replay chooses nothing.
                    with record_choices() as step.choices[kind]:
                        body()
        caller_stream.wait_stream(capture_stream)
        torch.cuda.synchronize(device)
        # Clear cuBLAS's workspaces before and after the capture: if the graphs used a workspace from the
        # warm-up, or left one behind, other code could clear it later and invalidate their address of it.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with _no_garbage_collection():
                step.bodies.update(_capture_bodies(step.bodies, capture_stream, caller_stream))
            step.captured = True
        except RuntimeError as error:
            cause = root_cause(error, outer)
            try:
                # Neither a lack of memory nor an interrupt means that CUDA refuses.
                if isinstance(cause, torch.cuda.OutOfMemoryError) or not isinstance(cause, Exception):
                    raise cause from None
                step.refusal = first_line(cause)
            finally:
                # A frame that holds the error it raises is a reference cycle, which would keep the memory of
                # the failed capture.
                del cause
            LOG.warning("kernels are launched one by one: no CUDA graph of the step (%s)", step.refusal)
        finally:
            torch._C._cuda_clearCublasWorkspaces()


def _capture_bodies(
    bodies: dict[RowKind, Callable[[], None]], stream: torch.cuda.Stream, caller_stream: torch.cuda.Stream
) -> dict[RowKind, Callable[[], None]]:
    """Capture the bodies on `stream`; return their replays, which share memory because they never overlap."""
    pool, outer = torch.cuda.graph_pool_handle(), sys.exception()
    captured = {}
    for kind, body in bodies.items():
        graph, finished = torch.cuda.CUDAGraph(), False
        try:
            # `stream`, because torch's own stream for captures belongs to the device of the process's first
            # capture. "thread_local" checks only this thread's calls: other threads may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                body()
                finished = True
        except RuntimeError as error:
            # If the end of a capture raises, the capture's stream remains the current one.
            torch.cuda.set_stream(caller_stream)
            if finished or root_cause(error, outer) is not error:
                _clean_up(stream.device, pool)
            raise
        captured[kind] = graph.replay
    return captured


def _clean_up(device: torch.device, pool: Any) -> None:
    """Release the resources of a failed capture: its memory pool, and CUDA's default generator.

    torch 2.11 raises before it releases them. Its allocator then frees nothing, even if memory runs out, and
    every later random number on the device is an error, until a capture ends successfully. Later versions
    release them.
    """
    if torch.__version__ >= "2.12":
        return
    torch._C._cuda_endAllocateToPool(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)
    number = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        number.add_(1)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off during a capture: destroying an old graph would end the new one."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def root_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return the error that caused this one: after an error, the end of the capture raises another error.

    outer: the exception that the caller was handling when the capture began; it is not the cause.
    """
    while error.__context__ not in (None, outer):
        error = error.__context__
    return error


@contextlib.contextmanager
def _cudnn_search() -> Iterator[None]:
    """Let cuDNN time its algorithms for each shape and use the fastest, unless they must be deterministic."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    if not cudnn.deterministic and not torch.are_deterministic_algorithms_enabled():
        cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = before
