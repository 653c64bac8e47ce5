"""Checks of single arguments: each returns the normalized value, or raises InvalidArgument with the name.

Values from a command line or a JSON file can have any type, and nothing is guessed from them: a word such as
"no" is not a bool (it would count as True), and True is not a number. A tensor or array without axes counts
as the number in it, which is read from its device once. Ops, which are called at every step, read no tensors.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import operator
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admfast.errors import allowed_names, invalid

NUMPY_TYPES = (np.ndarray, np.generic)
# Most numbers of a text: a typo such as 0-99999999999 is an error and does not fill the memory.
MAX_NUMBERS = 10_000_000
MAX_DIGITS = 20  # of a number in a text, as many as the largest seed, 2^64 - 1, has
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole_number(
    name: str,
    value: object,
    least: int,
    most: int | None = None,
    *,
    special: int | None = None,
    allow_tensor: bool = True,
) -> int:
    """Return a whole number in least..most, or `special`, as an int.

    allow_tensor: also accept a tensor without axes.
    """
    number = _as_int(value if isinstance(value, int) else _unwrap_scalar(value, allow_tensor))
    if number is not None and (number == special or least <= number and (most is None or number <= most)):
        return number
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise invalid(name, value, f"a whole number {span}" + ("" if special is None else f", or {special}"))


def _unwrap_scalar(value: object, allow_tensor: bool) -> object:
    """Return the number in a tensor or array without axes; any other value unchanged."""
    if isinstance(value, Tensor):
        return value.item() if allow_tensor and value.dim() == 0 and not value.is_meta else value
    return value.item() if isinstance(value, NUMPY_TYPES) and value.ndim == 0 else value


def _as_int(value: object) -> int | None:
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
    return [whole_number(name, item, least, most) for item in as_list(to_python(value))]


def whole_number_or_tuple(
    name: str, value: object, least: int, most: int | None = None
) -> int | tuple[int, ...]:
    """Return one whole number as an int, or several (see `whole_numbers`) as a tuple."""
    python_value = to_python(value)
    values = whole_numbers(name, python_value, least, most)
    return tuple(values) if isinstance(python_value, Iterable) else values[0]


def to_python(value: object) -> object:
    """Return an array or tensor as Python numbers, read in one copy; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") and not getattr(value, "is_meta", False) else value


def as_list(value: object) -> list[object]:
    """Return an iterable as a list; anything else, and text, as a list of one."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) != 0
    return list(value) if is_list else [value]  # type: ignore[call-overload]


def parse_literal(text: str) -> Any:
    """Return the value of a text in JSON or Python (4, true, None, [1, 2]), or else the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            pass
    return text


