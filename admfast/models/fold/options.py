"""Options for the forms that a network derives from its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from admfast.checks import store_booleans
from admfast.errors import invalid

# The parts of folding; the ablation bench can leave out each one:
#   channels_last: images are channels-last in memory
#   two_sources: a 1x1 skip convolution of two sources adds one product per source, which avoids concatenating
#     the sources
#   residual: a convolution adds the skip to its own result
#   qkv_rows: rows of legacy qkv weights are in the new order (the results have the same bits)
#   embeddings: one product projects the embedding to all blocks
PARTS = frozenset({"channels_last", "two_sources", "residual", "qkv_rows", "embeddings"})


@dataclass(frozen=True)
class FoldOptions:
    """Options for the forms that a network derives from its parameters.

    Attributes:
        conv: name of the convolutions' implementation (see `admfast info`); None for the fastest.
        int8: compute the torso's 3x3 convolutions of stride 1 from 8-bit numbers, except the first. Only the
            precision "int8" sets it.
    """

    conv: str | None = None
    int8: bool = False
    _without: frozenset[str] = frozenset()  # of PARTS, for the ablation bench

    def __post_init__(self) -> None:
        if self.conv is not None and not isinstance(self.conv, str):
            raise invalid("conv", self.conv, "the name of an implementation, or None")
        store_booleans(self, "int8")
        assert self._without <= PARTS, self._without

    def has(self, part: str) -> bool:
        """Tell whether a part, one of PARTS, is derived."""
        return part not in self._without
