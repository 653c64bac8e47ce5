"""Load the compiled extension on first use, or give the reason why it can't be loaded."""

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
from admfast.ops.transforms import constant_while_tracing

ISA_VARIABLE = "ADMFAST_CPU_ISA"
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")
FAKES_REGISTERED = (
    "fakes_are_registered"  # an attribute of the op namespace, so that a second import finds it
)
BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"
Fake = TypeVar("Fake", bound=Callable[..., Any])
_FAKES: dict[str, Callable[..., Any]] = {}


@constant_while_tracing
@functools.cache
def reason_missing() -> str | None:
    """Load the extension. Return None if it loads, else the reason.

    If ADMFAST_CPU_ISA is set, raises InvalidArgument for an unknown instruction set, and Unavailable for one
    that this machine can't run.
    """
    requested = os.environ.get(ISA_VARIABLE)
    if requested and requested not in ISAS:
        raise invalid(
            ISA_VARIABLE, requested, f"one of {', '.join(ISAS)}, or unset for the widest that runs here"
        )
    build = build_info()
    # An extension built for another torch version may load, and still lay out tensors differently.
    if (built_for := build.get("torch")) and built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"not loaded: built for torch {built_for}, this is {torch.__version__}"
    try:
        importlib.import_module("admfast._C")
    except ImportError as error:
        return f"not built: {build['reason']}" if build.get("built") == "none" else f"not loaded: {error}"
    if requested and instruction_set() != requested:
        raise Unavailable(f"{ISA_VARIABLE}={requested!r}: this machine can't run it")
    _register_fakes()
    return None


def instruction_set() -> str:
    """Return the instruction set that the C++ ops of this process use; the extension must be loaded."""
    return torch.ops.admfast.cpu_instruction_set()


@constant_while_tracing
@functools.cache
def uses_amx() -> bool:
    """Tell whether the compiled ops use AMX, the CPU's unit for products of small matrices."""
    return reason_missing() is None and instruction_set() == "amx"


@constant_while_tracing
def reason_missing_cuda() -> str | None:
    """Return None if the extension loads, was built with CUDA and finds a device, else the reason."""
    reason = reason_missing()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("admfast::sampler_step_", "CUDA"):
        return f"not built: {build_info().get('reason') or 'the extension has no CUDA part'}"
    return None if torch.cuda.is_available() else "no CUDA device"


def ops() -> Any:
    """Return the namespace of the compiled ops; raises RuntimeError if the extension doesn't load."""
    if reason_missing() is not None:
        raise RuntimeError(reason_missing())
    return torch.ops.admfast


def unused_namespace(name: str, op: str) -> str:
    """Return `name`, or an unused variant of it if an earlier import of the package defined `op` there.

    Ops belong to the process and outlive modules that are removed from `sys.modules`. Networks made by an
    earlier import keep using that import's ops.
    """
    number, candidate = 1, name
    while hasattr(getattr(torch.ops, candidate), op):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def build_info() -> dict[str, Any]:
    """Return the record of the build: requested mode, result, reason for a failure; {} if there is none."""
    return json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else {}


def fake(op: str) -> Callable[[Fake], Fake]:
    """Decorate the fake of a compiled op: a function of its arguments that tells tracers what the op returns.

    The fake is registered when the extension is loaded. Define it next to the code that calls the op.
    """

    def store(function: Fake) -> Fake:
        _FAKES[op] = function
        return function

    return store


def _register_fakes() -> None:
    """Register the fakes of all ops, once per process."""
    if hasattr(torch.ops.admfast, FAKES_REGISTERED):
        return
    setattr(torch.ops.admfast, FAKES_REGISTERED, True)
    for op, function in _FAKES.items():
        torch.library.register_fake(f"admfast::{op}")(function)
