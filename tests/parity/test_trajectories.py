"""Tests that trajectories of the published code are reproduced by `sampler_step` with recorded noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from admfast.diffusion import GaussianDiffusion
from admfast.engine.engine import Engine
from admfast.engine.guidance import RowGuidance, classifier_guidance
from admfast.engine.options import EngineOptions
from admfast.engine.step import Batch
from admfast.files.levels import to_uint8
from admfast.ops.update import SolverTable
from admfast.sampling.loop import Progress, run_rows
from admfast.solvers import ddim, ddim_inverse, ddpm
from tests.ops.tolerance import DEVICES
from tests.parity import analytic, golden
from tests.parity.nets import conditions, load_golden_net
from tests.small import run_table

OPTIONS = {
    "folded": EngineOptions(),
    "unfolded": EngineOptions(fold=None),
    "two rows at a time": EngineOptions(rows_at_a_time=2),
}


def frozen(folder: Path, arrays: dict[str, torch.Tensor]):
    """Return the network of a folder on the device of the arrays, with frozen weights."""
    return load_golden_net(folder).requires_grad_(False).to(arrays["samples"].device)


def solver_table(case: dict, diffusion: GaussianDiffusion) -> SolverTable:
    """Return the solver table of a case's sampler."""
    clip = case["clip_denoised"]
    if case["sampler"] == "ddim":
        return ddim(eta=case.get("eta", 0.0)).table(diffusion, clip)
    return {"p": ddpm, "ddim_reverse": ddim_inverse}[case["sampler"]]().table(diffusion, clip)


def network(case: dict, nets: Path, arrays: dict, diffusion: GaussianDiffusion):
    """Return the case's model(x, t), on the device of its arrays."""
    if case.get("net") is None:
        return partial(analytic.analytic_model(diffusion), y=arrays.get("y"))
    net = frozen(nets / case["net"], arrays)
    extra = conditions(net, arrays)
    return lambda x, t: net(x, t, **extra)


def guidance_of(case: dict, nets: Path, arrays: dict):
    """Return the case's guidance(x, t), or None."""
    if case.get("cond_scale") is None:
        return None
    if case.get("classifier") is None:
        return partial(analytic.guidance, y=arrays.get("y"), scale=case["cond_scale"])
    classifier = frozen(nets / case["classifier"], arrays)
    return classifier_guidance(classifier, arrays["y"], case["cond_scale"])


def load(path: Path, device: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return a case, and its arrays on the device."""
    arrays = golden.load_tensors(path)
    return golden.load_json(path), {name: value.to(device) for name, value in arrays.items()}


def compare(
    case: dict, arrays: dict, table: SolverTable, samples: list, x0s: list, final: torch.Tensor
) -> None:
    """Compare a trajectory with the golden one, within the case's limits."""
    analytic_net = case.get("net") is None
    limit = golden.ANALYTIC_SAMPLES_LIMIT if analytic_net else golden.NETWORK_SAMPLES_LIMIT
    x0_limit = golden.ANALYTIC_XSTART_LIMIT if analytic_net else golden.NETWORK_XSTART_LIMIT
    golden.compare([row.index for row in table.rows], arrays["t_index"], 0, "t_index")
    golden.compare(torch.stack(samples), arrays["samples"], limit, "samples")
    golden.compare(torch.stack(x0s), arrays["pred_xstart"], x0_limit, "pred_xstart")
    golden.compare(final, arrays["final"], limit, "final")
    if "uint8_nhwc" in arrays:
        levels = to_uint8(final).int() - arrays["uint8_nhwc"].int()
        assert levels.abs().max() <= 1


@pytest.mark.parametrize("impl", ["reference", None], ids=["reference", "default"])
@pytest.mark.parametrize("path", golden.cases("sampling", "trajectories"))
@pytest.mark.parametrize("device", DEVICES)
def test_trajectory(path: Path, impl: str | None, device: str) -> None:
    case, arrays = load(path, device)
    nets = path.parents[1] / "nets"
    diffusion = analytic.build_diffusion(case["diffusion"])
    model, guide = network(case, nets, arrays, diffusion), guidance_of(case, nets, arrays)
    seen_model, seen_guidance, samples, x0s = [], [], [], []

    def watched_model(x, t):
        seen_model.append(t.clone())
        return model(x, t)

    def watched_guidance(x, t):
        seen_guidance.append(t.clone())
        return guide(x, t)

    def keep(progress: Progress) -> None:
        samples.append(progress.x.clone())
        x0s.append(progress.x0.clone())

    start = arrays["x_T"] if "x_T" in arrays else arrays["x_0"]
    table = solver_table(case, diffusion)
    noise = arrays.get("noises", torch.zeros(len(table), *start.shape, device=device))
    state = run_table(
        table,
        watched_model,
        start,
        guidance=watched_guidance if guide else None,
        denoised_fn=analytic.denoised_fn(case.get("denoised_fn")),
        step_noise=noise,
        callback=keep,
        impl=impl,
    )
    compare(case, arrays, table, samples, x0s, state.x)
    for name, seen in (("t_seen_by_model", seen_model), ("t_seen_by_cond_fn", seen_guidance)):
        if name in arrays:
            golden.compare(torch.stack(seen), arrays[name], 0, name)


def of_networks() -> list:
    """Return the trajectories whose model is a network and that use no denoised_fn."""
    chosen = []
    for parameter in golden.cases("sampling", "trajectories"):
        if parameter.values[0] is None:
            return [parameter]
        case = golden.load_json(parameter.values[0])
        if case.get("net") is not None and case.get("denoised_fn") is None:
            chosen.append(parameter)
    return chosen


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("path", of_networks())
@pytest.mark.parametrize("device", DEVICES)
def test_trajectory_by_a_prepared_step(path: Path, options: EngineOptions, device: str) -> None:
    case, arrays = load(path, device)
    nets = path.parents[1] / "nets"
    net = frozen(nets / case["net"], arrays)
    classifier, scale = None, case.get("cond_scale") or 0.0
    if case.get("classifier") is not None:
        classifier = frozen(nets / case["classifier"], arrays)
    engine = Engine(net, classifier, options=options)
    engine.ensure_folded()
    assert net.is_folded == (options.fold is not None)
    table = solver_table(case, analytic.build_diffusion(case["diffusion"]))
    start = arrays["x_T"] if "x_T" in arrays else arrays["x_0"]
    noise = arrays.get("noises", torch.zeros(len(table), *start.shape, device=device))
    batch = Batch(
        table=table,
        shape=tuple(start.shape),
        seeds=torch.zeros(len(start), dtype=torch.int64, device=device),
        labels=arrays.get("y") if classifier is not None else conditions(net, arrays).get("y"),
        low_res=conditions(net, arrays).get("low_res"),
        step_noise=noise,
        guidance=(RowGuidance(0.0 if classifier is None else scale),) * len(table),
    )
    step = engine.step(batch)
    step.fill(batch, start)
    samples: list[torch.Tensor] = []
    x0s: list[torch.Tensor] = []

    def keep(progress: Progress) -> None:
        samples.append(progress.x.clone())
        x0s.append(progress.x0.clone())

    watch = SimpleNamespace(callback=keep, every=1, first=0, stage="base")
    state = run_rows(table, step, watch)
    compare(case, arrays, table, samples, x0s, state.x)
