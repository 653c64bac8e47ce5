"""What the tests of the CPU loops compile their drivers with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
GXX = shutil.which("g++")
# Those of setup.py, as far as results depend on them.
FLAGS = ("-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
HERE_ONLY = pytest.mark.skipif(
    GXX is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux"
)


def compiled(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def built(family: str, isas: Sequence[str], driver: str, how: str, folder: Path) -> Path:
    """The program of a driver with one family's loops: "optimised" as they are built, or "sanitized"."""
    program = folder / how
    flags = ["-O3"] if how == "optimised" else ["-O1", *SANITIZERS]
    sources = [str(CSRC / f"{name}.cpp") for name in (family, *(f"{family}_{isa}" for isa in isas))]
    sources.append(str(Path(__file__).with_name(f"{driver}.cpp")))
    compiled([str(GXX), *FLAGS, *flags, f"-I{CSRC}", *sources, "-o", str(program)])
    return program


def said_by(driver: Path, **environment: str) -> dict[str, str]:
    """Return what a driver prints, a word for each name, with these environment variables."""
    done = subprocess.run([driver], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(line.split() for line in done.stdout.splitlines())
