"""The compiled extension: loaded on first use, and the reason where it can't be."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch

BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"


@functools.cache
def reason_missing() -> str | None:
    """None where the extension loads, else why it doesn't."""
    try:
        importlib.import_module("admfast._C")
    except ImportError as error:
        built = build_info()
        return f"not built: {built['reason']}" if built.get("reason") else f"not loaded: {error}"
    _register_fakes()
    return None


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


def build_info() -> dict[str, Any]:
    """What the build wanted, what it built and why not more; {} where nothing was recorded."""
    return json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else {}


def _register_fakes() -> None:
    """Tell tracers what each op returns; sampler_step_ writes in place and returns nothing."""

    @torch.library.register_fake("admfast::normal")
    def _(seeds: torch.Tensor, count: int, row: int, stream: int) -> torch.Tensor:
        return seeds.new_empty((seeds.shape[0], count), dtype=torch.float32)

    @torch.library.register_fake("admfast::sampler_step_")
    def _(*_args: Any) -> None:
        return None
