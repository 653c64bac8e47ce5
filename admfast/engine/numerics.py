"""The numerical settings of a process, held at a pipeline's own while it works and given back after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def own_numerics(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Run a block outside inference mode and autocast and, on CUDA, with TF32 products as `tf32` says.

    Tensors made in inference mode could not serve autograd (guidance, `predict`) ever after; autocast would
    change a pipeline's precision behind its back. The TF32 settings belong to the whole process: another
    thread that computes on CUDA at the same time sees them.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_tf32(tf32))
        yield


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Set what float32 matrix products and convolutions on CUDA may be rounded to, and restore it."""
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the process uses the newer settings alone, and torch refuses to mix the two
        products = None
    try:
        if products is None:
            for backend in backends:
                backend.fp32_precision = "tf32" if allowed else "ieee"
        else:
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            torch.backends.cudnn.allow_tf32 = allowed
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
