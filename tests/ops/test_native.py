"""Tests of the compiled extension: the loops it runs, values of ADMFAST_CPU_ISA, and missing builds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from admfast.ops import native

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_C = native.reason_missing()
pytestmark = pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}")
SAY = "from admfast.ops import native; native.ops(); print(native.instruction_set())"


def said(isa: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != native.ISA_VARIABLE}
    environment |= {} if isa is None else {native.ISA_VARIABLE: isa}
    return subprocess.run(
        [sys.executable, "-c", SAY], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_an_empty_name_is_none():
    assert said("").stdout == said(None).stdout != ""
    assert said("generic").stdout.strip() == "generic"


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "avx512,avx2"])
def test_an_unknown_name_is_refused(isa):
    done = said(isa)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"InvalidArgument: ADMFAST_CPU_ISA='{isa}': one of amx, avx512_bf16, avx512, avx2, generic" in last


WHY = """
import sys
from admfast.ops import native
native.build_info = lambda: {built}
sys.modules.update({hidden})
print(native.reason_missing())
"""
HIDDEN = {"admfast._C": None}
RECORDS = {
    "of another torch": ({"built": "cpu", "torch": "1.13.1+cpu"}, {}, "not loaded: built for torch 1.13.1"),
    "does not load": (
        {"built": "cpu", "reason": "torch has no CUDA"},
        HIDDEN,
        "not loaded: import of admfast._C",
    ),
    "was not built": ({"built": "none", "reason": "no compiler"}, HIDDEN, "not built: no compiler"),
    "no record": ({}, HIDDEN, "not loaded: import of admfast._C"),
}


@pytest.mark.parametrize("built, hidden, reason", RECORDS.values(), ids=RECORDS)
def test_the_reason_is_that_of_the_build_only_where_nothing_was_built(built, hidden, reason):
    code = WHY.format(built=built, hidden=hidden)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(reason), done.stdout + done.stderr[-2000:]
