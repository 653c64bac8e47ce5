"""Tests that the kernels compile for real GPUs without spills at ADM shapes. They need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.values import kernel_names

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 48 << 10  # what a program gets without opting in to more


def compiling(*module: str, seconds: int) -> list[dict[str, Any]]:
    """Run a module in a process without Triton's interpreter and return the lines of JSON that it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_tests_on_a_gpu_are_few_kernels_and_numbers():
    (cost,) = compiling("tests.kernels.norm_gpu_cases", seconds=300)
    assert 0 < cost["kernels"] <= 150 and 0 < cost["drawn"] <= 1e9, cost


def test_the_programs_of_a_norm_fill_their_waves():
    # The other kernels have a program for every few groups of an image, so their number isn't free.
    names = ("group_norm_silu_stats", "group_norm_silu_sums", "group_norm_silu_apply_fwd")
    names += ("group_norm_silu_apply_bwd", "conv_epilogue_sums_fwd")
    rows = [row for row in compiling("tests.kernels.norm_waves", seconds=300) if row["kernel"][1:-7] in names]
    assert {row["kernel"][1:-7] for row in rows} == set(names)
    several = [row for row in rows if row["programs"] > row["slots"]]
    # In two waves, the second one is then 0.7 of a wave.
    assert several and [row for row in several if row["fill"] < 0.85] == []


@pytest.mark.parametrize(
    ("flags", "most", "seconds"),
    [
        pytest.param([], 150, 600, id="once a key"),
        pytest.param(["--all"], 1500, 3600, id="every dtype and architecture", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_spill_nothing(flags, most, seconds, record_property):
    start = time.monotonic()
    rows = compiling("tests.kernels.compile_kernels", *flags, seconds=2 * seconds)
    spilled = [row for row in rows if row["stack"] or row["local"]]
    assert not spilled, spilled
    assert {row["kernel"] for row in rows} == kernel_names() and 0 < len(rows) <= most
    assert {row["dtype"] for row in rows} == {"fp16", "bf16", "fp32"}
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    assert max(row["shared"] for row in rows) <= SHARED_MEMORY
    # Unless the compiler knows a power of two that divides a mask's bound, it loads and stores single
    # elements.
    large = [row for row in rows if "_merge_" not in row["kernel"]]
    # Weights in float32 are wider than images in half precision, and so may their loads be.
    exact = [row for row in large if "weights as x" in row["key"]]
    exact += [row for row in large if not row["kernel"].startswith("_group") or "_stats_" in row["kernel"]]
    assert len({row["kernel"] for row in exact}) == 4
    assert [row for row in exact if row["ld"] != row["allowed"]] == []
    assert [row for row in large if row["ld"] < row["allowed"]] == []
    writing = [row for row in large if row["kernel"].endswith(("fwd_kernel", "bwd_kernel"))]
    assert [row for row in writing if row["st"] != row["allowed"]] == []
    # The bias must be loaded in vectors too, if the channels allow it.
    added = [row for row in rows if "epilogue" in row["kernel"] and "('MULTIPLE', 16)" in row["key"]]
    assert added and {row["least_ld"] for row in added} == {row["least_st"] for row in added} == {16}
    worst = max(rows, key=lambda row: row["registers"])
    record_property("compiled", f"{len(rows)}, most registers {worst['registers']} in {worst['kernel']}")
    assert time.monotonic() - start < seconds
