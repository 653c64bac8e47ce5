"""Solvers take the steps of diffusers' schedulers of the same name, guided, on the same model function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.diffusion import DiffusionConfig
from admfast.ops import SamplerState, pack, sampler_step
from admfast.solvers import Solver, deis, dpmpp, euler, heun, ipndm, unipc

diffusers = pytest.importorskip(
    "diffusers", reason="pip install --no-deps -r tests/accelerate/requirements.txt"
)

STEPS = 12
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TRAILING = LINEAR | {"timestep_spacing": "trailing"}
MULTISTEP = TRAILING | {"final_sigmas_type": "zero", "lower_order_final": True}


def model(x: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """Return eps, near that of images of standard deviation 1/2, and a guidance gradient."""
    eps = x * (1 - bar) ** 0.5 / (1 - 0.75 * bar) + 0.1 * torch.sin(3 * x)
    return eps, 0.2 * torch.cos(0.7 * x)


def scheduler(name: str, **options: Any) -> Any:
    made = getattr(diffusers, name)(**options)
    made.set_timesteps(STEPS)
    return made


CASES: dict[str, tuple[Solver, str, dict[str, Any]]] = {
    "++1": (dpmpp(order=1), "DPMSolverMultistepScheduler", MULTISTEP | {"solver_order": 1}),
    "++2M": (dpmpp(order=2), "DPMSolverMultistepScheduler", MULTISTEP | {"solver_order": 2}),
    "++3M": (dpmpp(order=3), "DPMSolverMultistepScheduler", MULTISTEP | {"solver_order": 3}),
    "++SDE-2M": (
        dpmpp(order=2, sde=True),
        "DPMSolverMultistepScheduler",
        MULTISTEP | {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc-1": (unipc(order=1), "UniPCMultistepScheduler", MULTISTEP | {"solver_order": 1}),
    "unipc-2": (unipc(order=2), "UniPCMultistepScheduler", MULTISTEP | {"solver_order": 2}),
    "unipc-2-bh1": (
        unipc(order=2, variant="bh1"),
        "UniPCMultistepScheduler",
        MULTISTEP | {"solver_order": 2, "solver_type": "bh1"},
    ),
    "unipc-3": (unipc(order=3), "UniPCMultistepScheduler", MULTISTEP | {"solver_order": 3}),
    "deis-2": (deis(order=2, variable="log-rho"), "DEISMultistepScheduler", TRAILING | {"solver_order": 2}),
    "deis-3": (deis(order=3, variable="log-rho"), "DEISMultistepScheduler", TRAILING | {"solver_order": 3}),
    "euler": (euler(), "EulerDiscreteScheduler", TRAILING),
    "heun": (heun(), "HeunDiscreteScheduler", TRAILING),
}
# Rows at the end that are not compared: diffusers' DEIS ends at timestep 0, not at the clean image, and
# lowers its order before that; its "bh1" gives NaN in the last step.
LEFT_OUT = {"deis-2": 1, "deis-3": 2, "unipc-2-bh1": 1}


@pytest.mark.parametrize("case", CASES)
def test_it_takes_the_steps_of_the_scheduler(case):
    solver, name, options = CASES[case]
    theirs = scheduler(name, **options)
    process = DiffusionConfig(steps=1000).build(f"uniform{STEPS}")
    table = solver.table(process, clip=False)
    assert len(theirs.timesteps) == len(table)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn((2, 3, 8, 8), generator=generator, dtype=torch.float64)
    relative = case in ("euler", "heun")  # these carry x / alpha
    state, packed = SamplerState.start(z, table.rows), pack(table.rows, dtype=torch.float64)
    bars = dict(zip(process.schedule.timestep_map.tolist(), process.schedule.alphas_cumprod, strict=True))
    sample = z / bars[999] ** 0.5 if relative else z
    for i, row in enumerate(table.rows[: len(table) - LEFT_OUT.get(case, 0)]):
        t, bar = theirs.timesteps[i], bars[int(row.t_net)]
        assert float(t) == row.t_net
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        eps, gradient = model(state.x, bar)
        sampler_step(state, eps, packed, i, grad=gradient, noise=noise, impl="reference")
        their_eps, their_gradient = model(sample * bar**0.5 if relative else sample, bar)
        guided = their_eps - (1 - bar) ** 0.5 * their_gradient
        extra = {"variance_noise": noise} if "SDE" in case else {}
        sample = theirs.step(guided, t, sample, **extra).prev_sample
        bar = bars[int(table.rows[i + 1].t_net)] if i + 1 < len(table) else 1.0
        expected = sample * bar**0.5 if relative else sample
        # diffusers computes its coefficients in float32, and carries their errors from row to row.
        assert float((state.x - expected).abs().max()) < 1e-5 * float(expected.abs().max()), f"row {i}"


def test_ipndm_takes_the_steps_of_the_scheduler_at_the_same_noise_levels():
    process = DiffusionConfig(steps=1000).build(f"uniform{STEPS}")
    table = ipndm().table(process, clip=False)
    bars = torch.tensor([*process.schedule.alphas_cumprod[::-1], 1.0], dtype=torch.float64)
    theirs = scheduler("IPNDMScheduler")  # has noise levels of its own
    theirs.alphas, theirs.betas = bars.sqrt(), (1 - bars).sqrt()
    sample = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state, packed = SamplerState.start(sample, table.rows), pack(table.rows, dtype=torch.float64)
    for i, bar in enumerate(bars[:-2].tolist()):  # its last row keeps order 4
        eps, gradient = model(state.x, bar)
        sampler_step(state, eps, packed, i, grad=gradient, impl="reference")
        their_eps, their_gradient = model(sample, bar)
        guided = their_eps - (1 - bar) ** 0.5 * their_gradient
        v = (guided - (1 - bar) ** 0.5 * sample) / bar**0.5  # from which the scheduler computes eps
        sample = theirs.step(v, theirs.timesteps[i], sample).prev_sample
        assert float((state.x - sample).abs().max()) < 1e-5 * float(sample.abs().max()), f"row {i}"
