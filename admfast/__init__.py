"""admfast: the ADM diffusion models (ADM, ADM-G, ADM-U), exact and fast.

pipe = admfast.load("digits32")
images = pipe.sample(classes=range(10), seeds=range(10), steps=50)   # uint8 [10, 32, 32, 1]

Names and subpackages (such as `admfast.models`) are imported at their first use: torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admfast import accelerate as accelerate
    from admfast import solvers as solvers
    from admfast.errors import AdmfastError as AdmfastError
    from admfast.models import Classifier as Classifier
    from admfast.models import UNet as UNet
    from admfast.models import Upsampler as Upsampler
    from admfast.sampling import guides as guides
    from admfast.sampling.export import export as export
    from admfast.sampling.load import load as load
    from admfast.sampling.pipeline import Pipeline as Pipeline
    from admfast.solvers import SOLVERS as SOLVERS

__version__ = "0.1.0"
# The module that defines each public name.
_MODULE_OF_NAME = {
    "AdmfastError": "errors",
    "Classifier": "models",
    "Pipeline": "sampling.pipeline",
    "SOLVERS": "solvers",
    "UNet": "models",
    "Upsampler": "models",
    "export": "sampling.export",
    "load": "sampling.load",
}
# Public modules that lie deeper in the package than `admfast.NAME`.
_DEEPER_MODULES = {"guides": "sampling.guides"}
__all__ = ["__version__", "accelerate", "solvers", *sorted(_MODULE_OF_NAME), *_DEEPER_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name or a subpackage at its first use (PEP 562)."""
    if name in _MODULE_OF_NAME:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        module_name = f"{__name__}.{_DEEPER_MODULES.get(name, name)}"
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
