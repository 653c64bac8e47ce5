"""Statistics of a tensor's channels that its producer attaches to it for the norm that reads it next."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Not an attribute of the tensor, which a user who saves it would save too.
_ATTACHED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def attach(x: Tensor, sums: Any) -> None:
    """Attach `sums` to `x`, valid until something writes to `x`; None attaches nothing."""
    if sums is not None and not x.is_inference():  # torch doesn't count the writes to an inference tensor
        _ATTACHED[x] = x._version, sums


def find_attached(x: Tensor) -> Any:
    """Return the statistics attached to `x`; None if there are none, or if `x` was written to since."""
    version, sums = _ATTACHED.get(x, (None, None))
    return sums if sums is not None and version == x._version else None
