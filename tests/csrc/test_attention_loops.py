"""Tests that attention's loops are correct on every instruction set, also with sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc.loops import HERE_ONLY, PRODUCT_ISAS, assert_isas_can_be_asked_for, built, said_by

pytestmark = HERE_ONLY


@pytest.fixture(scope="module", params=["optimised", "sanitized"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile attention_driver.cpp with the loops, optimised and with sanitizers."""
    return built(
        "attention", PRODUCT_ISAS, "attention_driver", request.param, tmp_path_factory.mktemp("attention")
    )


@pytest.fixture(scope="module")
def said(driver: Path) -> dict[str, str]:
    """Run the driver with all its cases."""
    return said_by(driver, ADMFAST_CPU_ISA="")


def test_every_instruction_set_is_within_its_roundings(said):
    errors = {name: float(error) for name, error in said.items() if name != "chosen"}
    assert {"generic", said["chosen"]} <= errors.keys()
    # The driver divides each error by its bound, which comes from the roundings of sums and formulas.
    assert all(0 < error <= 1 for error in errors.values()), errors


def test_an_instruction_set_can_be_asked_for(driver, said):
    assert_isas_can_be_asked_for(driver, said.keys() - {"chosen"})
