"""Triton kernels and their raw launchers, imported as `admfast.kernels`: one file per op and direction."""

if __name__ != "admfast.kernels":
    # In a checkout, `import kernels` finds this folder. transformers imports a package of that name to ask
    # for its version, so importing must work. The kernels themselves can be imported only as
    # `admfast.kernels`.
    __path__ = []
