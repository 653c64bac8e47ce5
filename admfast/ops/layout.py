"""Channels-last memory for any number of spatial dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(t: Tensor) -> bool:
    """Whether the channels of [N, C, *spatial] lie beside each other and the whole without gaps."""
    memory_format = _FORMATS.get(t.dim())
    # torch.func.vmap knows this question for contiguous tensors alone.
    transforms = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if memory_format is None or transforms:
        return t.movedim(1, -1).is_contiguous()
    return t.is_contiguous(memory_format=memory_format)  # a flag of the tensor: the view takes 4 us


def channels_last(t: Tensor) -> Tensor:
    """`t` with its channels beside each other; itself where they are, else a copy."""
    return t if is_channels_last(t) else t.movedim(1, -1).contiguous().movedim(-1, 1)
