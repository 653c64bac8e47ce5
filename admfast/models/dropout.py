"""Dropout with torch's random masks or, in training runs, with masks fixed by (seed, sample, layer)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admfast.errors import invalid
from admfast.ops.update import as_seeds, normal


@dataclass(frozen=True)
class DropoutMaskKey:
    """Key of one layer's masks: the run's seed, the number of each sample, the layer's noise stream."""

    seed: int
    sample_ids: tuple[int, ...]
    stream: int

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Return a bool mask of x [N, ...]: True (kept) if its normal number is at least the p-quantile."""
        if len(self.sample_ids) != len(x):
            raise invalid(
                "sample_ids",
                len(self.sample_ids),
                f"one number for each of the {len(x)} samples of the batch",
            )
        key = as_seeds([self.seed]).to(x.device)
        shape = tuple(x.shape[1:])
        z = torch.cat([normal(key, shape, k, self.stream) for k in self.sample_ids])
        # Computed in float64 on the CPU, not read from a table, because p can be any number.
        quantile = float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64, device="cpu")))
        return z >= quantile


class Dropout(nn.Dropout):
    """`nn.Dropout`, except that within `keyed_dropout` the mask depends on a key, not on torch's generator.

    The key is stored in the module, not per thread: a backward pass that recomputes a block draws its mask
    again, and on a GPU it runs in another thread.
    """

    key: DropoutMaskKey | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None or not self.training or not self.p:
            return super().forward(x)
        return x * (self.key.mask(x, self.p).to(x.dtype) / (1 - self.p))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "key"}


@contextlib.contextmanager
def keyed_dropout(net: nn.Module, seed: int, sample_ids: Sequence[int], first_stream: int) -> Iterator[None]:
    """Draw the masks of a network's dropout layers from Philox; run forward and backward within the block.

    Layer l (in the order of `net.modules()`) keeps element e of sample k if the normal number of (key seed,
    row k, stream first_stream + l, element e) is at least the p-quantile.

    sample_ids: number of each sample, in the order of the batch.
    Two threads must not train the same network at once.
    """
    layers = [module for module in net.modules() if isinstance(module, Dropout)]
    for number, layer in enumerate(layers):
        layer.key = DropoutMaskKey(seed, tuple(sample_ids), first_stream + number)
    try:
        yield
    finally:
        for layer in layers:
            layer.key = None
