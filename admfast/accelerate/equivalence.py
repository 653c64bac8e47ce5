"""Compare the outputs of a module before and after a conversion, on copies with random parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.ops.transforms import plain_eager_mode

# Largest relative difference of equal results: half of float32's digits, far more than rounding changes.
MAX_RELATIVE_DIFFERENCE = torch.finfo(torch.float32).eps ** 0.5

Conversion = Callable[[Any], None]
Inputs = Callable[[Any, int, int], list[Tensor]]  # (block, number of images, side) to the block's inputs
# (number of images, side) of each trial. If a block's result depends on either by way of a number in
# code_inspection.ALLOWED_NUMBERS, at least one trial shows it.
TRIAL_SIZES = ((2, 4), (1, 4), (3, 2), (4, 2), (5, 2))


def gives_same_results(block: nn.Module, conversion: Conversion, inputs: Inputs) -> bool:
    """Tell whether a copy of a block gives the same results before and after a conversion."""
    with plain_eager_mode(), torch.random.fork_rng(_generators()):
        copied_block = randomised_copy(block)
        trial_inputs = [inputs(copied_block, *size) for size in TRIAL_SIZES]
        trial_inputs.append([0.01 * t for t in trial_inputs[0]])
        expected = [copied_block(*(t.clone() for t in tensors)) for tensors in trial_inputs]
        conversion(copied_block)
        return all(
            is_close(copied_block(*tensors), output)
            for tensors, output in zip(trial_inputs, expected, strict=True)
        )


def _generators() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def is_close(actual: Any, expected: Any) -> bool:
    """Tell whether two results are the same to rounding."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= MAX_RELATIVE_DIFFERENCE * expected.abs().max())


def randomised_copy(module: nn.Module) -> nn.Module:
    """Return a float32 copy in evaluation mode, without hooks and with random parameters.

    Parameters that are zero, as in a fresh network, would hide differences.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    with plain_eager_mode():
        copied = copy.deepcopy(module, memo).float().eval()
        for i, parameter in enumerate(copied.parameters()):
            values = random_normal(*parameter.shape, seed=i).to(parameter.device)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4.0
            parameter.requires_grad_(False).copy_(values / fan_in**0.5)
    return copied


def random_images(count: int, channels: int, dims: int, side: int) -> Tensor:
    """Return normal random images [count, channels, ...] of a fixed seed; the last side is twice as long."""
    return random_normal(count, channels, *(side,) * (dims - 1), 2 * side, seed=1)


def random_normal(*shape: int, seed: int) -> Tensor:
    """Return float32 normal random numbers of a seed, on the CPU; torch's global generators are not used."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32
    )
