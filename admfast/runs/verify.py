"""Sample the same seeds on the fast path and on the float32 reference, and say how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast import checks
from admfast.engine.arguments import LARGEST_SEED
from admfast.engine.asking import INVERSE
from admfast.engine.loop import Progress
from admfast.engine.options import PLAIN
from admfast.engine.sampler import conditioned
from admfast.engine.verify import (
    Budget,
    Deviation,
    Verification,
    amplified,
    budget_of,
    compare_images,
    compare_layers,
    relative_error,
)
from admfast.errors import invalid
from admfast.models import UNet, Upsampler
from admfast.ops import dispatch
from admfast.pipeline import Pipeline
from admfast.solvers import SOLVERS, make_table, respacing_of

SAMPLERS = [name for name in SOLVERS if name != INVERSE]
IMAGES = 4  # where nothing says how many
# What the engine may do to a step; a reference does none of it.
PREPARATIONS = ("prepared", "fold", "graph", "branches", "compile")


def verify(
    pipe: Pipeline,
    reference: Pipeline,
    *,
    classes: int | Iterable[int] | None = None,
    seeds: int | Iterable[int] | None = None,
    steps: int = 25,
    solver: str = "ddim",
    guidance: float | None = None,
    upsampler_steps: int | None = None,
    low_res: Tensor | None = None,
    budget: Budget | None = None,
) -> Verification:
    """Compare `pipe` with `reference`: every layer at three of the steps, x after every step, and the images.

    Args:
        pipe: the pipeline as it is used.
        reference: another pipeline of the same model on the same device, with networks of its own, in float32
            and with `engine=PLAIN`; it runs on the reference implementations.
        classes, solver, guidance, low_res: of the images, as of `Pipeline.sample`.
        seeds: as of `Pipeline.sample`; None is 0, 1, ... for the classes or `low_res` given, else 0..3.
        steps: network evaluations. Too few are refused: the first rows' x_0 has many times the rounding of
            the network's output (`amplified`), which few steps put into the images, so that correct code
            would be past the budget. In bfloat16 DDPM needs 4 on the linear schedule and 25 on the cosine
            one; DDIM runs with any.
        upsampler_steps: of the upsampler in a cascade; None is as many as `steps`.
        budget: what is allowed; None is that of the pipeline's precision.

    Returns:
        What was found; `failures` is empty where all of it is within the budget.

    Raises: InvalidArgument as `Pipeline.sample`, for a reference that isn't one, and for too few steps.
    """
    _check_pipelines(pipe, reference)
    verification = Verification(_budget(pipe, budget))
    if solver not in SAMPLERS:
        raise invalid("solver", solver, f"one that samples: {', '.join(SAMPLERS)}")
    given = _given(pipe, classes, seeds, low_res)
    given |= dict(steps=steps, solver=solver, guidance=guidance, low_res=low_res, output="float")
    if pipe.upsampler is not None or upsampler_steps is not None:
        given["upsampler_steps"] = steps if upsampler_steps is None else upsampler_steps
    given["batch_size"] = len(given["seeds"])
    rows = pipe.check(**given)
    stages: dict[str, tuple[Pipeline, Pipeline]] = {"base": (pipe, reference)}
    if pipe.upsampler is not None and reference.upsampler is not None:
        stages["upsampler"] = (pipe.upsampler, reference.upsampler)
    for stage, (part, _) in stages.items():
        _check_steps(stage, part, rows[stage], solver, verification.budget)
    wanted, found = _Watched(len(given["seeds"])), _Watched(len(given["seeds"]))
    with dispatch.using("reference"):
        exact = reference.sample(callback=wanted, **given)
    got = pipe.sample(callback=found, **given)
    verification.steps = _steps(found, wanted, verification.budget)
    compare_images(verification, got, exact)
    for stage, (part, plain) in stages.items():
        seen = [wanted.rows[stage, done] for done in range(1, rows[stage] + 1)]
        prefix = "" if stage == "base" else f"{stage} "
        verification.layers += _layers(part, plain, seen, given, verification.budget, prefix)
    return verification


def _budget(pipe: Pipeline, budget: Budget | None) -> Budget:
    """The budget asked for, or that of the pipeline's precision."""
    if budget is not None and not isinstance(budget, Budget):
        raise invalid("budget", budget, "a Budget, or None")
    return budget or budget_of(pipe.policy)


