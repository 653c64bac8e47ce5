"""Random weights from a fixed seed, so that a network of any size needs no file."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from admfast.checkpoints import network_shapes
from admfast.models import build
from admfast.models.config import NetConfig


def random_state(config: NetConfig, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return random weights by name; they keep activations of order one: norms near 1, others by fan-in.

    No weight is zero. A fresh network of this architecture returns zeros, because its last layers are zero,
    and all implementations would agree. Values are the same on devices of the same kind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return {key: draw_weight(key, shape, generator) for key, shape in network_shapes(config).items()}


def draw_weight(key: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw one tensor of `random_state`, by its name and shape."""
    z = torch.randn(tuple(shape), generator=generator, device=generator.device)
    if key.endswith(".bias"):
        return z * 0.1
    if len(shape) == 1:
        return 1 + 0.1 * z
    if not key.endswith(("label_emb.weight", "positional_embedding")):
        z /= math.sqrt(math.prod(shape[1:]))
    return z


@functools.lru_cache(maxsize=2)
def shared_state(config: NetConfig, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return `random_state`, cached for the last two networks; all callers share the same tensors."""
    return random_state(config, seed, device)


def network(config: NetConfig, seed: int, device: torch.device) -> nn.Module:
    """Return a network with the shared random weights, frozen, in evaluation mode; it copies no weights."""
    with torch.device("meta"):
        net = build(config)
    net.load_state_dict(shared_state(config, seed, device), strict=True, assign=True)
    return net.requires_grad_(False).eval()
