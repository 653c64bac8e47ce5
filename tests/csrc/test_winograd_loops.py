"""Tests that the Winograd loops of every instruction set are correct, also with sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc.loops import HERE_ONLY, built, said_by

pytestmark = HERE_ONLY
ISAS = ("generic", "avx2", "avx512")
# Sums of up to 1170 products of numbers below 1 reach 50. Rounding errors there, amplified by the transforms
# (admfast/ops/conv/winograd.py), are at most 9 * 2 * 50 eps. A wrong coefficient or index costs at least
# 0.01.
LIMIT = 1e-4


@pytest.fixture(scope="module", params=["optimised", "sanitized"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile winograd_driver.cpp with the loops, optimised and with sanitizers."""
    folder = tmp_path_factory.mktemp("conv_winograd")
    return built("conv_winograd", ISAS, "winograd_driver", request.param, folder)


def test_every_instruction_set_makes_the_convolution(driver):
    said = said_by(driver)
    chosen = said.pop("chosen")
    assert {"generic", chosen} <= said.keys()
    assert all(float(error) <= LIMIT for error in said.values()), said


def test_an_instruction_set_can_be_asked_for(driver):
    said = said_by(driver)
    assert said_by(driver, ADMFAST_CPU_ISA="")["chosen"] == said["chosen"], "empty must mean unset"
    known = said.keys() - {"chosen"}
    for name in known:
        assert said_by(driver, ADMFAST_CPU_ISA=name)["chosen"] == name
    assert said_by(driver, ADMFAST_CPU_ISA="unknown")["chosen"] == "generic"
    if "avx512" in known:
        assert said_by(driver, ADMFAST_CPU_ISA="avx512_bf16")["chosen"] == "avx512"
