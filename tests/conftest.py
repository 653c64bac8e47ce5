"""Without a CUDA device the Triton kernels are tested through Triton's interpreter.

Triton reads the variable when a kernel's decorator runs, hence here, before anything is imported. What is
chosen by default stays the same: the interpreter runs only where it is named.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
