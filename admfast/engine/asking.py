"""What `Pipeline.sample` is asked for, and the rows that it comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from admfast import checks
from admfast.diffusion import DiffusionConfig, Respacing
from admfast.engine.arguments import check_implementations
from admfast.engine.guidance import GuidanceFn
from admfast.engine.loop import Callback
from admfast.engine.sampler import Plan
from admfast.errors import invalid
from admfast.solvers import check_solver, make_table, respacing_of

Output = Literal["uint8", "float"]
INVERSE = "ddim-inverse"
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Asked:
    """The arguments of `Pipeline.sample`, which describes them, in its order."""

    classes: int | Iterable[int] | None = None
    seeds: int | Iterable[int] | None = None
    steps: int | None = None
    solver: str = "ddpm"
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    eta: float | None = None
    clip: bool = True
    respacing: Respacing | None = None
    upsampler_steps: int | None = None
    low_res: Tensor | None = None
    noise: Tensor | None = None
    step_noise: Tensor | None = None
    x_start: Tensor | None = None
    t_start: int | None = None
    guidance_fn: GuidanceFn | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    callback: Callback | None = None
    every: int = 1
    batch_size: int | None = None
    output: Output = "uint8"
    impl: str | None = None


def check_asked(asked: Asked) -> None:
    """Refuse what is wrong whatever the model is."""
    checks.functions(guidance_fn=asked.guidance_fn, denoised_fn=asked.denoised_fn, callback=asked.callback)
    checks.one_of("output", asked.output, ("uint8", "float"))
    checks.whole("every", asked.every, 1)
    check_implementations(asked.impl)


def make_plan(diffusion: DiffusionConfig, default: int, asked: Asked, name: str = "steps") -> Plan:
    """Return the rows that run on a process; `name` is what the user calls `steps`, `default` how many."""
    steps, respacing, solver = asked.steps, asked.respacing, asked.solver
    check_solver(solver)
    checks.switch("clip", asked.clip)
    if respacing is None:
        steps = checks.whole(name, default if steps is None else steps, 1, diffusion.steps)
        respacing = respacing_of(solver, steps)
    elif steps is not None:
        raise invalid(name, steps, "not together with respacing")
    process = diffusion.build(respacing)
    options = {} if asked.eta is None else {"eta": checks.real("eta", asked.eta)}
    table = make_table(solver, process, clip=asked.clip, **options)
    plan = Plan(
        process,
        table,
        guidance_fn=asked.guidance_fn,
        denoised_fn=asked.denoised_fn,
        impl=asked.impl,
        noised=solver != INVERSE,
    )
    return plan if solver == INVERSE else _from_the_middle(plan, diffusion, asked)


def _from_the_middle(plan: Plan, diffusion: DiffusionConfig, asked: Asked) -> Plan:
    """The plan from `t_start` on, where an image to begin from is given."""
    x_start, t_start = asked.x_start, asked.t_start
    if (x_start is None) != (t_start is None):
        raise invalid("x_start, t_start", (x_start is not None, t_start), "give both or neither")
    if t_start is None:
        return plan
    t_start = checks.whole("t_start", t_start, 0, diffusion.steps - 1)
    kept = plan.process.schedule.timestep_map
    below = [row.index for row in plan.table.rows if kept[row.index] <= t_start]
    if not below:
        raise invalid("t_start", t_start, f"{kept[0]} or more, the first step of this respacing")
    rows = plan.table.from_step(max(below))
    return replace(plan, table=rows, skipped=len(plan.table) - len(rows))


def guided_rows(plan: Plan, asked: Asked) -> list[bool] | None:
    """For every row whether its timestep of the original process lies in the interval; None: all rows."""
    interval = asked.guidance_interval
    if interval is None:
        return None
    if not plan.scale and asked.guidance_fn is None:
        raise invalid("guidance_interval", interval, "without guidance there is nothing to limit")
    values = list(interval) if isinstance(interval, Iterable) and not isinstance(interval, str) else []
    if len(values) != 2:
        raise invalid("guidance_interval", interval, "two timesteps, (lowest, highest)")
    low, high = (checks.real("guidance_interval", value) for value in values)
    if low > high:
        raise invalid("guidance_interval", interval, "the lowest first")
    kept = plan.process.schedule.timestep_map
    return [low <= kept[row.index] <= high for row in plan.table.rows]


def check_inverse(asked: Asked) -> None:
    """The inverse of DDIM needs the images that it takes apart."""
    if asked.solver != INVERSE:
        return
    if asked.t_start is not None:
        raise invalid("t_start", asked.t_start, f"not for {INVERSE}: it begins from the clean image")
    if (asked.x_start is None) == (asked.noise is None):
        given = None if asked.noise is None else "given together with noise"
        raise invalid("x_start", given, f"{INVERSE} takes images apart: give them, [N, C, H, W] in [-1, 1]")


def guidance_scale(name: str, default: float, classifier: nn.Module | None, asked: Asked) -> float:
    """The scale of the classifier's gradient; 0 where it is not used."""
    scale = None if asked.guidance is None else checks.real("guidance", asked.guidance)
    if asked.guidance_fn is not None:
        if scale:
            raise invalid("guidance", asked.guidance, "not together with guidance_fn")
        return 0.0
    if scale is None:
        scale = 0.0 if asked.solver == INVERSE else default
    if abs(scale) > LARGEST:
        raise invalid("guidance", scale, f"a number that float32 holds, at most {LARGEST:.2g}")
    if scale and classifier is None:
        raise invalid("guidance", scale, f"{name} has no classifier; 0 is none")
    return scale
