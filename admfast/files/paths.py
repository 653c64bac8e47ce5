"""Check a path that a user gave, and expand "~"."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from os import PathLike
from pathlib import Path

from admfast.errors import invalid

# One slash is enough, as pathlib merges two. A single letter is a drive of Windows, not a scheme.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^/]")


def user_path(name: str, value: str | PathLike[str], endings: Collection[str] = ()) -> Path:
    """Return a user's path with "~" and "~user" expanded.

    name: the argument's name, for errors. endings: endings that the path may have; empty allows all.
    Raises:
        InvalidArgument: for a URL, an unknown home folder, another ending, or a value that is not a path.
    """
    text = os.fspath(value) if isinstance(value, str | PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise invalid(name, value, "the path of a file or folder")
    if _URL.match(text) and not os.path.lexists(text):
        raise invalid(
            name, text, "a URL, not a path: download the file first (admfast fetch gets the released ones)"
        )
    if endings and Path(text).suffix not in endings:
        raise invalid(name, text, f"a name that ends in {', '.join(endings)}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise invalid(name, text, "a path that begins with a known home folder, or without ~") from None
