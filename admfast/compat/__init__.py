"""Floor 7: the published packages' names over the floors below, for programs that import them.

Nothing here is installed under the published names. `from admfast.compat.guided_diffusion import ...` works
anywhere; `python -m admfast.accelerate --package PROGRAM` puts the folder `front` first on the path, in which
the published names are, and `stand_ins` last.
"""
