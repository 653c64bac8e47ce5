"""The numerical settings of a process, held at a pipeline's own while it works and given back after."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from admfast import host
from admfast.ops.transforms import in_autocast


@contextlib.contextmanager
def own_numerics(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Run a block outside inference mode and autocast, with rounded factors of float32 products as said.

    On CUDA factors are rounded to TF32 where `tf32` says so; on a CPU never, to TF32 or to bfloat16.

    Tensors made in inference mode could not serve autograd (guidance, `predict`) ever after; autocast would
    change a pipeline's precision behind its back. These settings belong to the whole process: another
    thread that computes at the same time sees them, and of pipelines that differ in them the one
    that came last decides. On a CPU torch's threads stay as they are, but for those that the process has no
    processor for.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if in_autocast(device):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            if device.index is not None:
                stack.enter_context(torch.cuda.device(device))
            stack.enter_context(_TF32.held_at(tf32))
        else:
            stack.enter_context(_ON_CPU.held_at(False))
            stack.enter_context(_no_idle_threads())
        yield


@contextlib.contextmanager
def _no_idle_threads() -> Iterator[None]:
    """Compute on no more threads than there are processors for, and give the setting back.

    torch begins with one for each core that the process may run on, which a container's quota of processor
    time doesn't change: threads that have none wait in turns for each other, busily, and everything takes
    many times as long. Fewer threads than processors are somebody's choice.
    """
    before = torch.get_num_threads()
    limited = before > 1 and before > (allowed := host.cpus())
    if limited:
        torch.set_num_threads(allowed)
    try:
        yield
    finally:
        if limited:
            torch.set_num_threads(before)


class _Rounding:
    """What factors of float32 products and convolutions may be rounded to: one setting for a process.

    backends: torch's, whose setting it is. older: hold what `torch.set_float32_matmul_precision` set, too.

    The first to hold it notes what it was, and the last restores that, in whatever order they leave.
    """

    def __init__(self, backends: Callable[[], tuple[Any, ...]], older: bool):
        self.backends, self.has_older = backends, older
        self.lock, self.holders = threading.Lock(), dict[object, bool]()
        self.older: tuple[str, bool] | None = None
        self.newer: list[str] = []

    @contextlib.contextmanager
    def held_at(self, allowed: bool) -> Iterator[None]:
        """Let factors be rounded to TF32, or not, within the block."""
        holder = object()
        with self.lock:
            if not self.holders:
                self._note()
            self.holders[holder] = allowed
            self._set(allowed)
        try:
            yield
        finally:
            with self.lock:
                del self.holders[holder]
                if self.holders:
                    self._set(list(self.holders.values())[-1])
                else:
                    self._restore()

    def _note(self) -> None:
        self.newer = [backend.fp32_precision for backend in self.backends()]
        if not self.has_older:
            return
        try:
            self.older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        except RuntimeError:  # the process uses the newer settings alone, and torch refuses to mix the two
            self.older = None

    def _set(self, allowed: bool) -> None:
        if self.older is None:
            for backend in self.backends():
                backend.fp32_precision = "tf32" if allowed else "ieee"
        else:
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            torch.backends.cudnn.allow_tf32 = allowed

    def _restore(self) -> None:
        if self.older is not None:
            torch.set_float32_matmul_precision(self.older[0])
            torch.backends.cudnn.allow_tf32 = self.older[1]
        for backend, value in zip(self.backends(), self.newer, strict=True):
            backend.fp32_precision = value


def _cuda_backends() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _cpu_backends() -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul, mkldnn.conv


_TF32, _ON_CPU = _Rounding(_cuda_backends, older=True), _Rounding(_cpu_backends, older=False)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process held so far: tensors on a GPU, or of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
