"""Autograd of convolutions with frozen weights, over implementations that torch can't differentiate.

A convolution of stride one is linear in its input, and its transpose is the convolution with the weights
flipped in space and their channels exchanged. So the backward is the forward in the other direction, and
every further derivative is one of the two. The weights get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from admfast.ops.conv.forms import DIRECTIONS_BY_KEY, Direction
from admfast.ops.layout import channels_last, empty_channels_last
from admfast.ops.native import unused_namespace


class ConvFn(torch.autograd.Function):
    """Autograd of one direction of a convolution, differentiable in x and residual any number of times.

    While a trace is made, `direction` is the key of the direction; the op `folded_conv` looks it up when it
    runs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, bias: Tensor | None, residual: Tensor | None, direction: Direction | str
    ) -> Tensor:
        if isinstance(direction, str):
            return _folded_conv(x, bias, residual, direction)
        return direction.run(direction, x, bias, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, _, ctx.direction = inputs
        ctx.weights_version = None if isinstance(ctx.direction, str) else ctx.direction.weights_version()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = None
        if ctx.needs_input_grad[0]:
            if isinstance(ctx.direction, str):
                dx = ConvFn.apply(dy, None, None, transposed_key(ctx.direction))
            else:
                if ctx.direction.weights_version() != ctx.weights_version:
                    raise RuntimeError(
                        "folded convolution: its weights were written to, or replaced, between the forward "
                        "and the backward pass"
                    )
                other = ctx.direction.transposed()
                dx = other.run(other, dy, None, None)
        return dx, None, dy if ctx.needs_input_grad[2] else None, None


def find_direction(key: str) -> Direction:
    """Return the direction of a key: a number, with "t" appended for the transpose of that direction."""
    try:
        direction = DIRECTIONS_BY_KEY[key.removesuffix("t")]
    except KeyError:
        raise RuntimeError(f"folded_conv: the convolution {key} that was traced is gone") from None
    return direction.transposed() if key.endswith("t") else direction


def transposed_key(key: str) -> str:
    """Return the key of the transposed direction."""
    return key.removesuffix("t") if key.endswith("t") else key + "t"


def _run(x: Tensor, bias: Tensor | None, residual: Tensor | None, key: str) -> Tensor:
    direction = find_direction(key)
    with torch.no_grad():
        return channels_last(direction.run(direction, x, bias, residual))


def _fake(x: Tensor, bias: Tensor | None, residual: Tensor | None, key: str) -> Tensor:
    return empty_channels_last(find_direction(key).out_shape(x), x)


# One op for both directions of every convolution: a trace sees neither the derived weights nor which
# implementation runs, both of which may change from call to call.
_NAMESPACE = unused_namespace("admfast", "folded_conv")
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_LIBRARY.define("folded_conv(Tensor x, Tensor? bias, Tensor? residual, str key) -> Tensor")
_LIBRARY.impl("folded_conv", _run, "CPU")
torch.library.register_fake(f"{_NAMESPACE}::folded_conv", _fake, lib=_LIBRARY)
_folded_conv = getattr(torch.ops, _NAMESPACE).folded_conv
