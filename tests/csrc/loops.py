"""Functions that compile and run the drivers of the CPU loops' tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

# Instruction sets that have loops of their own for products of bfloat16.
PRODUCT_ISAS = ("generic", "avx512_bf16", "amx")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
GXX = shutil.which("g++")
# The flags of setup.py that affect results.
FLAGS = ("-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
HERE_ONLY = pytest.mark.skipif(
    GXX is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux"
)


def compiled(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def built(family: str, isas: Sequence[str], driver: str, how: str, folder: Path) -> Path:
    """Compile a driver with one family's loops: "optimised" (like the package) or "sanitized"."""
    program = folder / how
    flags = ["-O3"] if how == "optimised" else ["-O1", *SANITIZERS]
    sources = [str(CSRC / f"{name}.cpp") for name in (family, *(f"{family}_{isa}" for isa in isas))]
    sources.append(str(Path(__file__).with_name(f"{driver}.cpp")))
    compiled([str(GXX), *FLAGS, *flags, f"-I{CSRC}", *sources, "-o", str(program)])
    return program


def said_by(driver: Path, *arguments: str, **environment: str) -> dict[str, str]:
    """Run a driver with these environment variables and return the words that it prints, by name."""
    done = subprocess.run([driver, *arguments], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(line.split() for line in done.stdout.splitlines())


def assert_isas_can_be_asked_for(driver: Path, here: set[str]) -> None:
    """Assert that ADMFAST_CPU_ISA chooses each of `here`, the loops of PRODUCT_ISAS that this machine has."""
    widest = next(name for name in reversed(PRODUCT_ISAS) if name in here)
    expected = {"": widest, "unknown": "generic", "avx2": "generic", "avx512": "generic"}
    expected |= {name: name if name in here else "generic" for name in PRODUCT_ISAS}
    for isa, chosen in expected.items():
        assert said_by(driver, "only the name", ADMFAST_CPU_ISA=isa) == {"chosen": chosen}, isa
