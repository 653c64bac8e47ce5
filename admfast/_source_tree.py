"""Makes `admfast.kernels` importable from a source tree that was not installed.

The package's kernels live in the folder `kernels/` at the top of the tree; an installation maps them, a bare
checkout does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def kernels() -> ModuleType:
    """Return the package `admfast.kernels`; raises ImportError where neither installation nor tree has it."""
    if "admfast.kernels" in sys.modules:
        return sys.modules["admfast.kernels"]
    folder = Path(__file__).resolve().parent.parent / "kernels"
    init, name = folder / "__init__.py", "admfast.kernels"
    # A tree's own kernels come before those of another checkout that happens to be installed. Beside an
    # installed package a folder `kernels` is somebody else's.
    if not (init.exists() and (folder.parent / "pyproject.toml").exists()):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is neither installed nor at {folder}")
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
