"""Compare what modules compute, on copies with random parameters and small inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.ops.transforms import deriving

# Rounding leaves far more than half the digits of a result.
SAME = torch.finfo(torch.float32).eps ** 0.5

Conversion = Callable[[Any], None]
Inputs = Callable[[Any, int, int], list[Tensor]]  # of a block: tensors for so many images of such a side
# Images and sides: what depends on their number or size by numbers as small as codes.NUMBERS shows on one.
SIZES = ((2, 4), (1, 4), (3, 2), (4, 2), (5, 2))


def agrees(block: nn.Module, conversion: Conversion, inputs: Inputs) -> bool:
    """Tell whether a copy of a block gives the same before and after a conversion."""
    with deriving(), torch.random.fork_rng(_generators()):
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
    """Return a copy in float32 and evaluation mode, without hooks; parameters are random: zeros hide much."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    with deriving():
        bare = copy.deepcopy(module, memo).float().eval()
        for i, parameter in enumerate(bare.parameters()):
            values = random(*parameter.shape, seed=i).to(parameter.device)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4.0
            parameter.requires_grad_(False).copy_(values / fan_in**0.5)
    return bare


def random_images(count: int, channels: int, dims: int, side: int) -> Tensor:
    """Return fixed normal numbers [count, channels, ...], the last side twice as long as the others."""
    return random(count, channels, *(side,) * (dims - 1), 2 * side, seed=1)


def random(*shape: int, seed: int) -> Tensor:
    """Return fixed normal numbers; torch's own generators stay where they are."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32
    )