def parse_numbers(name: str, text: str, most: int = MAX_NUMBERS) -> list[int]:
    """Return the numbers of "0-9", "207,360" or "0-3,7". Raises InvalidArgument, also for over `most`."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if match is None:
            raise invalid(name, text, "whole numbers and ranges separated by commas, such as 0-9 or 207,360")
        if max(len(digits) for digits in match.groups("")) > MAX_DIGITS:
            raise invalid(name, text, f"whole numbers of at most {MAX_DIGITS} digits")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise invalid(name, text, f"the range {part.strip()} runs backwards; write {last}-{first}")
        count = len(numbers) + last - first + 1
        if count > most:
            raise invalid(name, text, f"at most {most:,} numbers; this has {count:,} or more")
        numbers.extend(range(first, last + 1))
    return numbers


def finite_float(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    allow_tensor: bool = True,
) -> float:
    """Return a finite number as a float, with limits inclusive (least, most) or exclusive (above, below)."""
    number = math.nan
    scalar = value if isinstance(value, (int, float)) else _unwrap_scalar(value, allow_tensor)
    if isinstance(scalar, numbers.Real) and not isinstance(scalar, bool):
        with contextlib.suppress(OverflowError):  # an int too large for a float
            number = float(scalar)
    if math.isfinite(number):
        above_lower_limit = (least is None or number >= least) and (above is None or number > above)
        if above_lower_limit and (most is None or number <= most) and (below is None or number < below):
            return number
    limits = {"of at least": least, "above": above, "at most": most, "below": below}
    range_text = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    raise invalid(name, value, f"a finite number {range_text}".rstrip())


def finite_floats(name: str, value: object, **limits: Any) -> float | tuple[float, ...]:
    """Return a finite number, or the tuple of several, at least one; limits as in `finite_float`."""
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray | Tensor) and value.ndim > 0):
        if not len(value):
            raise invalid(name, value, "a number, or several")
        return tuple(finite_float(name, number, **limits) for number in value)
    return finite_float(name, value, **limits)


def interval(name: str, value: object) -> tuple[float, float]:
    """Return two finite numbers, the lower one first."""
    ends = as_list(to_python(value))
    if len(ends) != 2:
        raise invalid(name, value, "two numbers, (lowest, highest)")
    low, high = (finite_float(name, end) for end in ends)
    if low > high:
        raise invalid(name, value, "the lowest first")
    return low, high


def boolean(name: str, value: object) -> bool:
    """Return a bool, also from a tensor or array without axes."""
    scalar = _unwrap_scalar(value, allow_tensor=True)
    if not isinstance(scalar, bool):
        raise invalid(name, value, "True or False")
    return scalar


def store_booleans(record: object, *names: str) -> None:
    """Store each of these attributes of a frozen `record` as a bool; InvalidArgument for any other value."""
    for name in names:
        object.__setattr__(record, name, boolean(name, getattr(record, name)))


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """Return `value`, which must be one of the known names."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise invalid(name, value, allowed_names(value, names))
    return value


def optional_callables(**values: object) -> None:
    """Raise InvalidArgument unless each value is None or can be called."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise invalid(name, value, "a function, or None")


def float_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Return `value`, which must be a dense tensor of 16 to 64 bit floats, on `device` if that is given."""
    if not isinstance(value, Tensor):
        raise invalid(name, type(value).__name__, "a tensor of floats")
    if value.dtype not in FLOAT_DTYPES:
        raise invalid(f"{name}.dtype", value.dtype, "a floating dtype: float16, bfloat16, float32 or float64")
    if value.layout is not torch.strided:
        raise invalid(f"{name}.layout", value.layout, "torch.strided")
    if device is not None and value.device != device:
        raise invalid(f"{name}.device", str(value.device), f"{device}, where the other tensors are")
    return value


def image_tensor(name: str, value: object, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor of floats that isn't empty, of the shape `shape` (None allows any)."""
    tensor = float_tensor(name, value)
    if shape is not None and tuple(tensor.shape) != shape:
        raise invalid(f"{name}.shape", tuple(tensor.shape), f"{shape}")
    if 0 in tensor.shape:
        raise invalid(f"{name}.shape", tuple(tensor.shape), "at least one image, and no side empty")
    return tensor


def integer_in_environment(name: str, default: int, least: int = 0) -> int:
    """Return the whole number in an environment variable; `default` if it is not set or empty."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise invalid(name, text, f"a whole number of at least {least}, as torchrun sets it")
    return int(text)


def image_range(name: str, value: Tensor) -> Tensor:
    """Return images of floats in or, as samples can be, a little beyond [-1, 1]; reject levels of 0..255.

    Levels are recognized by a value above 2, the width of [-1, 1], and none below 0. Only finite values
    count, because one NaN would make both ends NaN.
    """
    values = value.detach()
    low, high = _minmax(values)
    if not math.isfinite(high - low):
        finite = values[torch.isfinite(values)]
        low, high = _minmax(finite) if finite.numel() else (0.0, 0.0)
    if low >= 0 and high > 2:
        value_range = f"values from {low:g} to {high:g}"
        raise invalid(name, value_range, "floats in [-1, 1]; convert levels 0..255 by images / 127.5 - 1")
    return value


def _minmax(values: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(values)
    return float(low), float(high)
