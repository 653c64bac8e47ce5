"""Convolutions that run on a form of their weights derived for speed, where their network is folded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.models.fold.options import FoldOptions
from admfast.ops.conv import ConvOptions, FoldedConv, conv, folded_conv
from admfast.ops.transforms import in_autocast, in_forward_mode, in_program, outer_grad_enabled, traced

# What else than its parameters decides what a convolution computes.
GEOMETRY = frozenset({"stride", "padding", "dilation", "groups", "padding_mode", "_conv_forward"})


class FoldableConv(nn.Module):
    """Mixin of a convolution: `conv(x, residual, x2)` is `residual + conv([x, x2])`.

    Parameters are named and shaped as in any convolution. `fold_weights` derives from them what the forward
    then runs on, as long as they are the same tensors and the module is not in training mode. The forward
    without it takes the weights in the dtype of x.

    split: channels of the first source where it is always given two, else 0. rows: the order in which the
    folded form puts out its channels, None for their own; only a forward `any_order` runs on such a form.
    """

    split: int = 0
    rows: list[int] | None = None
    weight: Tensor
    bias: Tensor | None
    _folded: FoldedConv | None = None
    _adds_residual: bool = True

    def fold_weights(self, options: FoldOptions, dtype: torch.dtype, spare_memory: bool = False) -> None:
        """Derive the folded form, or renew it in place; none where no form knows what the module computes."""
        if not self._plain():
            return self.unfold()
        split = self.split if options.has("two_sources") else 0
        rows = self.rows if options.has("qkv_rows") else None
        geometry = self.stride, self.padding
        settings = ConvOptions(*geometry, dtype, options.conv, split, rows, spare_memory)  # type: ignore[arg-type]
        if self._folded is not None and self._folded.options == settings:
            self._folded.refold(self.weight, self.bias)
        else:
            self._folded = FoldedConv(self.weight, self.bias, **vars(settings))
        self._adds_residual = options.has("residual")

    def _plain(self) -> bool:
        """Tell whether this is a convolution of zeros around x, with neither dilation nor groups."""
        others = set(self.dilation) | {self.groups}  # type: ignore[arg-type]
        if isinstance(self.padding, str):
            return False
        return others == {1} and self.padding_mode == "zeros" and "_conv_forward" not in self.__dict__

    def __setattr__(self, name: str, value: Any) -> None:
        if name in GEOMETRY and self._folded is not None:
            self.unfold()
        super().__setattr__(name, value)

    def unfold(self) -> None:
        """Drop the folded form."""
        self._folded = None

    @property
    def folded(self) -> FoldedConv | None:
        """The folded form where it may be used."""
        found = self._folded
        if found is None or self.training:
            return None
        weight = self.weight
        # Under torch.func.functional_call other tensors stand here.
        if weight is not found.weight or self.bias is not found.bias:
            return None
        # Under autocast dtypes are torch's business, layer by layer; in a traced program, whose weights are
        # its own, the form would be a constant; and transforms differentiate torch's own operations.
        if (
            in_autocast(weight.device)
            or in_program()
            or (self._recorded() and (traced() or in_forward_mode()))
        ):
            return None
        return found

    def _recorded(self) -> bool:
        """Tell whether somebody may ask for the parameters' gradients later."""
        trainable = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trainable and outer_grad_enabled()

    def forward(
        self, x: Tensor, residual: Tensor | None = None, x2: Tensor | None = None, any_order: bool = False
    ) -> Tensor:
        folded = self.folded
        if folded is not None and self._serves(folded.options, x2, any_order):
            inside = residual if self._adds_residual else None
            if self._recorded():
                y = folded_conv(folded, x, self.weight, self.bias, inside, x2)
            else:
                y = folded(x, inside, x2)
            return y if inside is residual else residual + y  # type: ignore[operator]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight.to(x.dtype)
        if weight.requires_grad and weight.dim() > 3 and self._plain():
            geometry = {"stride": self.stride, "padding": self.padding}
            if x2 is None:
                return conv(x, weight, bias, residual, **geometry)  # type: ignore[arg-type]
            # Side by side the sources would be kept for the gradient: 77 MB of a 64 px step's peak, batch 4.
            first, second = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
            return conv(x2, second, None, conv(x, first, bias, residual, **geometry), **geometry)  # type: ignore[arg-type]
        if x2 is not None:
            x = torch.cat([x, x2], dim=1)
        y = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y if residual is None else residual + y

    def _serves(self, options: ConvOptions, x2: Tensor | None, any_order: bool) -> bool:
        """Tell whether the folded form takes as many sources as are given, in an order that may come out."""
        return (x2 is not None or not options.split) and (any_order or options.rows is None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What moves or converts a module keeps its parameters' identity.
        self.unfold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_folded"}


class Conv1d(FoldableConv, nn.Conv1d):
    """1-D."""


class Conv2d(FoldableConv, nn.Conv2d):
    """2-D."""


class Conv3d(FoldableConv, nn.Conv3d):
    """3-D."""


class PointwiseConv1d(Conv1d):
    """A 1-D convolution of kernel 1: a matrix product that puts its channels out together."""

    @property
    def reordered(self) -> bool:
        """Tell whether the channels come out in the order of `rows`."""
        folded = self.folded
        return folded is not None and folded.options.rows is not None

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.transpose(1, 2), weight.squeeze(-1), bias).transpose(1, 2)


CONVOLUTIONS: dict[int, type[nn.Module]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}


def conv_nd(dims: int, *args: int, **kwargs: int | tuple[int, ...]) -> nn.Module:
    """A convolution over `dims` spatial dimensions."""
    return CONVOLUTIONS[dims](*args, **kwargs)
