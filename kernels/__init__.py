"""Triton kernels, imported as `admfast.kernels`: one file an op, raw forward and backward launchers."""

if __name__ != "admfast.kernels":
    raise ImportError("these kernels belong to admfast: import admfast.kernels")
