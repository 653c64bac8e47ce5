"""Recognise and convert the layers that are common to all code bases: convolutions, norms, SiLU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from admfast.accelerate.class_conversion import convert, original_class_of
from admfast.accelerate.code_inspection import ACTIVATION_NAMES, NORM_NAMES, find_class_difference
from admfast.accelerate.equivalence import is_close, random_normal, randomised_copy
from admfast.models import convolution, layers
from admfast.ops.conv import FoldedConv
from admfast.ops.layout import to_torch_channels_last
from admfast.ops.transforms import plain_eager_mode


class SelfCheckingConv(convolution.FoldableConv):
    """A convolution that checks at every use that its folded weights are up to date.

    It may be called without its network, which otherwise renews them.

    follows_input_dtype: whether it computes in the dtype of x even if its weights have another one.
    """

    follows_input_dtype: ClassVar[bool] = False

    @property
    def folded(self) -> FoldedConv | None:
        # A compiled program would not notice writes to the weights.
        conv = None if torch.compiler.is_compiling() else super().folded
        return conv if conv is None or conv.is_current else None


def _self_checking(ours: type[convolution.FoldableConv]) -> type[nn.Module]:
    return type(ours.__name__, (SelfCheckingConv, ours), {})


CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _self_checking(convolution.Conv1d),
    nn.Conv2d: _self_checking(convolution.Conv2d),
    nn.Conv3d: _self_checking(convolution.Conv3d),
}
POINTWISE = _self_checking(convolution.PointwiseConv1d)


class _FirstConv(nn.Module):
    """Mixin of a network's first convolution, which makes images channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        folded: FoldedConv | None = self.folded  # type: ignore[assignment]
        x = x if folded is None or self.follows_input_dtype else x.to(folded.dtype)
        return super().forward(to_torch_channels_last(x) if x.dim() == 4 else x)  # type: ignore[misc]


class _LastConv(nn.Module):
    """Mixin of a network's last convolution, which returns contiguous images as the program's own does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()  # type: ignore[misc]


@functools.cache
def first_conv_class(ours: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of one of our convolutions for a network's first layer.

    It makes images channels-last, so that no block has to: `torch.cat` and the blocks keep the layout.
    """
    return type(ours.__name__, (_FirstConv, ours), {})


@functools.cache
def last_conv_class(ours: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of one of our convolutions for a network's last layer."""
    return type(ours.__name__, (_LastConv, ours), {})


class Norm(nn.Module):
    """`layers.Norm` for a group norm whose class does not derive from torch's."""

    forward = layers.Norm.forward  # type: ignore[assignment]
    recomputation = layers.Norm.recomputation


def is_conv(module: Any) -> bool:
    """Tell whether a module is a convolution of torch's own class."""
    return type(module) in CONVOLUTIONS


def is_norm(module: Any) -> bool:
    """Tell whether a module is a group norm with weight and bias, of any class and handling of dtypes."""
    weight, bias, groups, eps = (getattr(module, n, None) for n in ("weight", "bias", "num_groups", "eps"))
    if not isinstance(module, nn.Module) or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        return False
    if (
        not isinstance(groups, int)
        or not isinstance(eps, float)
        or find_class_difference(original_class_of(module), NORM_NAMES)
    ):
        return False
    with plain_eager_mode():
        norm: Any = randomised_copy(module)
        x = 0.01 * random_normal(2, len(weight), 3, 3, seed=1).to(weight.device)  # so that eps matters
        expected = nn.functional.group_norm(x, groups, norm.weight, norm.bias, eps)
        return is_close(norm(x.clone()), expected)


def is_silu(module: Any) -> bool:
    """Tell whether a module is `x * sigmoid(x)`."""
    if type(module) is nn.SiLU:
        return True
    if find_class_difference(original_class_of(module), ACTIVATION_NAMES):
        return False
    x = torch.linspace(-8, 8, 65, device="cpu")
    with plain_eager_mode():
        return is_close(module(x.clone()), nn.functional.silu(x))


def convert_norm(norm: nn.Module) -> None:
    """Convert a norm; `is_norm(norm)` must be true."""
    convert(norm, layers.Norm if isinstance(norm, nn.GroupNorm) else Norm)


def convert_conv(conv: nn.Module, subclass_of: Callable[[Any], type[nn.Module]] | None = None) -> None:
    """Convert a convolution of torch's own class; leave any other module as it is.

    subclass_of: `first_conv_class` for a network's first convolution, `last_conv_class` for its last.
    """
    if is_conv(conv):
        ours = CONVOLUTIONS[type(conv)]
        convert(conv, ours if subclass_of is None else subclass_of(ours))
