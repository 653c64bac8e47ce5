"""Choose which timesteps of a long process a shorter one keeps."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from admfast.checks import finite_float, parse_literal, to_python, whole_number
from admfast.errors import InvalidArgument, allowed_names, invalid

WholeRespacing = str | int | Iterable[int]
Respacing = WholeRespacing | Iterable[float]
FloatArray = npt.NDArray[np.float64]
_Number = TypeVar("_Number", int, float)

SPACINGS = ("uniform", "quadratic", "log-snr", "karras")
KARRAS_RHO = 7

_DDIM = re.compile(r"ddim\s*([+-]?\d+)\s*")
_SPREAD = re.compile(rf"({'|'.join(SPACINGS)})\s*(\d+)\s*")
_COUNTS = re.compile(r"\s*[+-]?\d+\s*(,\s*[+-]?\d+\s*)*")
_LIST = re.compile(r"\s*\[(.*)\]\s*")
_WHOLE_LIST = re.compile(r"[\s\[\],\d]*")
_ALLOWED_FORMS = (
    "a count such as '250', counts per section such as '10,10,10', 'ddimN', 'uniformN', 'quadraticN', "
    "'log-snrN', 'karrasN', a list of timesteps, or '' for all"
)


def check_respacing(spec: object) -> str | int | tuple[float, ...]:
    """Return a respacing as text, a whole number, or a tuple of numbers, which can be hashed and compared.

    Raises: InvalidArgument for anything else, and for a negative number.
    """
    value = to_python(spec)
    if isinstance(value, str):
        return value
    if not isinstance(value, Iterable):
        return whole_number("respacing", value, 0)
    items = [to_python(item) for item in value]
    if any(isinstance(item, float) for item in items):
        return tuple(finite_float("respacing", item, least=0) for item in items)
    return tuple(whole_number("respacing", item, 0) for item in items)


def kept_timesteps(spec: Respacing, log_snr: FloatArray) -> list[int] | list[float]:
    """Return the timesteps of a process that `spec` keeps, in ascending order.

    log_snr: log(alpha_bar / (1 - alpha_bar)) at every timestep of the process.
    spec: a form of `space_timesteps`; a list of timesteps that may lie between two whole ones; or the name of
      a spacing with a count N (T is the length of the process, t the kept timesteps, i = 0..N-1):
      "uniformN" - t = round(T - i T / N) - 1, "trailing" in Lin et al. 2023;
      "quadraticN" - t = (T - 1) ((i + 1) / N)^2 (Song et al. 2020, section D.2);
      "log-snrN" - N + 1 evenly spaced values of the log-SNR, from timestep T - 1 to timestep 0, without the
        last (Lu et al. 2022, "DPM-Solver");
      "karrasN" - N values of s = sqrt(1/alpha_bar - 1), from timestep T - 1 to timestep 0, evenly spaced in
        s^(1/7) (Karras et al. 2022, eq. 5).

    Returns whole numbers for "uniform", the forms of `space_timesteps` and lists of whole numbers; else
    floats, between which the log-SNR is linear. Raises: InvalidArgument.
    """
    kept, total = check_respacing(spec), len(log_snr)
    if isinstance(kept, str) and (match := _SPREAD.fullmatch(kept)):
        count = int(match[2])
        if not 1 <= count <= total:
            raise invalid("respacing", kept, f"{match[1]}N with N from 1 to {total}")
        return _spread_timesteps(match[1], count, log_snr)
    if isinstance(kept, str) and (match := _LIST.fullmatch(kept)) and not _WHOLE_LIST.fullmatch(kept):
        kept = check_respacing([parse_literal(item) for item in match[1].split(",")])
    if isinstance(kept, tuple) and any(isinstance(t, float) for t in kept):
        floats = [finite_float("respacing timestep", t, least=0, most=total - 1) for t in kept]
        return _distinct(sorted(floats), kept)
    return space_timesteps(total, kept)  # type: ignore[arg-type]  # a tuple without floats holds ints


def _spread_timesteps(spacing: str, count: int, log_snr: FloatArray) -> list[int] | list[float]:
    """Return the timesteps of a named spacing (see `kept_timesteps`)."""
    total = len(log_snr)
    if spacing in ("log-snr", "karras") and not np.isfinite(log_snr[-1]):
        raise invalid("respacing", f"{spacing}{count}", "for a process whose last alpha_bar isn't 0")
    if spacing == "uniform":
        return [round(total - i * total / count) - 1 for i in reversed(range(count))]
    if spacing == "quadratic":
        return [(total - 1) * ((i + 1) / count) ** 2 for i in range(count)]
    if spacing == "log-snr":
        kept_log_snr = np.linspace(log_snr[-1], log_snr[0], count + 1)[:-1]
    else:
        ends = np.exp(-log_snr[[-1, 0]] / (2 * KARRAS_RHO))
        kept_log_snr = -2 * KARRAS_RHO * np.log(np.linspace(ends[0], ends[1], count))
    return timesteps_at(kept_log_snr[::-1], log_snr).tolist()


def timesteps_at(wanted: npt.ArrayLike, log_snr: FloatArray) -> FloatArray:
    """Return the timesteps with these values of the log-SNR, which is linear between whole timesteps.

    wanted: any shape. log_snr: at every timestep of the process, falling.
    Raises: InvalidArgument for a value that the process does not reach.
    """
    values = np.asarray(wanted, dtype=np.float64)
    slack = 1e-9 * (log_snr[0] - log_snr[-1])  # rounding of a computed end
    outside = ~((values >= log_snr[-1] - slack) & (values <= log_snr[0] + slack))
    if outside.any() or not np.isfinite(log_snr[-1]):
        allowed = f"from {log_snr[-1]:g} to {log_snr[0]:g}, finite at every timestep"
        raise invalid("log_snr", values[outside].tolist() or float(log_snr[-1]), allowed)
    return np.interp(-values, -log_snr, np.arange(len(log_snr), dtype=np.float64))


def space_timesteps(num_timesteps: int, spec: WholeRespacing, *, published: bool = False) -> list[int]:
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
    return _distinct(timesteps, steps)


def _distinct(timesteps: list[_Number], given: Sequence[object]) -> list[_Number]:
    """Return sorted timesteps, or reject them if one is there twice."""
    for step, following in itertools.pairwise(timesteps):
        if step == following:
            raise invalid("respacing", list(given), f"each timestep once; {step} is there twice")
    return timesteps
