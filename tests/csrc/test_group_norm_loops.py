"""The GroupNorm loops of every instruction set are right, and clean under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.csrc.loops import CSRC, FLAGS, GXX, HERE_ONLY, SANITIZERS, compiled

pytestmark = HERE_ONLY
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(scope="module", params=["optimised", "sanitized"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """group_norm_driver.cpp with the loops, as they are built and with the sanitizers."""
    program = tmp_path_factory.mktemp("group_norm") / request.param
    how = ["-O3"] if request.param == "optimised" else ["-O1", *SANITIZERS]
    sources = [str(CSRC / f"{name}.cpp") for name in ("group_norm", *(f"group_norm_{isa}" for isa in ISAS))]
    sources.append(str(Path(__file__).with_name("group_norm_driver.cpp")))
    compiled([str(GXX), *FLAGS, *how, f"-I{CSRC}", *sources, "-o", str(program)])
    return program


def said_by(driver: Path, **environment: str) -> dict[str, str]:
    done = subprocess.run([driver], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(line.split() for line in done.stdout.splitlines())


def test_every_instruction_set_is_within_its_roundings(driver):
    said = said_by(driver)
    chosen = said.pop("chosen")
    assert {"generic", chosen} <= said.keys()
    # The driver divides each error by what the roundings of a sum, or of a formula's steps, can come to.
    assert all(float(error) <= 1 for error in said.values()), said


def test_an_instruction_set_can_be_asked_for(driver):
    said = said_by(driver)
    assert said_by(driver, ADMFAST_CPU_ISA="")["chosen"] == said["chosen"], "empty is not set"
    for name in said.keys() - {"chosen"}:
        assert said_by(driver, ADMFAST_CPU_ISA=name)["chosen"] == name
