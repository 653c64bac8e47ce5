"""Checks of what a user passes in: each returns the value in one form, or raises InvalidArgument by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

from torch import Tensor

from admfast.diffusion.respacing import whole_number
from admfast.errors import invalid

LARGEST_SEED = 2**64 - 1


def whole_numbers(name: str, value: object, low: int, high: int) -> list[int]:
    """Return one whole number, or several (a list, range, array or tensor), as a list, each in low..high."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, str) or not isinstance(values, Iterable):
        values = [values]
    return [whole_number(name, item, low, high) for item in values]


def real_number(name: str, value: object) -> float:
    """Return a finite number as a float."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise invalid(name, value, "a finite number")
    return float(value)


def float_images(name: str, value: object, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor of floats; `shape` is the one it must have, None for any."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise invalid(name, kind, "a tensor of floats")
    if shape is not None and tuple(value.shape) != shape:
        raise invalid(f"{name}.shape", tuple(value.shape), f"{shape}")
    return value


def check_functions(**functions: object) -> None:
    """Refuse what is neither None nor can be called."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise invalid(name, function, "a function, or None")
