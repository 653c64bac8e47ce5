"""The compiled extension: which loops it runs, and what ADMFAST_CPU_ISA may say."""

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
    environment = {name: value for name, value in os.environ.items() if name != native.ISA}
    environment |= {} if isa is None else {native.ISA: isa}
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
    assert f"InvalidArgument: ADMFAST_CPU_ISA='{isa}': one of avx512_bf16, avx512, avx2, generic" in last
