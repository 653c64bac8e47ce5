"""What is derived from parameters."""

from __future__ import annotations

from dataclasses import dataclass

from admfast import host
from admfast.checks import switches, whole
from admfast.errors import invalid


@dataclass(frozen=True)
class FoldOptions:
    """Which derived forms to build; each can be switched off separately.

    Attributes:
        conv: implementation of the convolutions by name (see `admfast info`), None for the fastest.
        channels_last: images run with their channels together.
        two_sources: the 1x1 skip of a concatenation adds up the products of its two sources, which are never
            written side by side.
        residual: a convolution adds the skip to its own result.
        qkv_rows: rows of legacy qkv weights in the new order (the same bits).
        embeddings: the embedding's projections to all blocks in one product.
        memory: bytes that the Winograd forms of one network may take beyond its weights; where they would
            take more, none is made. None: a third of the memory that the process may use. Only convolutions
            on a CPU have such forms. The forms that sampling needs are counted: a diffusion model whose
            `predict` is differentiated holds as much again.
    """

    conv: str | None = None
    channels_last: bool = True
    two_sources: bool = True
    residual: bool = True
    qkv_rows: bool = True
    embeddings: bool = True
    memory: int | None = None

    def __post_init__(self) -> None:
        switches(self, "channels_last", "two_sources", "residual", "qkv_rows", "embeddings")
        if self.memory is not None:
            whole("memory", self.memory, 0)
        if self.conv is not None and not isinstance(self.conv, str):
            raise invalid("conv", self.conv, "the name of an implementation, or None")

    @property
    def budget(self) -> int:
        """Return `memory` in bytes."""
        return host.memory() // 3 if self.memory is None else self.memory
