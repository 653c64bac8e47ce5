"""Tests of the bench of a training step: only correct contenders are timed, and rows are complete."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bench import training
from bench.measure import Settings
from bench.results import ResultFile
from bench.runner import measure_case
from bench.sampling.compare import Comparison
from bench.sampling.contender import Entry
from bench.sampling.subject import step_flop

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, quick=True)


class Doubled(training.Ours):
    """A contender that minimises twice the loss."""

    def __init__(self, subject, inputs):
        super().__init__(subject, inputs, "fp32")
        self.name = "doubled"

    def prepare(self) -> None:
        super().prepare()
        loss = self.learner.loss
        self.learner.loss = lambda *a: {name: 2 * value for name, value in loss(*a).items()}

    def note(self):
        return {}


def rows(*contender_entries: Entry) -> dict[str, dict]:
    subject = training.find_subject("tiny")
    comparison = Comparison(
        "train_step", subject, 2, contender_entries, 1.0, training.trial_of, training.PASSES
    )
    return {case.provider: measure_case(case, SETTINGS) for case in comparison.cases()}


def test_a_step_that_minimises_something_else_is_not_timed() -> None:
    ours = training.contender_entries(("fp32",), "", CPU, False)[0]
    found = rows(ours, Entry("doubled", "fp32", Doubled))
    assert found["doubled"]["status"] == "wrong" and "ms" not in found["doubled"]
    row = found["admfast"]
    assert row["status"] == "ok" and row["rel_err"] < 1e-4 and row["peak_mb"] > 0
    assert row["flop"] == 3 * 2 * step_flop(training.find_subject("tiny"))


def test_the_gradient_is_that_of_the_reference_in_float64() -> None:
    subject = training.find_subject("tiny")
    trial = training.trial_of(subject, 2, CPU)
    net = training.build(subject.net)
    net.load_state_dict(training.shared_state(subject.net, 0, CPU))
    training_batch = training.batch_for(subject, 2, CPU)
    learner = training.Learner(training.recipe_of(subject, 2), net.double())
    x = learner.process.q_sample(
        training_batch.images.double(), training_batch.t, training_batch.noise.double()
    )
    assert x.dtype == torch.float64
    doubles = {name: getattr(training_batch, name).double() for name in ("images", "noise")}
    terms = learner.loss(net, learner.recipe, learner.process, dataclasses.replace(training_batch, **doubles))
    terms["loss"].mean().backward()
    truth = torch.cat([parameter.grad.reshape(-1) for parameter in net.parameters()])
    loss, gradient = trial.outcome
    errors: list[Tensor] = [(gradient - truth).norm() / truth.norm(), (loss - terms["loss"].mean()).abs()]
    assert max(error.item() for error in errors) < training.BUDGETS["fp32"].step


@pytest.mark.slow
def test_the_program_writes_rows_and_says_who_is_missing(tmp_path) -> None:
    command = [
        "--quick",
        "--out",
        str(tmp_path),
        "--only",
        "steps",
        "--guided-diffusion",
        str(tmp_path / "none"),
    ]
    assert training.main([*command, "--device", "cpu"]) == 0
    found = {(row["provider"], row["dtype"]): row for row in ResultFile(tmp_path / "training.jsonl").rows}
    assert {key: row["status"] for key, row in found.items()} == {
        ("admfast", "fp32"): "ok",
        ("admfast", "bf16"): "ok",
        ("published", "fp32"): "none",
        ("published, channels-last", "bf16"): "none",
    }
    assert found["admfast", "bf16"]["faster_than"].keys() == {"admfast fp32"}
    assert "train" in (tmp_path / "training.md").read_text()
