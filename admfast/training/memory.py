"""The memory of a training step: what is alive at once in a step on tensors without memory.

The network runs forward and backward as it would in training, with the same implementations, and the bytes of
the storages that are alive are added up. Nothing is allocated or computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.checkpoints.describe import LiveBytes, network_inputs
from admfast.models.dropout import keyed_dropout
from admfast.training.draws import TrainStream
from admfast.training.network import build_network, set_precision
from admfast.training.recipe import Recipe


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step holds, in one process.

    Attributes:
        parameters, averages: of all parameters. gradients, moments: of those that are trained; AdamW has two
            moments of each.
        kept: what the forward pass of a microbatch leaves for its backward pass.
        peak: all that is alive at once, at the most.
    """

    parameters: int
    gradients: int
    moments: int
    averages: int
    kept: int
    peak: int


def step_memory(recipe: Recipe) -> StepMemory:
    """Count the memory of a step of one process that takes the whole batch, in its microbatches.

    Not counted: the process itself, the images, the terms of the loss, copies that a library makes inside a
    call, fragments of an allocator, and what several processes exchange.

    recipe: with a precision that isn't "auto" (see `resolved_precision`).
    Raises: InvalidArgument for patterns of frozen parameters that fit none.
    """
    # The module imports triton, which importing this package must not.
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = min(recipe.microbatch or recipe.batch_size, recipe.batch_size)
    # The gradients of the first microbatch are there while the second one runs; further ones are alike.
    parts = 2 if size < recipe.batch_size else 1
    with torch.device("meta"):
        net = build_network(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Tensors of the CPU, without memory: for those of "meta" the reference would run.
        state = {name: torch.empty_like(value, device="cpu") for name, value in net.state_dict().items()}
        net.load_state_dict(state, assign=True)
        set_precision(net, recipe.precision)
        inputs = {name: _as_images_lie(value) for name, value in network_inputs(recipe.network, size).items()}
        live, kept = LiveBytes(net, inputs), 0
        with live, _FusedAttention():
            for _ in range(parts):
                with keyed_dropout(net, recipe.seed, range(size), TrainStream.DROPOUT):
                    before, loss = live.now, net(**inputs).float().square().mean()
                    kept = live.now - before
                    loss.backward()
                del loss
        parameters = [(p.numel() * p.element_size(), p.requires_grad) for p in net.parameters()]
    total, trained = (sum(n for n, learns in parameters if learns or every) for every in (True, False))
    averages = total * (len(recipe.ema) + len(recipe.ema_power))
    return StepMemory(total, trained, 2 * trained, averages, kept, total + 2 * trained + averages + live.peak)


def _as_images_lie(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


class _FusedAttention(TorchDispatchMode):
    """Answers for torch which attention runs: a fused one, where for fake tensors it would be the formula."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._fused_sdp_choice.default:
            return SDPBackend.FLASH_ATTENTION.value
        return func(*args, **(kwargs or {}))
