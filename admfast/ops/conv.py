"""STUB until the op arrives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import invalid

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_ref(x, weight, bias=None, residual=None, *, stride=1, padding=1):
    y = FUNCTIONS[x.dim() - 2](x, weight, bias, stride, padding)
    return y if residual is None else y + residual


class FoldedConv:
    def __init__(self, weight, bias=None, *, stride=1, padding=0, dtype=None, impl=None):
        self.stride, self.padding, self.dtype = stride, padding, dtype or weight.dtype
        self.weight = weight.detach().to(self.dtype).clone()
        self.bias = None if bias is None else bias.detach().to(self.dtype).clone()

    def __call__(self, x, residual=None) -> Tensor:
        return conv_ref(x, self.weight, self.bias, residual, stride=self.stride, padding=self.padding)

    def refold(self, weight, bias) -> None:
        if weight.shape != self.weight.shape:
            raise invalid("weight.shape", tuple(weight.shape), f"{tuple(self.weight.shape)}")
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
