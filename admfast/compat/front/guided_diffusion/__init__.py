"""The name `guided_diffusion` for `admfast.compat.guided_diffusion`: both names import the same modules."""

import importlib
import pkgutil
import sys

from admfast.compat import guided_diffusion

sys.modules[__name__] = guided_diffusion
for _found in pkgutil.iter_modules(guided_diffusion.__path__):
    _module = importlib.import_module(f"{guided_diffusion.__name__}.{_found.name}")
    sys.modules[f"{__name__}.{_found.name}"] = _module
