"""Tests of OpenVINO as a contender of the sampling bench, with a stand-in for the package."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from bench.measure import Settings, Unavailable, WrongResult
from bench.sampling import openvino
from bench.sampling.choice import Choice
from bench.sampling.contender import make_trial
from bench.sampling.subject import TINY, Inputs

CPU = torch.device("cpu")
UNGUIDED = dataclasses.replace(TINY, classifier=None, guidance=0.0)


def stand_in(factor: float = 1.0) -> types.ModuleType:
    """Return a module that evaluates the traced network itself, and multiplies the result by a factor."""

    class Core:
        def compile_model(self, traced, device, hints):
            assert device == "CPU" and hints["INFERENCE_PRECISION_HINT"] == "f32"
            return lambda arrays: [(traced(*map(torch.from_numpy, arrays)) * factor).numpy()]

    package = types.ModuleType("openvino")
    package.convert_model = lambda traced, example_input: traced
    package.Core, package.get_version = Core, lambda: "1.2.3-4"
    return package


def test_its_step_passes_the_trial_of_an_unguided_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", stand_in())
    trial = make_trial(UNGUIDED, Inputs.of(UNGUIDED, 2, CPU))
    one = openvino.entry("fp32").make(UNGUIDED, trial.inputs)
    with one.running():
        one.ready()
        assert trial.check(one.run_trial(trial), "fp32") < 1e-4
    assert one.note()["implementation"] == "openvino 1.2.3"
    assert one.time_steps(2).ms > 0


def test_a_wrong_output_is_not_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", stand_in(1.1))
    trial = make_trial(UNGUIDED, Inputs.of(UNGUIDED, 2, CPU))
    one = openvino.entry("fp32").make(UNGUIDED, trial.inputs)
    with one.running(), pytest.raises(WrongResult):
        one.ready()
        trial.check(one.run_trial(trial), "fp32")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Unavailable, match="openvino"):
        openvino.entry("bf16").make(UNGUIDED, Inputs.of(UNGUIDED, 1, CPU)).ready()


def test_it_is_compared_without_guidance():
    choice = Choice(((TINY, 2),), ("fp32", "bf16"), ("openvino",), "")
    guided, unguided = choice.comparisons(Settings(CPU, quick=True))
    assert (guided.kind, unguided.kind) == ("guided_step", "step")
    assert [(e.name, e.dtype) for e in unguided.entries if e.name == "openvino"] == [
        ("openvino", "fp32"),
        ("openvino", "bf16"),
    ]
    assert unguided.subject.classifier is None
