"""Small calls of every op as the networks make them, for `admfast info` to say which implementation runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from admfast.ops import (
    FoldedConv,
    Row,
    SamplerState,
    Stream,
    as_seeds,
    attention,
    conv,
    group_norm_silu,
    normal,
    pack,
    sampler_step,
)

Example = tuple[str, str, Callable[[], Any]]


def examples(device: str) -> Iterator[Example]:
    """Yield (op, the call in words, the call) on `device`, in the dtypes that are used there."""
    dtypes = [torch.float32, torch.bfloat16]
    if device == "cuda":
        dtypes = [torch.float16, torch.bfloat16, torch.float32]
    for dtype in dtypes:
        words = f"{device} {str(dtype).removeprefix('torch.')}"
        for gradient in (False, True):
            label = words + (" with gradient" if gradient else "")
            yield "group_norm_silu", label, partial(_norm, device, dtype, gradient)
            yield "attention", label, partial(_attention, device, dtype, gradient)
            yield "conv", label, partial(_conv, device, dtype, gradient)
            yield "conv_train", label, partial(_conv_train, device, dtype, gradient)
        yield "sampler_step", f"{words} output", partial(_sampler, device, dtype)
    yield "normal", device, partial(normal, as_seeds([0]).to(device), (3, 4, 4), 0, Stream.X_T)


def _norm(device: str, dtype: torch.dtype, gradient: bool) -> None:
    """Of the 256x256 model, at its lowest attended resolution but smaller."""
    x = torch.zeros(1, 256, 4, 4, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.ones(256, device=device)
    with torch.set_grad_enabled(gradient):
        group_norm_silu(x.requires_grad_(gradient), weight, torch.zeros_like(weight))


def _attention(device: str, dtype: torch.dtype, gradient: bool) -> None:
    """Eight heads of 64 over 8x8 positions in the row order of the released models."""
    qkv = torch.zeros(1, 64, 3 * 512, device=device, dtype=dtype)
    with torch.set_grad_enabled(gradient):
        attention(qkv.requires_grad_(gradient), 8, legacy_order=True)


def _conv(device: str, dtype: torch.dtype, gradient: bool) -> None:
    """A 3x3 convolution of a small network; its gradient is a convolution of its own."""
    x = torch.zeros(2, 64, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    folded = FoldedConv(torch.zeros(64, 64, 3, 3, device=device, dtype=dtype), padding=1)
    with torch.set_grad_enabled(gradient):
        folded(x.requires_grad_(gradient))


def _conv_train(device: str, dtype: torch.dtype, gradient: bool) -> None:
    """The same with weights that are trained."""
    x = torch.zeros(2, 64, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.zeros(64, 64, 3, 3, device=device, dtype=dtype, requires_grad=gradient)
    with torch.set_grad_enabled(gradient):
        conv(x, weight, padding=1)


def _sampler(device: str, dtype: torch.dtype) -> None:
    """One row of DDIM's form."""
    rows = [Row(0.0, 0.0, k_x=1.0, k_out=-1.0, a=0.5, b=0.5)]
    x = torch.zeros(1, 3, 4, 4, device=device)
    sampler_step(SamplerState.start(x, rows), x.to(dtype), pack(rows, device), 0)
