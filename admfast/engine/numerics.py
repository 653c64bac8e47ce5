"""Set the numerical settings of the process to a pipeline's while it works, and restore them after."""

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

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def fixed_numerics(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Run the block outside inference mode and autocast, with a fixed rounding of float32 products' factors.

    On CUDA, factors are rounded to TF32 if `tf32` is true. On a CPU, they are never rounded.

    Tensors made in inference mode could never be used with autograd (guidance, `predict`), and autocast would
    change the pipeline's precision. The rounding is a setting of the whole process: it also affects other
    threads that compute at the same time, and if pipelines differ in it, the last one to enter decides. On a
    CPU, torch's threads are reduced to the processors that the process may use (each step then chooses its
    own number: `admfast.engine.threads`).
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if in_autocast(device):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            if device.index is not None:
                stack.enter_context(torch.cuda.device(device))
            stack.enter_context(_TF32.hold(tf32))
        else:
            stack.enter_context(_ON_CPU.hold(False))
            # torch starts one thread per core, even if a container's CPU quota is smaller. More threads than
            # the quota would take turns, and spin while they wait. A smaller number is the user's choice.
            before = torch.get_num_threads()
            if before > 1:
                stack.enter_context(on_threads(min(before, host.usable_cpus())))
        yield


def choose_threads(requested: int | None, default: int) -> int:
    """Return the number of threads of a step: `requested`, else the user's for the process, else `default`.

    A user chooses by OMP_NUM_THREADS or MKL_NUM_THREADS, or by calling `torch.set_num_threads` with another
    number than torch's default. `default` is limited to the current number.
    """
    if requested is not None:
        return requested
    current, set_by_environment = torch.get_num_threads(), any(map(os.environ.get, THREAD_VARIABLES))
    # torch's default is one thread per core or processor, which `fixed_numerics` may reduce to the CPU quota.
    if (
        current == 1
        or set_by_environment
        or current not in (host.usable_cpus(), len(host.processor_ids()), host.usable_cores())
    ):
        return current
    return min(default, current)


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads within the block, then restore the number; other Python threads keep theirs.

    If torch uses another library than OpenMP, this sets the whole process (`torch.set_num_threads`).
    """
    before = torch.get_num_threads()  # also initializes torch's own setting, which would later override this
    if count == before:
        yield
        return
    set_openmp_threads, set_mkl_threads = _thread_setters()
    set_openmp_threads(count)
    mkl_before = set_mkl_threads(count)
    try:
        yield
    finally:
        set_openmp_threads(before)
        set_mkl_threads(mkl_before)


@functools.cache
def _thread_setters() -> tuple[Callable[[int], Any], Callable[[int], int]]:
    """Return the functions that set the calling thread's number of threads for OpenMP, and for MKL.

    MKL's function returns the number before. Both come from the libraries that torch is linked with, because
    a process may have loaded several OpenMP libraries.
    """
    paths = sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    library = ctypes.CDLL(str(paths[0])) if paths else None
    openmp = getattr(library, "omp_set_num_threads", torch.set_num_threads)
    return openmp, getattr(library, "MKL_Set_Num_Threads_Local", lambda count: 0)


class _Tf32Setting:
    """The process's setting of whether factors of float32 products and convolutions may be rounded.

    backends: returns torch's backends that have the setting. older: also save, set and restore the older
    settings, `torch.set_float32_matmul_precision` and cuDNN's `allow_tf32`.

    The first holder saves the setting, and the last one to leave restores it; holders may leave in any order.
    """

    def __init__(self, backends: Callable[[], tuple[Any, ...]], older: bool):
        self.backends, self.has_older_settings = backends, older
        self.lock, self.holders = threading.Lock(), dict[object, bool]()
        self.saved_older: tuple[str, bool] | None = None
        self.saved_newer: list[str] = []

    @contextlib.contextmanager
    def hold(self, allowed: bool) -> Iterator[None]:
        """Allow or forbid rounding of factors to TF32 within the block."""
        holder = object()
        with self.lock:
            if not self.holders:
                self._save()
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

    def _save(self) -> None:
        self.saved_newer = [backend.fp32_precision for backend in self.backends()]
        if not self.has_older_settings:
            return
        try:
            self.saved_older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        except RuntimeError:  # the process has used only the newer settings, and torch refuses to mix the two
            self.saved_older = None

    def _set(self, allowed: bool) -> None:
        if self.saved_older is None:
            for backend in self.backends():
                backend.fp32_precision = "tf32" if allowed else "ieee"
        else:
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            torch.backends.cudnn.allow_tf32 = allowed

    def _restore(self) -> None:
        if self.saved_older is not None:
            torch.set_float32_matmul_precision(self.saved_older[0])
            torch.backends.cudnn.allow_tf32 = self.saved_older[1]
        for backend, value in zip(self.backends(), self.saved_newer, strict=True):
            backend.fp32_precision = value


def _cuda_backends() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _cpu_backends() -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul, mkldnn.conv


_TF32, _ON_CPU = _Tf32Setting(_cuda_backends, older=True), _Tf32Setting(_cpu_backends, older=False)


def peak_memory(device: torch.device) -> int:
    """Return the process's peak memory so far in bytes: of tensors on a CUDA device, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host.peak_memory()
