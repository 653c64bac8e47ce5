"""Sample the same seeds on the fast path and on the float32 reference, and say how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.engine.loop import Progress
from admfast.engine.sampler import conditioned
from admfast.engine.verify import (
    BUDGETS,
    Budget,
    Deviation,
    Verification,
    compare_images,
    compare_layers,
    relative_error,
)
from admfast.errors import invalid
from admfast.models import UNet, Upsampler
from admfast.ops import dispatch
from admfast.pipeline import Pipeline


def verify(
    pipe: Pipeline,
    reference: Pipeline,
    *,
    classes: Iterable[int] | None = None,
    seeds: Iterable[int] = range(4),
    steps: int = 25,
    solver: str = "ddim",
    guidance: float | None = None,
    low_res: Tensor | None = None,
    budget: Budget | None = None,
) -> Verification:
    """Compare `pipe` with `reference`: every layer at three of the steps, x after every step, and the images.

    Args:
        pipe: the pipeline as it is used.
        reference: the same model in float32 with `engine=PLAIN`; it runs on the reference implementations.
        classes, seeds, steps, solver, guidance, low_res: of the images, as of `Pipeline.sample`.
        budget: what is allowed; None is that of the pipeline's precision.

    Returns:
        What was found; `failures` is empty where all of it is within the budget.

    Raises: InvalidArgument as `Pipeline.sample`, and for pipelines of different networks.
    """
    for name in ("config", "diffusion"):
        if getattr(pipe, name) != getattr(reference, name):
            raise invalid("reference", reference.name, f"of the same {name} as {pipe.name}")
    verification = Verification(budget or BUDGETS[pipe.policy.name])
    given: dict[str, Any] = dict(
        seeds=list(seeds), steps=steps, solver=solver, guidance=guidance, low_res=low_res, output="float"
    )
    if pipe.upsampler is not None:
        given["upsampler_steps"] = steps
    given["classes"] = None if classes is None else list(classes)
    seen: dict[str, list[_Seen]] = {"base": [], "upsampler": []}

    def keep(progress: Progress) -> None:
        seen[progress.stage].append(_Seen(progress.x.cpu().clone(), progress.t, progress.x0.cpu().clone()))

    def compare(progress: Progress) -> None:
        error = relative_error(progress.x, seen[progress.stage][progress.done - 1].x)
        prefix = "" if progress.stage == "base" else "upsampler: "
        name = f"{prefix}x after step {progress.done} (t = {progress.t:g})"
        verification.steps.append(Deviation(name, error, verification.budget.step))

    with dispatch.using("reference"):
        exact = reference.sample(callback=keep, batch_size=len(given["seeds"]), **given)
    got = pipe.sample(callback=compare, batch_size=len(given["seeds"]), **given)
    compare_images(verification, got, exact)
    verification.layers = _layers(pipe, reference, seen["base"], given, verification.budget, "")
    if pipe.upsampler is not None and reference.upsampler is not None:
        up = (
            pipe.upsampler,
            reference.upsampler,
            seen["upsampler"],
            given,
            verification.budget,
            "upsampler ",
        )
        verification.layers += _layers(*up)
    return verification


@dataclass(frozen=True)
class _Seen:
    """What the reference had after a row: x and the x_0 it reported, at what the network saw as t."""

    x: Tensor
    t: float
    x0: Tensor


def _layers(
    pipe: Pipeline,
    reference: Pipeline,
    seen: list[_Seen],
    given: dict[str, Any],
    budget: Budget,
    prefix: str,
) -> list[Deviation]:
    """The layers of network and classifier at what three of the steps begin from, the worst of each."""
    count = len(given["seeds"])
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
            for found in compare_layers(fast, exact, call, budget, prefix + name):
                if found.name not in worst or found.error > worst[found.name].error:
                    worst[found.name] = found
    return list(worst.values())


def _forward(net: nn.Module, x: Tensor, t: Tensor, labels: Tensor, low_res: Tensor | None) -> Tensor:
    if not isinstance(net, UNet):
        return net(x, t)
    return conditioned(net, labels, low_res if isinstance(net, Upsampler) else None)(x, t)
