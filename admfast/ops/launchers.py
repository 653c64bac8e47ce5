"""Triton: whether its kernels can run in this process, why not, and the raw launchers of `kernels/`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from admfast._source_tree import kernels
from admfast.ops.transforms import constant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@constant
@functools.cache
def interpreted() -> bool:
    """Tell whether Triton's interpreter was asked for; as Triton reads it, without importing it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@constant
@functools.cache
def reason_missing() -> str | None:
    """None where the kernels can run on some device, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreted():
        if not torch.cuda.is_available():
            return "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        if torch.cuda.get_device_capability() < (8, 0):
            return "the CUDA device is older than compute capability 8.0"
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "triton needs a C compiler (gcc, clang or CC) for its launchers"
    return None


def reason_unasked() -> str | None:
    """Say why it is not to be chosen where nobody named it."""
    return "triton's interpreter is for tests" if interpreted() else None


@functools.cache
def launcher(file: str, name: str) -> Callable[..., Any]:
    """Return a raw launcher of a file of `kernels/`; importing it imports triton."""
    kernels()
    found: Callable[..., Any] = getattr(importlib.import_module(f"admfast.kernels.{file}"), name)
    return found
