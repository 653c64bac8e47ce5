"""Tests that training losses and their gradients equal the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from admfast.diffusion import training_losses
from tests.parity.analytic import analytic_model, build_diffusion
from tests.parity.golden import POINT_LIMIT, cases, compare, load_json, load_tensors


@pytest.mark.parametrize("path", cases("sampling", "training_losses"))
def test_training_losses(path: Path):
    golden = load_tensors(path)
    inputs = {name: golden.pop(name) for name in ("x_start", "t", "noise")}
    labels = {name: golden.pop(name) for name in ("y",) if name in golden}
    diffusion = build_diffusion(load_json(path)["diffusion"])
    model = analytic_model(diffusion)
    model.scale_mean = a = torch.ones((), requires_grad=True)
    model.scale_var = b = torch.ones((), requires_grad=True)
    terms = training_losses(diffusion, model, inputs["x_start"], inputs["t"], inputs["noise"], labels)
    terms["loss"].mean().backward()
    ours = {**terms, "grad_a": a.grad, "t_seen_by_model": model.seen[0]}
    assert len(model.seen) == 1
    if diffusion.var_type.learned:
        ours["grad_b"] = b.grad
    assert set(ours) == set(golden)
    for name, value in ours.items():
        compare(value, golden[name], POINT_LIMIT, name)
