"""Tests that a name never means both a module and a value, in any order of imports."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [ROOT / "admfast", ROOT / "admfast" / "solvers", ROOT / "admfast" / "sampling"]


def exported(package: Path) -> set[str]:
    """Return the names in a package's `__all__`."""
    name = ".".join(package.relative_to(ROOT).parts)
    return set(getattr(importlib.import_module(name), "__all__", ()))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_has_the_name_of_a_value(package):
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    # These two exported names are rooms, so they mean the modules themselves.
    assert exported(package) & modules <= {"accelerate", "solvers"}


# Runs every order of the statements, each in a forked process that has imported torch already.
ORDERS = """
import itertools, os, sys, torch
statements = {statements!r}
failed = []
for order in itertools.permutations(statements):
    child = os.fork()
    if child == 0:
        try:
            for statement in order:
                exec(statement)
            import admfast
            from admfast import Pipeline, guides, load, solvers
            from admfast.solvers import SOLVERS, Solver, ddim, ddim_inverse, ddpm
            for make in (ddim, ddim_inverse, ddpm, solvers.ddim, admfast.solvers.ddpm):
                assert isinstance(make(), Solver), make
            assert isinstance(Pipeline, type) and load.__name__ == "load" and admfast.load is load
            assert isinstance(guides.by_x(print), guides.Guide)
        except BaseException as error:
            print(order, repr(error))
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(order)
sys.exit(bool(failed))
"""
STATEMENTS = [
    "import admfast",
    "import admfast.solvers.ddim_rows, admfast.solvers.ddpm_rows",
    "import admfast.sampling.load, admfast.sampling.guides",
    "from admfast.solvers import ddim",
]


def test_values_stay_values_in_every_order_of_imports():
    assert len(list(itertools.permutations(STATEMENTS))) == 24
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ORDERS.format(statements=STATEMENTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
