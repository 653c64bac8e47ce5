"""Sample the same seeds on the fast path and on the float32 reference, and say how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
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
    given["classes"] = None if classes is None else list(classes)
    inputs: list[tuple[Tensor, float]] = []  # x after a row, and the t that it was at
    with dispatch.using("reference"):
        exact = reference.sample(callback=lambda p: inputs.append((p.x.cpu().clone(), p.t)), **given)

    def compare(progress: Progress) -> None:
        x, _ = inputs[progress.done - 1]
        if progress.stage == "base":
            error = relative_error(progress.x, x)
            name = f"x after step {progress.done} (t = {progress.t:g})"
            verification.steps.append(Deviation(name, error, verification.budget.step))

    got = pipe.sample(callback=compare, **given)
    compare_images(verification, got, exact)
    _layers(verification, pipe, reference, inputs, given)
    return verification


def _layers(
    verification: Verification,
    pipe: Pipeline,
    reference: Pipeline,
    inputs: list[tuple[Tensor, float]],
    given: dict[str, Any],
) -> None:
    """The layers of network and classifier at what the first, a middle and the last step begin from."""
    x_of = [inputs[i][0] for i in (0, len(inputs) // 2, max(len(inputs) - 2, 0))]
    t_of = [inputs[min(i, len(inputs) - 1)][1] for i in (1, len(inputs) // 2 + 1, len(inputs) - 1)]
    count, known = len(given["seeds"]), pipe.num_classes
    classes = given["classes"] or [seed % (known or 1) for seed in given["seeds"]]
    labels = torch.tensor([classes[i % len(classes)] for i in range(count)], device=pipe.device)
    worst: dict[str, Deviation] = {}
    for x, t in zip(x_of, t_of, strict=True):
        x, ts = x.to(pipe.device), torch.full((count,), t, device=pipe.device)
        for prefix, fast, exact in (
            ("net", pipe.net, reference.net),
            ("classifier", pipe.classifier, reference.classifier),
        ):
            if fast is None or exact is None:
                continue
            call = partial(_forward, x=x, t=ts, labels=labels, low_res=given["low_res"])
            for found in compare_layers(fast, exact, call, verification.budget, prefix):
                if found.name not in worst or found.error > worst[found.name].error:
                    worst[found.name] = found
    verification.layers = list(worst.values())


def _forward(net: nn.Module, x: Tensor, t: Tensor, labels: Tensor, low_res: Tensor | None) -> Tensor:
    if not isinstance(net, UNet):
        return net(x, t)
    return conditioned(net, labels, low_res if isinstance(net, Upsampler) else None)(x, t)
