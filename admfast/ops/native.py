"""The compiled extension: loaded on first use, and the reason where it can't be."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from admfast.errors import Unavailable, invalid
from admfast.ops.transforms import constant

ISA = "ADMFAST_CPU_ISA"
ISAS = ("avx512_bf16", "avx512", "avx2", "generic")
TOLD = "fakes_are_registered"  # kept where the ops are, which a second import finds
BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"
Fake = TypeVar("Fake", bound=Callable[..., Any])
_FAKES: dict[str, Callable[..., Any]] = {}


@constant
@functools.cache
def reason_missing() -> str | None:
    """Load the extension: None where it loads, else why it doesn't.

    Raises InvalidArgument or Unavailable for an instruction set asked for that isn't known or isn't here.
    """
    asked = os.environ.get(ISA)
    if asked and asked not in ISAS:
        raise invalid(ISA, asked, f"one of {', '.join(ISAS)}; not set, the widest that runs here")
    built = build_info()
    # Of another version it may load, and lay out tensors otherwise.
    if (other := built.get("torch")) and other.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"not loaded: built for torch {other}, this is {torch.__version__}"
    try:
        importlib.import_module("admfast._C")
    except ImportError as error:
        return f"not built: {built['reason']}" if built.get("built") == "none" else f"not loaded: {error}"
    if asked and instruction_set() != asked:
        raise Unavailable(f"{ISA}={asked!r}: this machine can't run it")
    _register_fakes()
    return None


def instruction_set() -> str:
    """The loops that the C++ ops of this process run; the extension must be loaded."""
    return torch.ops.admfast.cpu_instruction_set()


@constant
def reason_missing_cuda() -> str | None:
    """None where the extension loads, was built with CUDA and finds a device, else why not."""
    reason = reason_missing()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("admfast::sampler_step_", "CUDA"):
        return f"not built: {build_info().get('reason') or 'the extension has no CUDA part'}"
    return None if torch.cuda.is_available() else "no CUDA device"


def ops() -> Any:
    """The namespace of the compiled ops."""
    if reason_missing() is not None:
        raise RuntimeError(reason_missing())
    return torch.ops.admfast


def free_namespace(name: str, op: str) -> str:
    """Return `name`, or where an earlier import of the package has defined `op` there, a name of its own.

    Ops are the process's and outlive modules that are taken out of `sys.modules`. Those of an earlier import
    stay with the networks that were made by it.
    """
    number, found = 1, name
    while hasattr(getattr(torch.ops, found), op):
        number += 1
        found = f"{name}_{number}"
    return found


def build_info() -> dict[str, Any]:
    """Return what the build wanted, what it built and why not more; {} where nothing was recorded."""
    return json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else {}


def fake(op: str) -> Callable[[Fake], Fake]:
    """Decorate a function of a compiled op's arguments that tells tracers what the op returns.

    It stands beside the code that calls the op; it is registered when the extension is loaded.
    """

    def keep(function: Fake) -> Fake:
        _FAKES[op] = function
        return function

    return keep


def _register_fakes() -> None:
    """Tell tracers, once a process, what the ops return."""
    if hasattr(torch.ops.admfast, TOLD):
        return
    setattr(torch.ops.admfast, TOLD, True)
    for op, function in _FAKES.items():
        torch.library.register_fake(f"admfast::{op}")(function)
