"""The CUDA branch of a prepared step runs without a device: who takes each op, layouts, launches, bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_cuda.counting import counting
from tests.kernels.norm_cases import module

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16", "auto": "bfloat16"}


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """Return what each run of `tests.fake_cuda.step` did."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.fake_cuda.step"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def find_subject(run: dict[str, Any]) -> str:
    """Say which run it is."""
    return " ".join(str(run[key]) for key in ("subject", "batch", "precision", "attention", "guided"))


def test_every_precision_and_attention_runs(runs):
    assert {run["precision"] for run in runs if run["guided"]} == set(DTYPES)
    assert {run["attention"] for run in runs} == {"flash", "efficient", "cudnn", "xformers"}
    assert {run["guided"] for run in runs} == {True, False}


def test_each_op_takes_the_implementation_made_for_a_gpu(runs):
    for run in runs:
        attention = "xformers" if run["attention"] == "xformers" else "sdpa"
        expected = {f"attention {attention}", "conv library", "conv matmul"}
        assert set(run["chosen"]) == expected | {"group_norm_silu triton", "sampler_step cuda"}, find_subject(
            run
        )


def test_nothing_is_read_back(runs):
    assert {find_subject(run): run["read_back"] for run in runs if run["read_back"]} == {}


def test_no_image_changes_its_layout(runs):
    assert {find_subject(run): run["turned"] for run in runs if run["turned"]} == {}
    assert {find_subject(run): run["not_channels_last"] for run in runs if run["not_channels_last"]} == {}


def test_torsos_compute_in_the_dtype_of_the_policy(runs):
    for run in runs:
        # The last norm and convolution are the published float32.
        assert set(run["dtypes"]) == {DTYPES[run["precision"]], "float32"}, find_subject(run)


# Launches of a step, and gigabytes beside convolutions and products. The plan of one read per norm is 17.5 GB
# for the network alone at 256 px and batch 8 (norms 12.9, resampling 2.2, residuals 2.2, attention 0.3). More
# are the passes that a convolution of the library leaves to others: after the first one of a block a read for
# the statistics, after the second one a read and a write of its output, to add bias and residual.
BOUNDS = {
    ("imagenet64", 1, True): (720, 0.53),
    ("imagenet256", 8, True): (728, 34.1),
    ("imagenet256", 8, False): (398, 24.8),
}


@pytest.mark.parametrize("subject, batch, guided", BOUNDS)
def test_launches_and_bytes_stay_low(subject, batch, guided, runs):
    (run,) = (
        run for run in runs if (run["subject"], run["batch"], run["guided"]) == (subject, batch, guided)
    )
    most, gigabytes = BOUNDS[subject, batch, guided]
    beside = sum(size for kind, size in run["bytes"].items() if kind not in ("convolution", "product"))
    assert 0 < run["launches"] <= most, run["names"]
    assert 0 < beside <= 1e9 * gigabytes, run["bytes"]


def test_a_step_derives_its_forms_before_its_first_row(runs):
    # Other streams wait for the event that folding records, and for nothing after it.
    assert {find_subject(run): run["derived_late"] for run in runs if run["derived_late"]} == {}


def test_the_side_stream_is_none_that_torch_hands_out_to_users(runs):
    # A capture takes in what runs on its streams; torch's own come from a ring of the ordinary priority.
    for run in runs:
        guided = run["guided"] and run["subject"] != "imagenet256-up"
        assert run["side_priority"] == (-1 if guided else None), find_subject(run)


def test_a_kernel_s_bytes_are_those_it_reads_and_writes():
    y, residual = (torch.empty(1, 32, 32, 64, device="meta").movedim(-1, 1) for _ in range(2))
    bias = torch.empty(64, device="meta")
    with counting() as found:
        _, sums = module("conv_epilogue").conv_epilogue_sums_fwd(y, bias, residual)
    # y is read and written, residual and bias are read, the statistics written: float32.
    assert sums is not None
    assert found.nbytes() == 4 * (3 * 32 * 32 * 64 + 64 + sums.values.numel())
    with counting() as found:
        module("conv_epilogue").conv_epilogue_fwd(y, bias, residual)
    assert found.nbytes() == 4 * (3 * 32 * 32 * 64 + 64)
