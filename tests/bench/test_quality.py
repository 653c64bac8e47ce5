"""Tests of the quality bench of digits32: recorded settings, budget, stopping and errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from bench import quality
from bench.command import UNFINISHED
from bench.results import git_state

ROOT = Path(__file__).resolve().parents[2]
TAKEN_WITH = {"device", "date", "revision", "dirty", "torch", "weights"}


def test_the_committed_rows_are_of_the_weights_that_ship():
    document = json.loads((ROOT / "bench/results/digits32/quality.json").read_text())
    assert set(document) > TAKEN_WITH
    assert document["weights"] == quality.weight_hashes("digits32", None)
    assert set(document["weights"]) == {"diffusion.safetensors", "classifier.safetensors"}


def test_a_run_records_what_it_was_taken_with(tmp_path, monkeypatch):
    monkeypatch.setitem(quality.SETS, "published", (quality.Setting("ddim", 1, 0.0),))
    out = tmp_path / "q.json"
    assert quality.main(["--count", "20", "--out", str(out), "--inside"]) == 0
    document = json.loads(out.read_text())
    assert set(document) > TAKEN_WITH and document["torch"] == torch.__version__
    assert (document["revision"], document["dirty"]) == git_state()
    assert document["weights"] == quality.weight_hashes("digits32", None)


def test_scales_that_vary_are_timed_too(tmp_path, monkeypatch):
    setting = quality.Setting("ddim", 2, quality.by_classifier((0.0, 4.0)))
    monkeypatch.setitem(quality.SETS, "published", (setting,))
    out = tmp_path / "q.json"
    assert quality.main(["--count", "20", "--out", str(out), "--inside"]) == 0
    assert setting.name in json.loads(out.read_text())["rows"]


def test_a_setting_that_outlasts_the_budget_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(quality.SETS, "published", (quality.Setting("ddim", 1000, 0.0),))
    out = tmp_path / "q.json"
    arguments = ["--count", "1000", "--budget", "1", "--inside"]
    assert quality.main([*arguments, "--out", str(out)]) == UNFINISHED
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"two halves of the real digits", "ddim 1000, unguided"}
    assert "too slow" in rows["ddim 1000, unguided"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_and_keeps_what_it_has(sign, tmp_path):
    out = tmp_path / "q.json"
    command = [sys.executable, "-m", "bench.quality", "--count", "1000", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(sign)
    assert process.wait(timeout=10) == 128 + sign
    assert "two halves of the real digits" in json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("arguments", [["--model", "digits"], ["--model", "gone.pt"]])
def test_mistakes_are_one_line_and_status_2(arguments, capsys):
    assert quality.main([*arguments, "--inside"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("quality: ") and error.count("\n") == 1
