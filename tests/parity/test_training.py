"""Tests that training runs, averages and the loss-aware sampler equal those of the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.diffusion import DiffusionConfig
from admfast.models import ClassifierConfig, UNetConfig
from admfast.training.ema import Averages
from admfast.training.learner import Learner
from admfast.training.loss import Batch
from admfast.training.recipe import Recipe
from admfast.training.timesteps import LossSecondMomentSampler
from tests.parity.golden import (
    POINT_LIMIT,
    SCHEDULE_LIMIT,
    TRAINED_PARAMETERS_LIMIT,
    cases,
    compare,
    load_json,
    load_npz,
    load_tensors,
    process_of,
)
from tests.small import CLASSIFIER, UNET


class Tiny(nn.Module):
    """The small network of the golden data, described in their README."""

    def __init__(self, init: dict[str, Tensor]) -> None:
        super().__init__()
        for name in dict.fromkeys(key.partition(".")[0] for key in init):
            weight = init[f"{name}.weight"]
            if weight.dim() == 4:
                layer: nn.Module = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            elif f"{name}.bias" in init:
                layer = nn.Linear(weight.shape[1], weight.shape[0])
            else:
                layer = nn.Embedding(*weight.shape)
            self.add_module(name, layer)
        self.load_state_dict(init)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        u = t.float() / 1000
        f = torch.stack([u.cos(), u.sin(), (10 * u).cos(), (10 * u).sin()], dim=1)
        e = self.lin(f) if y is None else self.lin(f) + self.emb(y)
        h = F.silu(self.conv1(x) + e[..., None, None])
        return self.head(h.mean(dim=(2, 3))) if hasattr(self, "head") else self.conv2(h)


def network_with(**fields: Any) -> UNetConfig:
    """Return network settings for a recipe, whose network the golden one replaces."""
    return UNetConfig(**{**UNET, **fields})


class Given:
    """Golden draws, recorded per microbatch, joined into the batches of the steps."""

    def __init__(self, golden: dict[str, Tensor], batch: int) -> None:
        self.golden, self.batch, self.row = golden, batch, 0

    def step(self, step: int, images: Tensor, labels: Tensor | None) -> Batch:
        rows, count = [], 0
        while count < self.batch:
            size = int(self.golden["microbatch_sizes"][self.row])
            rows.append((self.row, size))
            self.row, count = self.row + 1, count + size
        t, weights, noise = (
            torch.cat([self.golden[name][row][:size] for row, size in rows])
            for name in ("t", "importance_weights", "noise")
        )
        return Batch(
            tuple(range(step * self.batch, (step + 1) * self.batch)), images, t, noise, weights, labels
        )


@pytest.mark.parametrize("path", cases("training", "train_loop"))
def test_train_loop(path: Path):
    settings, golden = load_json(path), load_tensors(path)
    out, rates = settings["net"]["out"], [float(rate) for rate in settings["ema"].split(",")]
    recipe = Recipe(
        kind="diffusion",
        network=network_with(in_channels=3, out_channels=out),
        process=process_of(settings["diffusion"]),
        steps=settings["anneal"] or settings["steps"],
        anneal=bool(settings["anneal"]),
        batch_size=settings["batch"],
        microbatch=settings["microbatch"] if settings["microbatch"] > 0 else None,
        published_sum=True,
        lr=settings["lr"],
        weight_decay=settings["wd"],
        ema=tuple(rates),
        sampler=settings["sampler"],
    )
    net = Tiny({key.removeprefix("init:"): value for key, value in golden.items() if key[:5] == "init:"})
    learner, given = Learner(recipe, net), Given(golden, settings["batch"])
    for step in range(settings["steps"]):
        first = given.row
        labels = golden["batches_y"][step] if "batches_y" in golden else None
        batch = given.step(step, golden["batches"][step], labels)
        p = learner.sampler.weights()
        compare(p / p.sum(), golden["sampler_p"][first], POINT_LIMIT, f"p of step {step}")
        compare(
            learner.parameter_norm(), golden["param_norm"][step], TRAINED_PARAMETERS_LIMIT, "parameter norm"
        )
        report = learner.update(batch)
        for name, values in report.terms.items():
            rows = golden[f"loss_term:{name}"][first : given.row]
            sizes = golden["microbatch_sizes"][first : given.row].tolist()
            wanted = torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
            compare(values, wanted, TRAINED_PARAMETERS_LIMIT, f"{name} of step {step}")
        compare(report.grad_norm, golden["grad_norm"][step], TRAINED_PARAMETERS_LIMIT, "gradient norm")
        compare(np.float64(report.learning_rate), golden["lr_used"][step], SCHEDULE_LIMIT, "rate")
        for name, parameter in net.named_parameters():
            compare(parameter.grad, golden[f"step{step}:grad:{name}"], TRAINED_PARAMETERS_LIMIT, name)
            compare(parameter, golden[f"step{step}:param:{name}"], TRAINED_PARAMETERS_LIMIT, name)
            for rate in rates:
                average = learner.averages.weights(f"{rate:g}")[name]
                compare(average, golden[f"step{step}:ema_{rate}:{name}"], TRAINED_PARAMETERS_LIMIT, name)
    for name, parameter in net.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            found = learner.optimiser.state[parameter][moment]
            compare(found, golden[f"final:{moment}:{name}"], TRAINED_PARAMETERS_LIMIT, name)
    if isinstance(learner.sampler, LossSecondMomentSampler):
        compare(learner.sampler.counts, golden["final_loss_counts"].long(), 0, "counts")
        compare(learner.sampler.losses, golden["final_loss_history"], TRAINED_PARAMETERS_LIMIT, "history")


@pytest.mark.parametrize("path", cases("training", "classifier_train"))
def test_classifier_train(path: Path):
    settings, golden = load_json(path), load_tensors(path)
    recipe = Recipe(
        kind="classifier",
        network=ClassifierConfig(**{**CLASSIFIER, "out_channels": settings["classes"]}),
        process=process_of(settings["diffusion"]),
        steps=settings["iterations"],
        anneal=settings["anneal"],
        batch_size=settings["batch"],
        microbatch=settings["microbatch"] if settings["microbatch"] > 0 else None,
        noised=settings["noised"],
        lr=settings["lr"],
        weight_decay=settings["wd"],
    )
    net = Tiny({key.removeprefix("init:"): value for key, value in golden.items() if key[:5] == "init:"})
    learner, size = Learner(recipe, net), settings["batch"]
    logs, row = 0, 0
    for step in range(settings["iterations"]):
        images, labels = golden["batches"][step], golden["batches_y"][step]
        t, noise = torch.zeros(size, dtype=torch.int64), torch.zeros_like(images)
        if settings["noised"]:
            t, noise = golden["t"][row], golden["noise"][row]
        batch = Batch(tuple(range(size)), images, t, noise, torch.ones(size), labels)
        report = learner.update(batch)
        compare(np.float64(report.learning_rate), golden["lr_used"][step], SCHEDULE_LIMIT, "rate")
        for part in range(-(-size // (recipe.microbatch or size))):
            place = slice(part * (recipe.microbatch or size), (part + 1) * (recipe.microbatch or size))
            for name in ("loss", "acc@1", "acc@5"):
                found = report.terms[name][place]
                compare(found, golden[f"log{logs:02d}:train_{name}"], TRAINED_PARAMETERS_LIMIT, name)
            logs += 1
        for name, parameter in net.named_parameters():
            compare(parameter.grad, golden[f"step{step}:grad:{name}"], TRAINED_PARAMETERS_LIMIT, name)
            compare(parameter, golden[f"step{step}:param:{name}"], TRAINED_PARAMETERS_LIMIT, name)
        row += 1
        if step % settings["eval_interval"] == 0:  # the published code also draws and logs a validation batch
            row, logs = row + 1, logs + -(-size // (recipe.microbatch or size))


@pytest.mark.parametrize("path", cases("training", pattern="ema.npz"))
def test_ema(path: Path):
    golden = load_tensors(path)
    for rate in golden["rates"].tolist():
        net = nn.ParameterList([golden["target0"].clone()])
        averages = Averages(net, [rate])
        for step, source in enumerate(golden["sources"]):
            net[0].data.copy_(source)
            averages.update(step)
            found = averages.weights()["0"]
            compare(found, golden[f"ema_rate_{rate}"][step], POINT_LIMIT, f"rate {rate}, step {step}")


@pytest.mark.parametrize("path", cases("training", pattern="loss_aware_sampler.json"))
def test_loss_aware_sampler(path: Path):
    settings, golden = load_json(path), load_npz(path)
    settings = settings.get("settings", settings)
    sampler = LossSecondMomentSampler(settings["T"], settings["hist"], settings["uni"])
    for five in range(len(golden["ts"]) // 5):
        part = slice(5 * five, 5 * five + 5)
        sampler.learn(torch.from_numpy(golden["ts"][part]), torch.from_numpy(golden["losses"][part]))
        assert sampler.warmed_up == golden["warmed_up"][five]
        compare(sampler.weights(), golden["weights_after_every_5"][five], SCHEDULE_LIMIT, f"after {five}")
    compare(sampler.losses, golden["loss_history"], SCHEDULE_LIMIT, "history")
    assert np.array_equal(sampler.counts.numpy(), golden["loss_counts"])
    # Compare the factors of the timesteps that the published code drew with NumPy.
    p = sampler.weights().numpy()
    wanted = 1 / (settings["T"] * (p / p.sum())[golden["sample_indices"]])
    compare(wanted.astype(np.float32), golden["sample_weights"], POINT_LIMIT, "factors")
    t, factors = sampler.choose(torch.linspace(0, 1, 12, dtype=torch.float64)[:-1])
    compare(factors, (1 / (settings["T"] * p / p.sum()))[t.numpy()].astype(np.float32), POINT_LIMIT, "chosen")


@pytest.mark.parametrize("path", cases("training", pattern="misc.json"))
def test_annealing(path: Path):
    for case in load_json(path)["lr_anneal"]:
        kind = "classifier" if case["kind"] == "classifier_train" else "diffusion"
        network = ClassifierConfig(**CLASSIFIER) if kind == "classifier" else network_with(out_channels=1)
        steps = case.get("iterations") or case["lr_anneal_steps"]
        recipe = Recipe(
            kind=kind, network=network, process=DiffusionConfig(), steps=steps, batch_size=1, anneal=True,
            lr=case["base_lr"],
        )  # fmt: skip
        if kind == "classifier":
            found, wanted = recipe.learning_rate(case["step"]), case["lr_used_for_that_step"]
        else:  # recorded after the step: the rate of the next one
            found, wanted = recipe.learning_rate(case["step"] + 1), case["lr_set_after_that_step"]
        # The last rates are small differences of numbers near 1, so the error is relative to the first rate.
        compare(
            np.array([case["base_lr"], found]), np.array([case["base_lr"], wanted]), SCHEDULE_LIMIT, str(case)
        )
