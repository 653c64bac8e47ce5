"""Statistics of a tensor's channels that its producer leaves for the norm that reads it next."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Not an attribute of the tensor, which a user who saves it would save too.
_LEFT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def leave(x: Tensor, sums: Any) -> None:
    """Keep `sums` with `x` until somebody writes to it; None: nothing to keep."""
    if sums is not None and not x.is_inference():  # torch doesn't count the writes to an inference tensor
        _LEFT[x] = x._version, sums


def left(x: Tensor) -> Any:
    """Return what was left with `x`; None if nothing was, or if `x` was written to since."""
    version, sums = _LEFT.get(x, (None, None))
    return sums if sums is not None and version == x._version else None
