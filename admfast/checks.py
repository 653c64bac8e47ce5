"""Checks of single arguments: each returns the normalized value, or raises InvalidArgument with the name.

Values from a command line or a JSON file can have any type, and nothing is guessed from them: a word such as
"no" is not a switch (it would count as True), and True is not a number. A tensor or array without axes counts
as the number in it, which is read from its device once. Ops, which are called at every step, read no tensors.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admfast.errors import invalid, nearest

ARRAYS = (np.ndarray, np.generic)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole(
    name: str,
    value: object,
    least: int,
    most: int | None = None,
    *,
    special: int | None = None,
    tensors: bool = True,
) -> int:
    """Return a whole number in least..most, or `special`, as an int. tensors: accept one without axes."""
    number = _index(value if isinstance(value, int) else _held(value, tensors))
    if number is not None and (number == special or least <= number and (most is None or number <= most)):
        return number
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise invalid(name, value, f"a whole number {span}" + ("" if special is None else f", or {special}"))


def _held(value: object, tensors: bool) -> object:
    """Return the number in a tensor or array without axes; any other value unchanged."""
    if isinstance(value, Tensor):
        return value.item() if tensors and value.dim() == 0 and not value.is_meta else value
    return value.item() if isinstance(value, ARRAYS) and value.ndim == 0 else value


def _index(value: object) -> int | None:
    if isinstance(value, (float, bool, str, Tensor)) or value is None:
        return None
    if isinstance(value, int):  # Dynamo never finishes tracing operator.index of an IntEnum.
        return int(value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def whole_numbers(name: str, value: object, least: int, most: int | None = None) -> list[int]:
    """Return one whole number, or several (any iterable, array or tensor), as a list, each in least..most."""
    return [whole(name, item, least, most) for item in items(plain(value))]


def whole_or_several(name: str, value: object, least: int, most: int | None = None) -> int | tuple[int, ...]:
    """Return one whole number as an int, or several (see `whole_numbers`) as a tuple."""
    given = plain(value)
    found = whole_numbers(name, given, least, most)
    return tuple(found) if isinstance(given, Iterable) else found[0]


def plain(value: object) -> object:
    """Return an array or tensor as Python numbers, read in one copy; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") and not getattr(value, "is_meta", False) else value


def items(value: object) -> list[object]:
    """Return an iterable as a list; anything else, and text, as a list of one."""
    several = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) != 0
    return list(value) if several else [value]  # type: ignore[call-overload]


def literal(text: str) -> Any:
    """Return the value of a text in JSON or Python (4, true, None, [1, 2]), or else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def real(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    tensors: bool = True,
) -> float:
    """Return a finite number as a float, with limits inclusive (least, most) or exclusive (above, below)."""
    number = math.nan
    held = value if isinstance(value, (int, float)) else _held(value, tensors)
    if isinstance(held, numbers.Real) and not isinstance(held, bool):
        with contextlib.suppress(OverflowError):  # an int too large for a float
            number = float(held)
    if math.isfinite(number):
        low = (least is None or number >= least) and (above is None or number > above)
        if low and (most is None or number <= most) and (below is None or number < below):
            return number
    ends = {"of at least": least, "above": above, "at most": most, "below": below}
    given = " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)
    raise invalid(name, value, f"a finite number {given}".rstrip())


def interval(name: str, value: object) -> tuple[float, float]:
    """Return two finite numbers, the lower one first."""
    ends = items(plain(value))
    if len(ends) != 2:
        raise invalid(name, value, "two numbers, (lowest, highest)")
    low, high = (real(name, end) for end in ends)
    if low > high:
        raise invalid(name, value, "the lowest first")
    return low, high


def switch(name: str, value: object) -> bool:
    """Return a bool, also from a tensor or array without axes."""
    held = _held(value, True)
    if not isinstance(held, bool):
        raise invalid(name, value, "True or False")
    return held


def switches(record: object, *names: str) -> None:
    """Store each of these attributes of a frozen `record` as a bool; InvalidArgument for any other value."""
    for name in names:
        object.__setattr__(record, name, switch(name, getattr(record, name)))


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """Return `value`, which must be one of the known names."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise invalid(name, value, nearest(str(value), names))
    return value


def functions(**values: object) -> None:
    """Raise InvalidArgument unless each value is None or can be called."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise invalid(name, value, "a function, or None")


def floating(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Return `value`, which must be a dense tensor of 16 to 64 bit floats, on `device` if that is given."""
    if not isinstance(value, Tensor):
        raise invalid(name, type(value).__name__, "a tensor of floats")
    if value.dtype not in FLOATING:
        raise invalid(f"{name}.dtype", value.dtype, "a floating dtype: float16, bfloat16, float32 or float64")
    if value.layout is not torch.strided:
        raise invalid(f"{name}.layout", value.layout, "torch.strided")
    if device is not None and value.device != device:
        raise invalid(f"{name}.device", str(value.device), f"{device}, where the other tensors are")
    return value


def images(name: str, value: object, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor of floats that isn't empty, of the shape `shape` (None allows any)."""
    tensor = floating(name, value)
    if shape is not None and tuple(tensor.shape) != shape:
        raise invalid(f"{name}.shape", tuple(tensor.shape), f"{shape}")
    if 0 in tensor.shape:
        raise invalid(f"{name}.shape", tuple(tensor.shape), "at least one image, and no side empty")
    return tensor


def in_range(name: str, value: Tensor) -> Tensor:
    """Return images of floats in or, as samples can be, a little beyond [-1, 1]; reject levels of 0..255.

    Levels are recognized by a value above 2, the width of [-1, 1], and none below 0. Only finite values
    count, because one NaN would make both ends NaN.
    """
    values = value.detach()
    low, high = _ends(values)
    if not math.isfinite(high - low):
        finite = values[torch.isfinite(values)]
        low, high = _ends(finite) if finite.numel() else (0.0, 0.0)
    if low >= 0 and high > 2:
        found = f"values from {low:g} to {high:g}"
        raise invalid(name, found, "floats in [-1, 1]; convert levels 0..255 by images / 127.5 - 1")
    return value


def _ends(values: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(values)
    return float(low), float(high)
