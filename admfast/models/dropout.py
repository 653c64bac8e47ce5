"""Dropout whose mask is torch's, or in a training run a function of (seed, sample, layer)."""

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
class MaskKey:
    """Key of one layer's masks: the run's seed, the number of every sample, the layer's stream."""

    seed: int
    ks: tuple[int, ...]
    stream: int

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Return which elements of x [N, ...] stay: those whose normal is at or above the p-quantile."""
        if len(self.ks) != len(x):
            raise invalid("ks", len(self.ks), f"one number for each of the {len(x)} samples of the batch")
        key = as_seeds([self.seed]).to(x.device)
        shape = tuple(x.shape[1:])
        z = torch.cat([normal(key, shape, k, self.stream) for k in self.ks])
        # The device's float64 quantile, not a table: p is any number.
        quantile = float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64, device="cpu")))
        return z >= quantile


class Dropout(nn.Dropout):
    """As `nn.Dropout`; within `keyed_dropout` the mask is drawn from the key, else from torch's generator.

    The key lies in the module, not in the thread: a backward pass that recomputes a block draws its mask
    again, on a GPU from a thread of its own.
    """

    key: MaskKey | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None or not self.training or not self.p:
            return super().forward(x)
        return x * (self.key.mask(x, self.p).to(x.dtype) / (1 - self.p))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "key"}


@contextlib.contextmanager
def keyed_dropout(net: nn.Module, seed: int, ks: Sequence[int], first_stream: int) -> Iterator[None]:
    """Draw the masks of a network's dropout layers from Philox within the block, backward pass included.

    Element e of sample k stays in layer l (counted in the order of `net.modules()`) where the normal of
    (key seed, row k, stream first_stream + l, element e) is at or above the p-quantile.

    ks: number of every sample of the batch, in its order. Not for a network that two threads train at once.
    """
    layers = [module for module in net.modules() if isinstance(module, Dropout)]
    for number, layer in enumerate(layers):
        layer.key = MaskKey(seed, tuple(ks), first_stream + number)
    try:
        yield
    finally:
        for layer in layers:
            layer.key = None
