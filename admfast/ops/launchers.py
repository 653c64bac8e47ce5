"""Tell whether the Triton kernels of `kernels/` can run in this process, and import their raw launchers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from admfast._source_tree import import_kernels
from admfast.ops.transforms import constant_while_tracing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@constant_while_tracing
@functools.cache
def uses_interpreter() -> bool:
    """Tell whether TRITON_INTERPRET turns on Triton's interpreter, without importing Triton."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@constant_while_tracing
@functools.cache
def reason_missing() -> str | None:
    """Return None if the kernels can run on some device, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not uses_interpreter():
        if not torch.cuda.is_available():
            return "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        if torch.cuda.get_device_capability() < (8, 0):
            return "the CUDA device is older than compute capability 8.0"
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "triton needs a C compiler (gcc, clang or CC) for its launchers"
    return None


def reason_named_only() -> str | None:
    """Return the reason why Triton should run only if it is named, or None."""
    return "triton's interpreter is for tests" if uses_interpreter() else None


@functools.cache
def launcher(file: str, name: str) -> Callable[..., Any]:
    """Return the raw launcher `name` of `kernels/<file>.py`; this imports triton."""
    import_kernels()
    function: Callable[..., Any] = getattr(importlib.import_module(f"admfast.kernels.{file}"), name)
    return function
