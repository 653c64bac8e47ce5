"""Accelerate the networks of other programs in place: `admfast.accelerate(model)`.

The module itself can be called. `accelerate.report(model)` says which parts of a model were converted;
`accelerate.denoiser` wraps an admfast pipeline for use in other libraries.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from admfast.accelerate.conversion import accelerate, report
from admfast.accelerate.denoisers import denoiser

__all__ = ["accelerate", "denoiser", "report"]


class _CallableModule(ModuleType):
    def __call__(self, model: Any, precision: str | None = None) -> Any:
        return accelerate(model, precision)


sys.modules[__name__].__class__ = _CallableModule
