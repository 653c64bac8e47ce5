"""Exceptions of the whole package, and the functions that write their text.

A user error names the argument, its value and what is allowed, in one line; the command line prints
that line and exits with status 2.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping

LONGEST_TEXT, LONGEST_VALUE = 302, 80  # characters of a text (a path may be long) or value in a message
_REPR = reprlib.Repr()  # cuts nested containers to the length that a message can show
for _limit in ("dict", "list", "tuple", "set", "frozenset", "other", "string", "long"):
    setattr(_REPR, f"max{_limit}", LONGEST_VALUE)


class AdmfastError(Exception):
    """Base of every error that a user can cause and fix."""


class InvalidArgument(AdmfastError, ValueError):
    """An argument has a value that is not allowed."""


class CheckpointError(AdmfastError):
    """A weights file is missing, damaged, unsafe, or does not fit the network it is loaded into."""


class NonFiniteError(AdmfastError, FloatingPointError):
    """A layer produced NaN or infinity; the message names the first such layer."""


class OutputError(AdmfastError, OSError):
    """A result could not be written; existing files were not changed."""


class Unavailable(AdmfastError, RuntimeError):
    """An implementation or device that was requested by name can't be used here; the message says why."""


def invalid(name: str, value: object, allowed: str) -> InvalidArgument:
    """Return the error `NAME=VALUE: ALLOWED` for an argument with a value that is not allowed."""
    return InvalidArgument(f"{name}={show_value(value)}: {allowed}")


def show_value(value: object) -> str:
    """Return a value as errors show it: one line, of at most 300 characters for text, else of 80."""
    if isinstance(value, str):
        text, longest = repr(value), LONGEST_TEXT
    else:
        # Cut containers before they are written out: a state dict would take seconds.
        text, longest = " ".join(_REPR.repr(value).split()), LONGEST_VALUE
        if isinstance(value, Mapping | list | tuple | set) and len(value) > LONGEST_VALUE:
            text = f"<{type(value).__name__} of {len(value):,}>"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def allowed_names(value: object, names: Iterable[str]) -> str:
    """Return `one of: a, b, c`, after `nearest: b; ` if up to three of the names are close to `value`."""
    known = list(names)
    allowed = "one of: " + ", ".join(known)
    close = difflib.get_close_matches(str(value)[:LONGEST_VALUE], known, cutoff=0.5)
    return f"nearest: {', '.join(close)}; {allowed}" if close else allowed
