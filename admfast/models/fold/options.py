"""Choose what a network derives from its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from admfast.errors import invalid

# What is derived, each of which the ablation bench can leave out:
#   channels_last: images run with their channels together
#   two_sources: the 1x1 skip of a concatenation adds up the products of its two sources, which are never
#     written side by side
#   residual: a convolution adds the skip to its own result
#   qkv_rows: rows of legacy qkv weights in the new order (the same bits)
#   embeddings: the embedding's projections to all blocks in one product
PARTS = frozenset({"channels_last", "two_sources", "residual", "qkv_rows", "embeddings"})


@dataclass(frozen=True)
class FoldOptions:
    """Choose what a network derives from its parameters.

    Attributes:
        conv: implementation of the convolutions by name (see `admfast info`), None for the fastest.
    """

    conv: str | None = None
    _without: frozenset[str] = frozenset()  # of PARTS, for the ablation bench

    def __post_init__(self) -> None:
        if self.conv is not None and not isinstance(self.conv, str):
            raise invalid("conv", self.conv, "the name of an implementation, or None")
        assert self._without <= PARTS, self._without

    def has(self, part: str) -> bool:
        """Return whether a part of PARTS is derived."""
        return part not in self._without
