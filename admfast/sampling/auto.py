"""Choose solver, timesteps and guidance for a number of steps: `solver="auto"` and `quality`."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from admfast.diffusion import Respacing
from admfast.sampling.guides import network_guides
from admfast.sampling.request import AUTO, SampleRequest

if TYPE_CHECKING:
    from admfast.sampling.pipeline import Pipeline

LOG = logging.getLogger("admfast")
# Steps of each quality; "best" takes the system's own recipe.
QUALITY_STEPS = {"draft": 10, "good": 25, "best": None}
# From this scale on, solvers of higher order are not taken. The source is of scale 8; another one, of scale
# 2, has no failures. The limit between them is ours.
HIGH_SCALE = 5.0
HIGH_SCALE_SOURCE = "Lu et al. 2022, table of ADM-G at 256x256, scale 8"
# The published scale for 25 steps of DDIM, divided by that for 250 steps of DDPM, which is the system's:
# 1.25 / 0.5, 2.5 / 1.0 and 9.0 / 4.0 (Dhariwal & Nichol 2021).
FEW_STEPS_FACTORS = {"imagenet128": 2.5, "imagenet256": 2.5, "imagenet512": 2.25}
FEW_STEPS, ALL_STEPS = 25, 250


@dataclass(frozen=True)
class Entry:
    """An entry of the table: the solver for at most `steps` steps, and where it comes from."""

    steps: int | None
    solver: str
    spacing: str | None
    source: str


_V3 = (
    "Zheng et al. 2023, DPM-Solver-v3, table 6: ADM-G at 256x256, scale 2, 5 to 20 steps; above extrapolated"
)
_ZOO = "zju-pi/diff-sampler: EDM's training of the ADM network at 64x64, unguided"
_DIGITS = "docs/accuracy.md, fewer steps: the digits, 5 to 50 steps, by Frechet distance"
_PUBLISHED = "Dhariwal & Nichol 2021: the published recipe"
# The last entry of each table has no limit.
TABLES = {
    "digits": (
        Entry(9, "unipc", "uniform", _DIGITS),
        Entry(99, "dpmpp:sde=true", "uniform", _DIGITS),
        Entry(None, "ddpm", None, _PUBLISHED),
    ),
    "guided": (Entry(99, "unipc", "uniform", _V3), Entry(None, "ddpm", None, _PUBLISHED)),
    "high scale": (
        Entry(11, "ddim", None, HIGH_SCALE_SOURCE),
        Entry(99, "dpmpp", "uniform", HIGH_SCALE_SOURCE),
        Entry(None, "ddpm", None, _PUBLISHED),
    ),
    "unguided": (
        Entry(8, "deis", "quadratic", f"{_ZOO}, 5 to 8 steps"),
        Entry(99, "ipndm", "karras", f"{_ZOO}, 10 steps; above extrapolated"),
        Entry(None, "ddpm", None, _PUBLISHED),
    ),
}


def resolve(request: SampleRequest, pipeline: Pipeline) -> tuple[SampleRequest, str | None]:
    """Return the request with a solver, steps and spacing in place of `solver="auto"` and `quality`.

    The second value is the source of the choice, None if the request names a solver.

    Settings that the request gives stay. The classifier's default scale grows where steps are fewer than in
    the published recipe, if a pair of scales was published. A quality also limits the steps of an upsampler.
    """
    if request.quality is not None:
        steps, up = requested_steps(pipeline, None, request.quality), pipeline.upsampler
        if up is not None and request.upsampler_steps is None:
            request = replace(request, upsampler_steps=requested_steps(up, None, request.quality))
        request = replace(request, quality=None, steps=steps)
    if request.solver != AUTO:
        return request, None
    steps = requested_steps(pipeline, request.steps, respacing=request.respacing)
    guidance = request.guidance
    if guidance is None and not request.guides and request.guidance_fn is None:
        guidance = default_scale(pipeline, steps)
        if guidance != pipeline.guidance:
            request = replace(request, guidance=guidance)
    entry = choose(pipeline, steps, largest_scale(request, pipeline))
    spacing = None if request.respacing is not None else request.spacing or entry.spacing
    return replace(request, solver=entry.solver, spacing=spacing), entry.source


def requested_steps(
    pipeline: Pipeline, steps: int | None, quality: str | None = None, respacing: Respacing | None = None
) -> int:
    """Return the number of steps that is asked for by number, quality or respacing, or by none of them."""
    if respacing is not None:
        return pipeline.diffusion.build(respacing).schedule.num_timesteps
    return steps or QUALITY_STEPS[quality or "best"] or pipeline.steps


def choose(pipeline: Pipeline, steps: int, scale: float) -> Entry:
    """Return the table's entry for a number of steps. scale: the guides' largest, 0 without guidance."""
    kind = "guided" if scale else "unguided"
    if pipeline.name.startswith("digits32"):
        kind = "digits"
    elif scale >= HIGH_SCALE:
        kind = "high scale"
    return next(entry for entry in TABLES[kind] if entry.steps is None or steps <= entry.steps)


def default_scale(pipeline: Pipeline, steps: int) -> float:
    """Return the classifier's scale for a number of steps, if none is given.

    Between the two published scales of a model, for 25 and for 250 steps, it is linear in the logarithm of
    the steps; below 25 steps it is that of 25. Other models have one published scale.
    """
    factor = FEW_STEPS_FACTORS.get(pipeline.name, 1.0)
    share = math.log(ALL_STEPS / max(min(steps, ALL_STEPS), FEW_STEPS)) / math.log(ALL_STEPS / FEW_STEPS)
    return pipeline.guidance * round(1 + (factor - 1) * share, 2)


def largest_scale(request: SampleRequest, pipeline: Pipeline) -> float:
    """Return the largest scale of the guides by networks in any row, 0 without one."""
    guides = network_guides(request, pipeline.guidance)
    return max((guide.largest_scale for guide in guides), default=0.0)


def warn_of_failure(request: SampleRequest, pipeline: Pipeline) -> None:
    """Log a warning, once, of a solver of order 3 at a high scale, which is known to fail, with the cure."""
    scale = largest_scale(request, pipeline)
    if scale >= HIGH_SCALE and request.dynamic_threshold is None:
        failure = f"{request.solver} at a guidance scale of {scale:g} is known to fail ({HIGH_SCALE_SOURCE})"
        _warn_once(f"{failure}: take order=2, or dynamic_threshold=0.995")


@functools.lru_cache
def _warn_once(text: str) -> None:
    LOG.warning("%s", text)
