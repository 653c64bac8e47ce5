"""Convolution with an added bias and residual: `conv` with trainable weights, `FoldedConv` with frozen ones.

`folded.py` has `FoldedConv` and `train.py` has `conv`, each with its table of implementations. `forms.py`
derives forms of frozen weights and runs them, `grad.py` has their autograd, `int8.py` the numbers of
convolutions of 8 bits, `winograd.py` Winograd's algorithm, and `epilogue.py` the kernel that adds bias and
residual on a GPU.
"""

from admfast.ops.conv.folded import FoldedConv, conv_ref
from admfast.ops.conv.forms import ConvOptions, int8_unsupported_for
from admfast.ops.conv.int8 import conv_int8_ref
from admfast.ops.conv.train import conv, folded_conv

__all__ = [
    "ConvOptions",
    "FoldedConv",
    "conv",
    "conv_int8_ref",
    "conv_ref",
    "folded_conv",
    "int8_unsupported_for",
]
