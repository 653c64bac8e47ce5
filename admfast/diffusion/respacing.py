"""Choose which timesteps of a long process a shorter one keeps."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence

from admfast.checks import to_python, whole_number
from admfast.errors import InvalidArgument, allowed_names, invalid

Respacing = str | int | Iterable[int]

_DDIM = re.compile(r"ddim\s*([+-]?\d+)\s*")
_COUNTS = re.compile(r"\s*[+-]?\d+\s*(,\s*[+-]?\d+\s*)*")
_LIST = re.compile(r"\s*\[(.*)\]\s*")
_ALLOWED_FORMS = (
    "a count such as '250', counts per section such as '10,10,10', 'ddimN', a list of timesteps, "
    "or '' for all"
)


def space_timesteps(num_timesteps: int, spec: Respacing, *, published: bool = False) -> list[int]:
    """Return the timesteps, in ascending order, that `spec` keeps out of 0..num_timesteps-1.

    Source: `space_timesteps` of the published code; "ddimN": Song et al. 2020, section D.2 (linear
    selection).

    num_timesteps: length of the original process, at least 1.
    spec: one of
      "" - every timestep;
      "250" or 250 - that many over the whole process, from the first to the last;
      "10,10,10" - counts per section. The process is divided into as many sections as there are counts, of
        equal size or, if that is impossible, with sizes that differ by one, larger sections first. Each
        section keeps its count of steps, from its first to its last step. A position is a float64 sum of
        strides (size - 1) / (count - 1), rounded half to even; a count of 1 keeps the first step, 0 keeps
        none;
      "ddimN" - 0, k, 2k, ... with the smallest integer stride k that gives exactly N steps. If there is no
        such stride, the steps are floor(i * num_timesteps / N), i = 0..N-1, with gaps that differ by at most
        one;
      [0, 10, 20] or "[0,10,20]" - these timesteps, in any order, none twice.
    published: follow the published function exactly: `ddimN` without an integer stride raises, "" and
      "[...]" raise, a list holds counts per section, and a negative count keeps none.

    Returns a list of distinct ints; empty only for counts that are all 0.
    Raises: InvalidArgument naming the value and what is allowed. Not differentiable (no tensors).
    """
    total = whole_number("num_timesteps", num_timesteps, 1)
    spec = to_python(spec)  # type: ignore[assignment]
    if isinstance(spec, str):
        if published and not (_DDIM.fullmatch(spec) or _COUNTS.fullmatch(spec)):
            raise _unknown_form_error(spec)
        return _parse_text(total, spec, published)
    if isinstance(spec, Iterable):
        items = list(spec)
        if published:
            return _section_timesteps(total, [operator.index(count) for count in items], published)
        return _listed_timesteps(total, items)
    return _section_timesteps(total, [whole_number("respacing", spec, 0, total)], published)


def _parse_text(total: int, spec: str, published: bool) -> list[int]:
    if not spec.strip():
        return list(range(total))
    if match := _DDIM.fullmatch(spec):
        return _ddim_timesteps(total, int(match[1]), spec, published)
    if match := _LIST.fullmatch(spec):
        items = [item.strip() for item in match[1].split(",")]
        if not all(re.fullmatch(r"\d+", item) for item in items):
            raise invalid(
                "respacing", spec, f"a list of timesteps from 0 to {total - 1}, such as '[0,10,20]'"
            )
        return _listed_timesteps(total, [int(item) for item in items])
    if _COUNTS.fullmatch(spec):
        return _section_timesteps(total, [int(count) for count in spec.split(",")], published)
    raise _unknown_form_error(spec)


def _unknown_form_error(spec: str) -> InvalidArgument:
    """Return the error for an unknown kind of spec, with the nearest spellings that keep its number."""
    digits = re.search(r"\d+", spec)
    count = digits[0] if digits else "25"
    return invalid("respacing", spec, f"{_ALLOWED_FORMS}; {allowed_names(spec, [f'ddim{count}', count])}")


def _ddim_timesteps(total: int, count: int, spec: str, published: bool) -> list[int]:
    if count < 1 or count > total:
        raise invalid("respacing", spec, f"ddimN with N from 1 to {total}")
    for stride in range(1, total):
        steps = range(0, total, stride)
        if len(steps) == count:
            return list(steps)
        if len(steps) < count:
            break
    if published:
        raise invalid("respacing", spec, f"no integer stride gives exactly {count} of {total} steps")
    return [i * total // count for i in range(count)]


def _section_timesteps(total: int, counts: Sequence[int], published: bool) -> list[int]:
    if not counts:
        raise invalid("respacing", list(counts), "at least one count")
    size, num_longer = divmod(total, len(counts))
    start, timesteps = 0, []
    for i, count in enumerate(counts):
        length = size + (i < num_longer)
        if count > length or (count < 0 and not published):
            text = ",".join(str(c) for c in counts)
            raise invalid("respacing", text, f"section {i} of {len(counts)} takes a count from 0 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # A sum, not i * stride, as published: its rounding decides which step is kept.
            timesteps.append(start + round(position))
            position += stride
        start += length
    return timesteps


def _listed_timesteps(total: int, steps: Sequence[int]) -> list[int]:
    timesteps = sorted(whole_number("respacing timestep", step, 0, total - 1) for step in steps)
    if not timesteps:
        raise invalid("respacing", list(steps), f"at least one timestep from 0 to {total - 1}")
    for step, following in zip(timesteps, timesteps[1:], strict=False):
        if step == following:
            raise invalid("respacing", list(steps), f"each timestep once; {step} is there twice")
    return timesteps
