"""Tests that `sample` uses few records and files, and that its check enters each file from one place."""

from __future__ import annotations

import pytest

from admfast.sampling.plan import plan
from admfast.sampling.request import SampleRequest
from tests.small import pipeline
from tests.tools.trace_sample import trace, traced

SETTINGS = {"classes": [3, 1], "seeds": [0, 1], "steps": 3, "guidance": 2.0, "guidance_interval": (100, 900)}


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "ddim:eta=0.5", "batch_size": 1}], ids=["plain", "options"]
)
def test_a_call_is_carried_by_three_records_through_twelve_files(settings):
    found = traced(pipeline(), **settings)
    assert len(found.records) <= 3, found.records
    assert len(found.files) <= 12, found.files
    assert {"sampling/loop.py", "engine/step.py", "engine/replay.py"} <= set(found.files)
    assert "models/fold/net.py" in found.left_out


def test_the_check_of_a_request_enters_each_file_from_one_place():
    pipe = pipeline()
    pipe.check(**SETTINGS)
    found = trace(lambda: plan(SampleRequest(**SETTINGS), pipe))
    files = [name for name, _ in found.stays]
    assert sorted(set(files)) == sorted(files), found.stays
    assert {"sampling/request.py", "sampling/plan.py", "checks.py"} <= set(files) and len(files) <= 5


def test_the_trace_sees_records_files_and_climbs():
    # The first call also makes the process and the solver's rows; no other test takes as many steps.
    found = traced(pipeline(), first=True, steps=37)
    assert {"Row", "SolverTable", "Schedule"} <= set(found.records)
    assert "diffusion/process.py" in found.files and len(found.files) > 10