def _check_pipelines(pipe: Pipeline, reference: Pipeline) -> None:
    """Refuse a pair that is not one model in two forms, the second of them the reference's."""
    for argument, value in (("pipe", pipe), ("reference", reference)):
        if not isinstance(value, Pipeline):
            raise invalid(argument, value, "a Pipeline, as admfast.load returns")
    if reference is pipe:
        allowed = "another pipeline than `pipe`, loaded with precision='fp32', engine=PLAIN"
        raise invalid("reference", reference.name, allowed)
    pairs = [("reference", pipe, reference)]
    if pipe.upsampler is not None or reference.upsampler is not None:
        if pipe.upsampler is None or reference.upsampler is None:
            raise invalid("reference.upsampler", reference.upsampler, f"as of {pipe.name}")
        pairs.append(("reference.upsampler", pipe.upsampler, reference.upsampler))
    for argument, fast, plain in pairs:
        _check_alike(argument, fast, plain)
        _check_plain(argument, fast, plain)


def _check_alike(argument: str, pipe: Pipeline, reference: Pipeline) -> None:
    """Two pipelines of one model: networks, process and device agree."""
    for name in ("config", "diffusion", "device"):
        if getattr(pipe, name) != getattr(reference, name):
            raise invalid(argument, reference.name, f"of the same {name} as {pipe.name}")
    guides = [getattr(p.classifier, "config", None) for p in (pipe, reference)]
    if guides[0] != guides[1]:
        raise invalid(argument, reference.name, f"with the same classifier as {pipe.name}, or none")


def _check_plain(argument: str, pipe: Pipeline, reference: Pipeline) -> None:
    """The reference is in float32 throughout, nothing of it is prepared, and its networks are its own."""
    policy = reference.policy
    if (policy.torso, policy.classifier, policy.tf32) != (torch.float32, torch.float32, False):
        raise invalid(argument, reference.name, f"in precision 'fp32'; this is in {policy.name!r}")
    options = reference.options
    other = [name for name in PREPARATIONS if getattr(options, name) != getattr(PLAIN, name)]
    if other:
        raise invalid(argument, reference.name, f"with engine=PLAIN; this differs in {', '.join(other)}")
    for part in ("net", "classifier"):
        net = getattr(reference, part)
        if net is None:
            continue
        if net is getattr(pipe, part):
            raise invalid(f"{argument}.{part}", "that of pipe", "a network of its own, loaded again")
        rounded = {str(p.dtype) for p in net.parameters() if p.dtype != torch.float32}
        if rounded:
            kinds = ", ".join(sorted(rounded)).replace("torch.", "")
            raise invalid(f"{argument}.{part}", kinds, "parameters in float32")


def _given(pipe: Pipeline, classes: Any, seeds: Any, low_res: Any) -> dict[str, Any]:
    """Classes and seeds as lists, so that both pipelines can go through them."""
    labels = None
    if classes is not None:
        labels = checks.whole_numbers("classes", classes, 0, (pipe.num_classes or LARGEST_SEED) - 1)
    if seeds is None:
        like = low_res if isinstance(low_res, Tensor) and low_res.dim() else labels
        seeds = range(IMAGES if like is None else len(like))
    return {"classes": labels, "seeds": checks.whole_numbers("seeds", seeds, 0, LARGEST_SEED)}


