"""Run tests of the ops in a process of their own, with the loops of a given instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The flags of the CPU that each one needs, as Linux names them.
FLAGS: dict[str, set[str]] = {"generic": set(), "avx2": {"avx2", "fma"}}
FLAGS["avx512"] = FLAGS["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
FLAGS["avx512_bf16"] = FLAGS["avx512"] | {"avx512_bf16", "avx512_vnni"}
FLAGS["amx"] = FLAGS["avx512_bf16"] | {"amx_tile", "amx_bf16", "amx_int8"}
SAY = "from admfast.ops import native; print(native.ops().cpu_instruction_set())"


def run_tests_on(isa: str, keyword: str, *files: str) -> None:
    """Run the tests that match `keyword` on `isa`, and assert that they pass; skip if the CPU lacks it."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if not FLAGS[isa] <= flags:
        pytest.skip(f"this CPU has no {isa}")
    tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", keyword]
    assert " passed" in _said(isa, *tests, *(f"tests/ops/{file}.py" for file in files))
    assert _said(isa, "-c", SAY).strip() == isa


def _said(isa: str, *arguments: str) -> str:
    environment = os.environ | {"ADMFAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
