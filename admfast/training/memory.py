"""Count the memory of a training step by running it on fake tensors, which have no memory.

The network runs forward and backward with the same implementations as in training, and the bytes of the
storages that are alive are added up. Nothing is allocated or computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.checkpoints.describe import LiveBytes, make_network_inputs
from admfast.models.dropout import keyed_dropout
from admfast.training.draws import TrainStream
from admfast.training.network import build_network, set_precision
from admfast.training.recipe import Recipe


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step in one process, in bytes.

    Attributes:
        parameters, averages: size of all parameters, and of their averages.
        gradients, moments: of the trained parameters; AdamW has two moments for each.
        saved_for_backward: size of the tensors that a microbatch's forward pass keeps for the backward pass.
        peak: largest size of everything that is in use at the same time.
    """

    parameters: int
    gradients: int
    moments: int
    averages: int
    saved_for_backward: int
    peak: int


def step_memory(recipe: Recipe) -> StepMemory:
    """Count the memory of a step in which one process takes the whole batch, in microbatches.

    Not counted: the process itself, the images, the terms of the loss, copies that a library makes inside a
    call, fragmentation of the allocator, and buffers for the exchange between processes.

    recipe: its precision must not be "auto" (see `resolve_precision`).
    Raises: InvalidArgument for a pattern of frozen parameters that no parameter matches.
    """
    # Imported here because it imports triton, which `import admfast` must not do.
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = min(recipe.microbatch or recipe.batch_size, recipe.batch_size)
    # The second microbatch runs while the gradients of the first exist; the later ones need the same memory.
    parts = 2 if size < recipe.batch_size else 1
    with torch.device("meta"):
        net = build_network(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Fake tensors on the CPU: for those on "meta", the reference implementations would run.
        state = {name: torch.empty_like(value, device="cpu") for name, value in net.state_dict().items()}
        net.load_state_dict(state, assign=True)
        set_precision(net, recipe.precision)
        inputs = {
            name: _channels_last(value) for name, value in make_network_inputs(recipe.network, size).items()
        }
        live, saved_for_backward = LiveBytes(net, inputs), 0
        with live, _FusedAttention():
            for _ in range(parts):
                with keyed_dropout(net, recipe.seed, range(size), TrainStream.DROPOUT):
                    before, loss = live.now, net(**inputs).float().square().mean()
                    saved_for_backward = live.now - before
                    loss.backward()
                del loss
        parameters = [(p.numel() * p.element_size(), p.requires_grad) for p in net.parameters()]
    total, trained = (sum(n for n, learns in parameters if learns or every) for every in (True, False))
    averages = total * (len(recipe.ema) + len(recipe.ema_power))
    return StepMemory(
        total, trained, 2 * trained, averages, saved_for_backward, total + 2 * trained + averages + live.peak
    )


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


class _FusedAttention(TorchDispatchMode):
    """Mode that makes torch choose a fused attention; for fake tensors it would choose the plain formula."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._fused_sdp_choice.default:
            return SDPBackend.FLASH_ATTENTION.value
        return func(*args, **(kwargs or {}))
