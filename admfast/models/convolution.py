"""Convolutions that use a faster, derived form of their weights while their network is folded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.models.fold.options import FoldOptions
from admfast.ops.conv import ConvOptions, FoldedConv, conv, folded_conv, int8_unsupported_for
from admfast.ops.transforms import (
    in_autocast,
    in_forward_mode,
    in_program_trace,
    is_intercepted,
    outer_grad_enabled,
)

# Attributes that, besides the parameters, determine what a convolution computes.
GEOMETRY_ATTRIBUTES = frozenset({"stride", "padding", "dilation", "groups", "padding_mode", "_conv_forward"})


class FoldableConv(nn.Module):
    """Mixin of a convolution: `conv(x, residual, x2)` is `residual + conv([x, x2])`.

    Parameters have the names and shapes of any torch convolution. `fold_weights` derives a faster form of the
    weights. The forward uses it while the parameters are still the same tensors and the module is not in
    training mode. Otherwise the forward uses the weights, cast to the dtype of x.

    split: channels of the first source if the convolution always gets two sources, else 0. rows: order of the
    output channels in the folded form; None keeps their order. Only a forward with `any_order=True` uses a
    reordered form.
    """

    split: int = 0
    rows: list[int] | None = None
    weight: Tensor
    bias: Tensor | None
    _folded: FoldedConv | None = None
    _adds_residual: bool = True

    def fold_weights(
        self, options: FoldOptions, dtype: torch.dtype, spare_memory: bool = False, int8: bool = False
    ) -> None:
        """Derive the folded form, or update it in place; only ordinary convolutions (`_is_plain`) get one.

        int8: compute it from 8-bit numbers.
        """
        if not self._is_plain():
            return self.unfold()
        split = self.split if options.has("two_sources") else 0
        rows = self.rows if options.has("qkv_rows") else None
        other_settings = dtype, options.conv, split, rows, spare_memory, int8
        conv_options = ConvOptions(self.stride, self.padding, *other_settings)  # type: ignore[arg-type]
        if self._folded is not None and self._folded.options == conv_options:
            self._folded.refold(self.weight, self.bias)
        else:
            self._folded = FoldedConv(self.weight, self.bias, **vars(conv_options))
        self._adds_residual = options.has("residual")

    def _is_plain(self) -> bool:
        """Tell whether this is an ordinary convolution: zeros as padding, no dilation, no groups."""
        dilation_and_groups = set(self.dilation) | {self.groups}  # type: ignore[arg-type]
        if isinstance(self.padding, str):
            return False
        return (
            dilation_and_groups == {1}
            and self.padding_mode == "zeros"
            and "_conv_forward" not in self.__dict__
        )

    def fits_int8(self) -> bool:
        """Tell whether `conv_int8` computes this convolution."""
        stride: Any = self.stride
        padding: Any = self.padding
        kernel = tuple(self.weight.shape[2:])
        return (
            self._is_plain() and int8_unsupported_for(kernel, stride, padding, self.weight.shape[1]) is None
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in GEOMETRY_ATTRIBUTES and self._folded is not None:
            self.unfold()
        super().__setattr__(name, value)

    def unfold(self) -> None:
        """Drop the folded form."""
        self._folded = None

    @property
    def folded(self) -> FoldedConv | None:
        """The folded form, or None if this call must not use it."""
        form = self._folded
        if form is None or self.training:
            return None
        weight = self.weight
        # torch.func.functional_call replaces the parameters by other tensors.
        if weight is not form.weight or self.bias is not form.bias:
            return None
        # Autocast chooses dtypes layer by layer. A traced program has its own weights, and the form would be
        # a constant in it. Transforms can differentiate only torch's own operations.
        if (
            in_autocast(weight.device)
            or in_program_trace()
            or (self._records_gradient() and (is_intercepted() or in_forward_mode()))
        ):
            return None
        return form

    def _records_gradient(self) -> bool:
        """Tell whether this call is recorded for gradients of the parameters."""
        trainable = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trainable and outer_grad_enabled()

    def forward(
        self, x: Tensor, residual: Tensor | None = None, x2: Tensor | None = None, any_order: bool = False
    ) -> Tensor:
        folded = self.folded
        if folded is not None and self._can_use(folded.options, x2, any_order):
            fused_residual = residual if self._adds_residual else None
            if self._records_gradient():
                y = folded_conv(folded, x, self.weight, self.bias, fused_residual, x2)
            else:
                y = folded(x, fused_residual, x2)
            return y if fused_residual is residual else residual + y  # type: ignore[operator]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight.to(x.dtype)
        if weight.requires_grad and weight.dim() > 3 and self._is_plain():
            geometry = {"stride": self.stride, "padding": self.padding}
            if x2 is None:
                return conv(x, weight, bias, residual, **geometry)  # type: ignore[arg-type]
            # Two products, because concatenated sources would be kept as a copy for the gradient: 77 MB of
            # the peak memory of a 64 px training step at batch 4.
            first, second = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
            return conv(x2, second, None, conv(x, first, bias, residual, **geometry), **geometry)  # type: ignore[arg-type]
        if x2 is not None:
            x = torch.cat([x, x2], dim=1)
        y = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y if residual is None else residual + y

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the convolution without its bias, and the bias, if the norm that follows adds it at no cost.

        Otherwise return the convolution with its bias, and None.
        """
        folded = self.folded
        if folded is not None and not self._records_gradient() and self._can_use(folded.options, None, False):
            return folded.without_bias(x)
        return self(x), None

    def _can_use(self, options: ConvOptions, x2: Tensor | None, any_order: bool) -> bool:
        """Tell whether the folded form fits the number of sources and the order of channels of this call."""
        return (x2 is not None or not options.split) and (any_order or options.rows is None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A moved or converted module still has the same parameter objects, so `folded` can't notice it.
        self.unfold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_folded"}


class Conv1d(FoldableConv, nn.Conv1d):
    """A 1-D convolution that can be folded."""


class Conv2d(FoldableConv, nn.Conv2d):
    """A 2-D convolution that can be folded."""


class Conv3d(FoldableConv, nn.Conv3d):
    """A 3-D convolution that can be folded."""


class PointwiseConv1d(Conv1d):
    """A 1-D convolution with kernel size 1, computed as a matrix product; its output is channels-last."""

    @property
    def reordered(self) -> bool:
        """Tell whether the folded form outputs the channels in the order `rows`."""
        folded = self.folded
        return folded is not None and folded.options.rows is not None

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.transpose(1, 2), weight.squeeze(-1), bias).transpose(1, 2)


CONVOLUTIONS: dict[int, type[nn.Module]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}


def conv_nd(dims: int, *args: int, **kwargs: int | tuple[int, ...]) -> nn.Module:
    """Return a convolution over `dims` spatial dimensions."""
    return CONVOLUTIONS[dims](*args, **kwargs)
