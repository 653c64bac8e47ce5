"""Triton kernels and their raw launchers, imported as `admfast.kernels`: one file per op and direction."""

if __name__ != "admfast.kernels":
    raise ImportError("these kernels belong to admfast: import admfast.kernels")
