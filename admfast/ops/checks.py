"""What every op asks of its arguments, so that a mistake is named the same way whatever runs."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from admfast.errors import invalid

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, value: object, device: torch.device | None = None) -> None:
    """Raise InvalidArgument unless `value` is a dense tensor of 16 to 64 bit floats, on `device` if given."""
    if not isinstance(value, Tensor):
        raise invalid(name, value, "a tensor")
    if value.dtype not in FLOATING:
        raise invalid(f"{name}.dtype", value.dtype, "a floating dtype: float16, bfloat16, float32 or float64")
    if value.layout is not torch.strided:
        raise invalid(f"{name}.layout", value.layout, "torch.strided")
    if device is not None and value.device != device:
        raise invalid(f"{name}.device", str(value.device), f"{device}, where the other tensors are")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise InvalidArgument unless `value` is a whole number of at least `least`."""
    allowed = f"a whole number of at least {least}"
    if isinstance(value, (float, bool)) or value is None or isinstance(value, (str, Tensor)):
        raise invalid(name, value, allowed)
    try:
        # Dynamo follows operator.index of an IntEnum for ever.
        number = int(value) if isinstance(value, int) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise invalid(name, value, allowed) from None
    if number < least:
        raise invalid(name, value, allowed)


def check_number(name: str, value: object) -> None:
    """Raise InvalidArgument unless `value` is a finite number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise invalid(name, value, "a finite number of 0 or more")