def _check_steps(stage: str, pipe: Pipeline, steps: int, solver: str, budget: Budget) -> None:
    """Refuse so few steps that what rounding alone moves x by is past the budget."""

    def holds(count: int) -> bool:
        table = make_table(solver, pipe.diffusion.build(respacing_of(solver, count)))
        return amplified(table, budget.output) <= budget.step

    if holds(steps):
        return
    name = "steps" if stage == "base" else "upsampler_steps"
    more = (n for n in (*range(2, 26), 50, 100, 250, 500, 1000) if steps < n <= pipe.diffusion.steps)
    enough = next((n for n in more if holds(n)), None)
    why = "with so few, x_0 of the first rows amplifies rounding past what the budget allows"
    allowed = f"no number of steps of {solver}" if enough is None else f"{enough} or more for {solver}"
    raise invalid(name, steps, f"{allowed} in this precision: {why}")


class _Watched:
    """x and x_0 after every row, on the CPU, put together again where batches were halved.

    rows: by stage and the number of rows done.
    """

    def __init__(self, count: int) -> None:
        self.rows: dict[tuple[str, int], _Seen] = {}
        self._count = count

    def __call__(self, progress: Progress) -> None:
        shape = (self._count, *progress.x.shape[1:])
        key = (progress.stage, progress.done)
        seen = self.rows.setdefault(key, _Seen(torch.empty(shape), progress.t, torch.empty(shape)))
        part = slice(progress.first, progress.first + len(progress.x))
        seen.x[part], seen.x0[part] = progress.x, progress.x0


@dataclass(frozen=True)
class _Seen:
    """What there was after a row: x and the x_0 it reported, at what the network saw as t."""

    x: Tensor
    t: float
    x0: Tensor


def _steps(found: _Watched, wanted: _Watched, budget: Budget) -> list[Deviation]:
    """How far x was off after every row."""
    deviations = []
    for (stage, done), seen in wanted.rows.items():
        prefix = "" if stage == "base" else f"{stage}: "
        error = relative_error(found.rows[stage, done].x, seen.x)
        deviations.append(Deviation(f"{prefix}x after step {done} (t = {seen.t:g})", error, budget.step))
    return deviations


def _layers(
    pipe: Pipeline,
    reference: Pipeline,
    seen: list[_Seen],
    given: dict[str, Any],
    budget: Budget,
    prefix: str,
) -> list[Deviation]:
    """The layers of network and classifier at what three of the steps begin from, the worst of each."""
    count, tf32 = len(given["seeds"]), pipe.policy.tf32
    classes = given["classes"] or [seed % (pipe.num_classes or 1) for seed in given["seeds"]]
    labels = torch.tensor([classes[i % len(classes)] for i in range(count)], device=pipe.device)
    low_res = given["low_res"]
    worst: dict[str, Deviation] = {}
    for i in sorted({0, len(seen) // 2, max(len(seen) - 2, 0)}):
        x, t = seen[i].x.to(pipe.device), seen[min(i + 1, len(seen) - 1)].t
        if low_res is None and isinstance(pipe.net, Upsampler):
            size = pipe.low_res_size or x.shape[-1] // 4
            low_res = F.adaptive_avg_pool2d(seen[i].x0, size).to(pipe.device)
        for name in ("net", "classifier"):
            fast, exact = getattr(pipe, name), getattr(reference, name)
            if fast is None or exact is None:
                continue
            ts = torch.full((count,), t, device=pipe.device)
            call = partial(_forward, x=x, t=ts, labels=labels, low_res=low_res)
            for found in compare_layers(fast, exact, call, budget, prefix + name, tf32):
                if found.name not in worst or found.error > worst[found.name].error:
                    worst[found.name] = found
    return list(worst.values())


def _forward(net: nn.Module, x: Tensor, t: Tensor, labels: Tensor, low_res: Tensor | None) -> Tensor:
    if not isinstance(net, UNet):
        return net(x, t)
    return conditioned(net, labels, low_res if isinstance(net, Upsampler) else None)(x, t)
