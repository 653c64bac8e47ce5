"""The compiled extension: loaded on first use, and the reason where it can't be."""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from admfast.errors import Unavailable, invalid
from admfast.ops.layout import empty_channels_last, is_channels_last
from admfast.ops.transforms import constant

ISA = "ADMFAST_CPU_ISA"
ISAS = ("avx512_bf16", "avx512", "avx2", "generic")
TOLD = "fakes_are_registered"  # kept where the ops are, which a second import finds
BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"


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


def _register_fakes() -> None:
    """Tell tracers, once a process, what ops return; sampler_step_ writes in place and returns nothing."""
    if hasattr(torch.ops.admfast, TOLD):
        return
    setattr(torch.ops.admfast, TOLD, True)

    @torch.library.register_fake("admfast::normal")
    def _(seeds: torch.Tensor, count: int, row: int, stream: int) -> torch.Tensor:
        return seeds.new_empty((seeds.shape[0], count), dtype=torch.float32)

    @torch.library.register_fake("admfast::sampler_step_")
    def _(*_args: Any) -> None:
        return None

    @torch.library.register_fake("admfast::group_norm_silu_fwd")
    def _(
        x: torch.Tensor, x2: Any, weight: Any, bias: Any, scale: Any, shift: Any, groups: int, *_args: Any
    ) -> tuple[torch.Tensor, ...]:
        channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
        y = _empty_dense([x.shape[0], channels, *x.shape[2:]], x)
        mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float64) for _ in range(2))
        return y, mean, rstd

    @torch.library.register_fake("admfast::group_norm_silu_bwd")
    def _(dy: torch.Tensor, x: torch.Tensor, x2: Any, *_args: Any) -> tuple[torch.Tensor, ...]:
        dx2 = x.new_empty(0) if x2 is None else _empty_dense(list(x2.shape), x)
        s1, s2 = (x.new_empty(dy.shape[:2], dtype=torch.float32) for _ in range(2))
        return _empty_dense(list(x.shape), x), dx2, s1, s2

    @torch.library.register_fake("admfast::conv3x3_winograd")
    def _(x: torch.Tensor, _u: Any, _bias: Any, _residual: Any, channels: int) -> torch.Tensor:
        n, _, height, width = x.shape
        return empty_channels_last((n, channels, height, width), x)

    @torch.library.register_fake("admfast::conv3x3_winograd_once")
    def _(
        x: torch.Tensor, weight: torch.Tensor, _bias: Any, _residual: Any, transposed: bool
    ) -> torch.Tensor:
        n, _, height, width = x.shape
        return empty_channels_last((n, weight.shape[1 if transposed else 0], height, width), x)

    @torch.library.register_fake("admfast::conv3x3_winograd_weight_grad")
    def _(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return x.new_empty((dy.shape[1], x.shape[1], 3, 3))

    @torch.library.register_fake("admfast::winograd_weights")
    def _(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
        c_in, c_out = weight.shape[:2] if transposed else reversed(weight.shape[:2])
        return weight.new_empty((-(-c_out // 32), 36, c_in, 32), dtype=torch.float32)


def _empty_dense(shape: list[int], like: torch.Tensor) -> torch.Tensor:
    """Return what group_norm_silu allocates: channels-last where `like` is, else contiguous."""
    if like.is_contiguous() or not is_channels_last(like):
        return like.new_empty(shape)
    return empty_channels_last(shape, like)
