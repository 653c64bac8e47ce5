"""What the tests of the CPU loops compile their drivers with."""

from __future__ import annotations

import shutil
import subprocess
import sys
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
