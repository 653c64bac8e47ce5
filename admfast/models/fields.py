"""Checks of single configuration fields: each returns the value in one form, or raises InvalidArgument.

What comes from a command line or a JSON file has any type; nothing is guessed from it. A word such as "no" is
no switch: it would count as True.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable

from admfast.errors import invalid


def whole(name: str, value: object, least: int = 1, special: int | None = None) -> int:
    """An integer of `least` or more, or the one that stands for something else."""
    allowed = f"an integer of {least} or more" + ("" if special is None else f", or {special}")
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or (number < least and number != special):
        raise invalid(name, value, allowed)
    return number


def switch(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise invalid(name, value, "True or False")
    return value


def probability(name: str, value: object) -> float:
    """A number from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise invalid(name, value, "a number, 0 or more and below 1")
    return float(value)


def factors(name: str, value: object) -> tuple[int, ...]:
    """Integers of 1 or more; a single one counts as a sequence of one."""
    allowed = "downsampling factors of 1 or more, such as 8 or (8, 16, 32)"
    try:
        return tuple(whole(name, item) for item in _items(value))
    except (TypeError, ValueError):
        raise invalid(name, value, allowed) from None


def multipliers(name: str, value: object) -> tuple[float, ...]:
    """Numbers above 0, one at least; a single one counts as a sequence of one."""
    allowed = "one multiplier above 0 a level, at least one, such as (1, 2, 4) or (0.5, 1, 1)"
    try:
        found = _items(value)
    except TypeError:
        found = []
    for item in found:
        real = isinstance(item, numbers.Real) and not isinstance(item, bool)
        if not real or not math.isfinite(item) or item <= 0:
            raise invalid(name, value, allowed)
    if not found:
        raise invalid(name, value, allowed)
    return tuple(found)


def _items(value: object) -> list:
    """A sequence as a list, a number as a list of one; TypeError for what is neither."""
    if isinstance(value, str):
        raise TypeError(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(value)
    return list(value)
