"""Floor 7: packages with published names, built on admfast, for programs that import the original ones.

Nothing here is installed under a published name. `from admfast.compat.guided_diffusion import ...` works
anywhere. `python -m admfast.accelerate --package PROGRAM` puts two folders on `sys.path`: `front`, which has
the published names, at its beginning, and `stand_ins` at its end.
"""
