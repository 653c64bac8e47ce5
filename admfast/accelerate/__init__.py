"""Make the networks of other programs faster, in place: `admfast.accelerate(model)`.

The module itself is the function. `accelerate.report(model)` says what runs on what; `accelerate.denoiser`
gives our own pipelines to other libraries.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from admfast.accelerate.denoisers import denoiser
from admfast.accelerate.door import accelerate, report

__all__ = ["accelerate", "denoiser", "report"]


class _Door(ModuleType):
    def __call__(self, model: Any, precision: str | None = None) -> Any:
        return accelerate(model, precision)


sys.modules[__name__].__class__ = _Door
