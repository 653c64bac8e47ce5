"""Statistics of a tensor's channels that its producer leaves for the norm that reads it next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_NAME = "_admfast_channel_sums"


def leave(x: Tensor, sums: Any) -> None:
    """Keep `sums` with `x` until somebody writes to it; None: nothing to keep."""
    if sums is not None and not x.is_inference():  # whose writes torch doesn't count
        setattr(x, _NAME, (x._version, sums))


def left(x: Tensor) -> Any:
    """Return what was left with `x`; None where nothing was, or `x` was written to since."""
    version, sums = getattr(x, _NAME, (None, None))
    return sums if sums is not None and version == x._version else None
