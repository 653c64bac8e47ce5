"""Tests that the GroupNorm loops of every instruction set are correct, also with sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc.loops import HERE_ONLY, built, said_by

pytestmark = HERE_ONLY
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(scope="module", params=["optimised", "sanitized"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile group_norm_driver.cpp with the loops, optimised and with sanitizers."""
    folder = tmp_path_factory.mktemp("group_norm")
    return built("group_norm", ISAS, "group_norm_driver", request.param, folder)


def test_every_instruction_set_is_within_its_roundings(driver):
    said = said_by(driver)
    chosen = said.pop("chosen")
    assert {"generic", chosen} <= said.keys()
    # The driver divides each error by its bound: the roundings of a sum or of a formula's operations.
    assert all(float(error) <= 1 for error in said.values()), said


def test_an_instruction_set_can_be_asked_for(driver):
    said = said_by(driver)
    assert said_by(driver, ADMFAST_CPU_ISA="")["chosen"] == said["chosen"], "empty must mean unset"
    for name in said.keys() - {"chosen"}:
        assert said_by(driver, ADMFAST_CPU_ISA=name)["chosen"] == name
