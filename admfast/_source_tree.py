"""Make `admfast.kernels` importable from a source tree that was not installed.

The kernels lie in the folder `kernels/` at the top of the tree. An installation maps it into the package; a
bare checkout does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_kernels() -> ModuleType:
    """Import and return `admfast.kernels`. Raises ImportError if neither installation nor tree has it."""
    if "admfast.kernels" in sys.modules:
        return sys.modules["admfast.kernels"]
    folder = Path(__file__).resolve().parent.parent / "kernels"
    init, name = folder / "__init__.py", "admfast.kernels"
    # A source tree uses its own kernels, even if another checkout is installed. A folder `kernels` next to an
    # installed package (without pyproject.toml) belongs to another project.
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
