"""The projections of an embedding to all residual blocks of a network, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.ops.transforms import outer_grad_enabled


@dataclass(frozen=True)
class ProjectedEmbedding:
    """The joined projections of an embedding to all residual blocks: values [N, total].

    emb: the embedding [N, E] itself; None if it is unknown.
    """

    values: Tensor
    emb: Tensor | None = None

    def for_published_block(self) -> Tensor | ProjectedEmbedding:
        """Return the embedding, which published blocks need, or this record if the embedding is unknown."""
        return self if self.emb is None else self.emb


class JoinedProjections:
    """SiLU followed by several linear layers, whose weights and biases are joined into one layer."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.weight, self.bias = _join_layers(layers)
        self._sources = _layer_parameters(layers)

    def refold(self, layers: Sequence[nn.Linear]) -> bool:
        """Write the layers' present values into the same memory; return False if they don't fit into it."""
        weight, bias = _join_layers(layers)
        if not (_is_same_kind(self.weight, weight) and _is_same_kind(self.bias, bias)):
            return False
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self._sources = _layer_parameters(layers)
        return True

    @property
    def is_usable(self) -> bool:
        """Tell whether the joined weights may be used: no layer's are replaced or need a gradient."""
        records = outer_grad_enabled()
        return all(
            layer.weight is weight
            and layer.bias is bias
            and not (records and (weight.requires_grad or bias.requires_grad))
            for layer, weight, bias in self._sources
        )

    def __call__(self, emb: Tensor) -> ProjectedEmbedding:
        """Project an embedding [N, E] by every layer."""
        return ProjectedEmbedding(F.linear(F.silu(emb), self.weight, self.bias), emb)


def _join_layers(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    weights = torch.cat([layer.weight.detach() for layer in layers])
    return weights, torch.cat([layer.bias.detach() for layer in layers])


def _layer_parameters(layers: Sequence[nn.Linear]) -> list[tuple[nn.Linear, Tensor, Tensor]]:
    return [(layer, layer.weight, layer.bias) for layer in layers]


def _is_same_kind(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
