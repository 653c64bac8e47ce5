"""Choose solver, timesteps and guidance for a number of steps: `solver="auto"` and `quality`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from admfast.sampling.guides import network_guides
from admfast.sampling.request import AUTO, SampleRequest

if TYPE_CHECKING:
    from admfast.sampling.pipeline import Pipeline

# Steps of each quality; "best" takes the system's own recipe.
QUALITY_STEPS = {"draft": 10, "good": 25, "best": None}
# From this scale of the classifier on, solvers of higher order fail (`HIGH_SCALE_SOURCE`).
HIGH_SCALE = 5.0
HIGH_SCALE_SOURCE = "Lu et al. 2022, table of ADM-G at 256x256, scale 8"
# The only published pair of scales for one model: 1.0 for 250 steps of DDPM, 2.5 for 25 steps of DDIM.
RESCALED_SYSTEM, FEW_STEPS_FACTOR = "imagenet256", 2.5
FEW_STEPS, ALL_STEPS = 25, 250


@dataclass(frozen=True)
class Entry:
    """An entry of the table: the solver for at most `steps` steps, and where it comes from."""

    steps: int | None
    solver: str
    spacing: str | None
    source: str


_V3 = "Zheng et al. 2023, DPM-Solver-v3, table 6: ADM-G at 256x256, scale 2, 10 to 20 steps"
_ZOO = "zju-pi/diff-sampler, table of the ADM network at 64x64, without guidance"
_DIGITS = "docs/accuracy.md, fewer steps: the digits, 10 steps"
_PUBLISHED = "Dhariwal & Nichol 2021: the published recipe"
TABLES = {
    "digits": (Entry(99, "unipc", "log-snr", _DIGITS), Entry(None, "ddpm", None, _PUBLISHED)),
    "guided": (Entry(99, "unipc", "uniform", _V3), Entry(None, "ddpm", None, _PUBLISHED)),
    "high scale": (
        Entry(11, "ddim", None, HIGH_SCALE_SOURCE),
        Entry(99, "dpmpp", "uniform", HIGH_SCALE_SOURCE),
        Entry(None, "ddpm", None, _PUBLISHED),
    ),
    "unguided": (
        Entry(7, "deis", "uniform", _ZOO),
        Entry(12, "ipndm", "uniform", _ZOO),
        Entry(99, "unipc:order=3", "uniform", _ZOO),
        Entry(None, "ddpm", None, _PUBLISHED),
    ),
}


def resolve(request: SampleRequest, pipeline: Pipeline) -> tuple[SampleRequest, str | None]:
    """Return the request with a solver, steps and spacing in place of `solver="auto"` and `quality`.

    The second value is the source of the choice, None if the request names a solver.

    Settings that the request gives stay. The classifier's default scale grows where steps are fewer than in
    the published recipe, if a pair of scales was published.
    """
    if request.quality is not None:
        request = replace(request, quality=None, steps=QUALITY_STEPS[request.quality] or pipeline.steps)
    if request.solver != AUTO:
        return request, None
    steps = request.steps or pipeline.steps
    if request.respacing is not None:
        steps = pipeline.diffusion.build(request.respacing).schedule.num_timesteps
    guidance = request.guidance
    if guidance is None and not request.guides and request.guidance_fn is None:
        guidance = default_scale(pipeline, steps)
        if guidance != pipeline.guidance:
            request = replace(request, guidance=guidance)
    entry = choose(pipeline, steps, largest_scale(request, pipeline))
    spacing = None if request.respacing is not None else request.spacing or entry.spacing
    return replace(request, solver=entry.solver, spacing=spacing), entry.source


def choose(pipeline: Pipeline, steps: int, scale: float) -> Entry:
    """Return the table's entry for a number of steps. scale: the classifier's largest, 0 for none."""
    kind = "guided" if scale else "unguided"
    if pipeline.name.startswith("digits32"):
        kind = "digits"
    elif scale >= HIGH_SCALE:
        kind = "high scale"
    return next(entry for entry in TABLES[kind] if entry.steps is None or steps <= entry.steps)


def default_scale(pipeline: Pipeline, steps: int) -> float:
    """Return the classifier's scale for a number of steps, if none is given.

    Between the published pairs (25 steps, 2.5) and (250 steps, 1.0) of the 256x256 model it is linear in the
    logarithm of the steps; below 25 steps it is that of 25. Other models have one published scale.
    """
    if pipeline.name != RESCALED_SYSTEM:
        return pipeline.guidance
    share = math.log(ALL_STEPS / max(min(steps, ALL_STEPS), FEW_STEPS)) / math.log(ALL_STEPS / FEW_STEPS)
    return pipeline.guidance * round(1 + (FEW_STEPS_FACTOR - 1) * share, 2)


def largest_scale(request: SampleRequest, pipeline: Pipeline) -> float:
    """Return the largest scale of the classifier in any row, 0 without one."""
    largest = 0.0
    for guide in network_guides(request, pipeline.guidance):
        if guide.network == "classifier":
            scale = guide.guidance_scale
            largest = max(map(abs, scale if isinstance(scale, tuple) else (scale,)))  # type: ignore[arg-type]
    return largest


def warn_of_failure(request: SampleRequest, pipeline: Pipeline) -> None:
    """Warn of a solver of order 3 at a high scale, which is known to fail, and name the cure."""
    scale = largest_scale(request, pipeline)
    if scale >= HIGH_SCALE and request.dynamic_threshold is None:
        cure = "take order=2, or dynamic_threshold=0.995"
        failure = f"{request.solver} at a guidance scale of {scale:g} is known to fail ({HIGH_SCALE_SOURCE})"
        warnings.warn(f"{failure}: {cure}", stacklevel=2)
