"""The numerical settings of a process, held at a pipeline's own while it works and given back after."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from admfast import host
from admfast.ops.transforms import in_autocast

CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def own_numerics(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Run a block outside inference mode and autocast, with rounded factors of float32 products as said.

    On CUDA factors are rounded to TF32 where `tf32` says so; on a CPU never, to TF32 or to bfloat16.

    Tensors made in inference mode could not serve autograd (guidance, `predict`) ever after; autocast would
    change a pipeline's precision behind its back. These settings belong to the whole process: another
    thread that computes at the same time sees them, and of pipelines that differ in them the one
    that came last decides. On a CPU torch's threads stay as they are, but for those that the process has no
    processor for (a step has a number of its own: `admfast.engine.threads`).
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
            # torch begins with a thread a core, whatever quota of processor time a container has: those that
            # have none wait in turns for each other, busily. Fewer than allowed are somebody's choice.
            before = torch.get_num_threads()
            if before > 1:
                stack.enter_context(on_threads(min(before, host.cpus())))
        yield


def chosen_threads(asked: int | None, own: int) -> int:
    """Return the threads of a step: the number asked for, else the process's user's, else its own.

    A user chooses by OMP_NUM_THREADS or MKL_NUM_THREADS, or by giving `torch.set_num_threads` another number
    than torch begins with.
    """
    if asked is not None:
        return asked
    now, chosen = torch.get_num_threads(), any(map(os.environ.get, CHOSEN_BY))
    # Torch begins with a thread a core or processor; of these as many are left as a quota allows.
    if now == 1 or chosen or now not in (host.cpus(), len(host.processors()), host.cores()):
        return now
    return min(own, now)


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on so many threads within the block, and give the setting back; other threads keep theirs.

    Where torch runs on another library than OpenMP, the setting is the process's (`torch.set_num_threads`).
    """
    before = torch.get_num_threads()  # also begins torch's own setting, which would else override ours
    if count == before:
        yield
        return
    openmp, mkl = _setters()
    openmp(count)
    products = mkl(count)
    try:
        yield
    finally:
        openmp(before)
        mkl(products)


@functools.cache
def _setters() -> tuple[Callable[[int], Any], Callable[[int], int]]:
    """Return the functions that set the calling thread's number for OpenMP, and for MKL, which returns it.

    They are taken from the libraries that torch itself is linked with: a process may hold several OpenMPs.
    """
    found = sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    library = ctypes.CDLL(str(found[0])) if found else None
    openmp = getattr(library, "omp_set_num_threads", torch.set_num_threads)
    return openmp, getattr(library, "MKL_Set_Num_Threads_Local", lambda count: 0)


class _Rounding:
    """Set what factors of float32 products and convolutions may be rounded to, for the whole process.

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
    """Return the most bytes that this process held so far: of tensors on a GPU, or of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host.peak_memory()
