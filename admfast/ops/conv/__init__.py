"""Convolution with an added bias and residual: `conv` with trainable weights, `FoldedConv` with frozen ones.

`folded.py` and `train.py` hold the two ops, each with its table of implementations; `forms.py` holds what is
derived from frozen weights and runs it, `grad.py` their autograd, `winograd.py` the algorithm, `epilogue.py`
the kernel that adds bias and residual on a GPU.
"""

from admfast.ops.conv.folded import FoldedConv, conv_ref
from admfast.ops.conv.forms import ConvOptions
from admfast.ops.conv.train import conv, folded_conv

__all__ = ["ConvOptions", "FoldedConv", "conv", "conv_ref", "folded_conv"]
