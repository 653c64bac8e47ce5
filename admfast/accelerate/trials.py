"""Compare the outputs of a module before and after a conversion, on copies with random parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.ops.transforms import plain_eager_mode

# Largest relative difference of equal results: half of float32's digits, far more than rounding changes.
SAME = torch.finfo(torch.float32).eps ** 0.5

Conversion = Callable[[Any], None]
Inputs = Callable[[Any, int, int], list[Tensor]]  # (block, number of images, side) to the block's inputs
# (number of images, side) of each trial. If a block's result depends on either by way of a number in
# codes.NUMBERS, at least one trial shows it.
SIZES = ((2, 4), (1, 4), (3, 2), (4, 2), (5, 2))


def agrees(block: nn.Module, conversion: Conversion, inputs: Inputs) -> bool:
    """Tell whether a copy of a block gives the same results before and after a conversion."""
    with plain_eager_mode(), torch.random.fork_rng(_generators()):
        trial = bare_copy(block)
        given = [inputs(trial, *size) for size in SIZES]
        given.append([0.01 * t for t in given[0]])
        wanted = [trial(*(t.clone() for t in tensors)) for tensors in given]
        conversion(trial)
        return all(close(trial(*tensors), w) for tensors, w in zip(given, wanted, strict=True))


def _generators() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def close(found: Any, wanted: Any) -> bool:
    """Tell whether two results are the same to rounding."""
    if not isinstance(wanted, Tensor) or not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= SAME * wanted.abs().max())


def bare_copy(module: nn.Module) -> nn.Module:
    """Return a float32 copy in evaluation mode, without hooks and with random parameters.

    Parameters that are zero, as in a fresh network, would hide differences.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    with plain_eager_mode():
        bare = copy.deepcopy(module, memo).float().eval()
        for i, parameter in enumerate(bare.parameters()):
            values = random(*parameter.shape, seed=i).to(parameter.device)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4.0
            parameter.requires_grad_(False).copy_(values / fan_in**0.5)
    return bare


def random_images(count: int, channels: int, dims: int, side: int) -> Tensor:
    """Return normal random images [count, channels, ...] of a fixed seed; the last side is twice as long."""
    return random(count, channels, *(side,) * (dims - 1), 2 * side, seed=1)


def random(*shape: int, seed: int) -> Tensor:
    """Return float32 normal random numbers of a seed, on the CPU; torch's global generators are not used."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32
    )
