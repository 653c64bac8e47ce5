"""Guides that steer sampling: gradients of log-probabilities at x_t, and differences of networks' outputs.

Gradients of several guides are summed, and so are differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from admfast import checks
from admfast.diffusion import GaussianDiffusion
from admfast.engine.guidance import RowGuidance
from admfast.errors import invalid
from admfast.sampling.predict import Prediction

if TYPE_CHECKING:
    from admfast.ops.update import Row
    from admfast.sampling.request import SampleRequest

Interval = Sequence[float]  # (lowest, highest)
Scale = float | Sequence[float]
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Guide:
    """A guide by a function of the user: guide(x_t, t, prediction) returns a gradient of x_t's shape.

    Attributes:
        function: function(x_t, t), or function(x_t, t, prediction) if `sees_prediction`.
        sees_prediction: the function also gets the network's `Prediction`. Gradients are recorded, x_t is a
            leaf that requires a gradient, and the prediction depends on it.
        guidance_scale: factor of the gradient.
        interval: (lowest, highest) timestep of the original process at which the guide applies; None means
            all timesteps.

    The function gets t [N] as a classifier sees it, and only the images of one batch: `prediction.first` is
    the index of the batch's first image among all requested images. It may change its arguments in place. In
    a cascade, guides act only on the base model's steps.
    """

    function: Callable[..., Tensor]
    sees_prediction: bool = False
    guidance_scale: float = 1.0
    interval: Interval | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise invalid("function", self.function, "a function of (x_t, t), or of (x_t, t, prediction)")
        checks.store_booleans(self, "sees_prediction")
        guidance_scale = checks.finite_float(
            "guidance_scale", self.guidance_scale, least=-LARGEST, most=LARGEST
        )
        object.__setattr__(self, "guidance_scale", guidance_scale)
        if self.interval is not None:
            object.__setattr__(self, "interval", checks.interval("interval", self.interval))

    def __call__(self, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Return the scaled gradient. Raises: InvalidArgument if it isn't a float tensor of x_t's shape."""
        # Copies, which a function may keep or change. With a prediction, x_t is a copy already.
        arguments = (
            (x_t, t.clone(), prediction) if self.sees_prediction else (x_t.detach().clone(), t.clone())
        )
        gradient = checks.image_tensor("guidance(x, t)", self.function(*arguments), tuple(x_t.shape))
        return gradient if self.guidance_scale == 1 else gradient * self.guidance_scale


@dataclass(frozen=True)
class NetworkGuide:
    """A guide by a network of the pipeline, which a prepared step computes.

    Attributes:
        network: "classifier", "null class" or "weak network"; a request has at most one guide by each.
        guidance_scale: see `by_classifier` and the other functions. Several numbers are spread evenly over
            the rows, from the noisiest to the cleanest, and interpolated linearly between them; as many
            numbers as rows are one for each row.
        interval: (lowest, highest) timestep of the original process at which the guide applies; None means
            all timesteps. Outside it the network is not evaluated.
        every, count, reuse: for the classifier, see `by_classifier`.
    """

    network: Literal["classifier", "null class", "weak network"]
    guidance_scale: Scale
    interval: Interval | None = None
    every: int = 1
    count: int | None = None
    reuse: bool = False

    def __post_init__(self) -> None:
        checks.one_of("network", self.network, ("classifier", "null class", "weak network"))
        scale = checks.finite_floats("guidance_scale", self.guidance_scale, least=-LARGEST, most=LARGEST)
        object.__setattr__(self, "guidance_scale", scale)
        if self.interval is not None:
            object.__setattr__(self, "interval", checks.interval("interval", self.interval))
        object.__setattr__(self, "every", checks.whole_number("every", self.every, 1))
        if self.count is not None:
            object.__setattr__(self, "count", checks.whole_number("count", self.count, 1))
            if self.every != 1:
                raise invalid("every", self.every, "not together with count")
        checks.store_booleans(self, "reuse")
        is_partial = self.every != 1 or self.count is not None
        if self.reuse and not is_partial:
            raise invalid("reuse", True, "only with every or count: there are no rows between")
        if is_partial and self.network != "classifier":
            raise invalid("network", self.network, "the classifier, with every or count")

    def __str__(self) -> str:
        parts = [f"{self.network} {', '.join(f'{scale:g}' for scale in self.scales)}"]
        if self.interval is not None:
            parts.append("from t = {:g} to {:g}".format(*self.interval))
        if self.every != 1:
            parts.append(f"every {self.every} steps")
        if self.count is not None:
            parts.append(f"at {self.count} steps")
        if self.reuse:
            parts.append("used again between")
        return " ".join(parts)

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales, also if there is only one."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)  # type: ignore[return-value]

    @property
    def largest_scale(self) -> float:
        """The largest size of a scale; 0 if none has an effect."""
        without_effect = 0.0 if self.network == "classifier" else 1.0
        return max(map(abs, self.scales)) if set(self.scales) != {without_effect} else 0.0

    def computed_rows(self, rows: Sequence[int]) -> set[int]:
        """Return which of these rows compute the gradient."""
        if self.count is None:
            return set(rows[:: self.every])
        chosen: list[int] = []
        for i in range(min(self.count, len(rows))):
            place = math.floor(len(rows) * (i / self.count) ** 2)
            chosen.append(max(place, chosen[-1] + 1 if chosen else 0))
        return {rows[place] for place in chosen}


def by_classifier(
    guidance_scale: Scale,
    interval: Interval | None = None,
    *,
    every: int = 1,
    count: int | None = None,
    reuse: bool = False,
) -> NetworkGuide:
    """Return the guide of the pipeline's classifier: guidance_scale * d/dx log p(class | x_t).

    every: compute the gradient at every so many rows of the interval, from the first. count: compute it at so
    many rows, more of them early: of R rows at number floor(R (i / count)^2), i = 0, 1, ..., or the next
    free one (the exponent 2 is ours). reuse: the rows between use the last gradient; otherwise they are not
    guided.
    Source: Dhariwal & Nichol 2021; for `count` and `reuse` Dinh et al. 2024, "Compress Guidance".
    """
    return NetworkGuide("classifier", guidance_scale, interval, every, count, reuse)


def by_null_class(guidance_scale: Scale, interval: Interval | None = None) -> NetworkGuide:
    """Return classifier-free guidance, for a pipeline whose last class is a null class.

    The mean part of the network's output becomes out_null + guidance_scale (out - out_null), so that 1 is no
    guidance. Its variance is not changed. The network is evaluated twice.
    Source: Ho & Salimans 2022; for the interval Kynkaanniemi et al. 2024.
    """
    return NetworkGuide("null class", guidance_scale, interval)


def by_weak_network(guidance_scale: Scale, interval: Interval | None = None) -> NetworkGuide:
    """Return autoguidance, for a pipeline with a weak network: a smaller or less trained one.

    The mean part of the network's output becomes out_weak + guidance_scale (out - out_weak), so that 1 is no
    guidance. Its variance is not changed. Together with `by_null_class` both differences are added. A weak
    network without classes makes this classifier-free guidance by a separate network.
    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself".
    """
    return NetworkGuide("weak network", guidance_scale, interval)


def by_x(function: Callable[[Tensor, Tensor], Tensor], interval: Interval | None = None) -> Guide:
    """Return a guide that calls function(x_t, t) without recording gradients."""
    return Guide(function, interval=interval)


def by_prediction(
    function: Callable[[Tensor, Tensor, Prediction], Tensor], interval: Interval | None = None
) -> Guide:
    """Return a guide that calls function(x_t, t, prediction), which may differentiate prediction by x_t.

    The network runs once per step however many of these guides there are, and each gets its own graph. With
    two or more of them, second derivatives through the network are not available.
    """
    return Guide(function, sees_prediction=True, interval=interval)


def by_measurement(
    process: GaussianDiffusion,
    measure: Callable[[Tensor], Tensor],
    measurement: Tensor,
    step_size: float = 1.0,
) -> Guide:
    """Return the guide of DPS, which moves x by -step_size d/dx_t ||measurement - measure(x_0(x_t))||.

    Sample with `ddim(eta=1)`, whose step from the clipped x_0 is that of the paper, and with the respacing of
    `process`. DDIM moves x by beta / sqrt(1 - beta) times the gradient of a guide. DPS sets the size of the
    move itself, so this guide divides by that factor.

    Args:
        process: the process with the sample's respacing: `pipe.process("100")`.
        measure: differentiable function of images [n, C, H, W] in about [-1, 1].
        measurement: what `measure` gave for the image that is looked for: one for all samples, or one for
        each. step_size: size of the move.

    Source: Chung et al. 2023, algorithm 1.
    """
    s = process.schedule
    undone = {float(s.model_t(i)): math.sqrt(1 - s.betas[i]) / s.betas[i] for i in range(s.num_timesteps)}

    def gradient(x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        factor = undone.get(float(t[0]))
        if factor is None:
            allowed = f"a process with the sample's respacing, which has timestep {float(t[0]):g}"
            raise invalid("process", f"{len(undone)} timesteps", allowed)
        first = prediction.first if len(measurement) > 1 else 0
        residual = (measurement[first : first + len(x_t)] - measure(prediction.x0)).flatten(1).norm(dim=1)
        (slope,) = torch.autograd.grad(residual.sum(), x_t)
        return -step_size * factor * slope

    return by_prediction(gradient)


def spread(scale: Scale, count: int) -> list[float]:
    """Return the scale of each of `count` rows: several numbers are interpolated linearly between rows."""
    if not isinstance(scale, tuple):
        return [scale] * count  # type: ignore[list-item]
    if len(scale) > count:
        raise invalid("guidance", f"{len(scale)} scales", f"at most one for each of the {count} steps")
    scales = scale
    places = np.linspace(0, len(scales) - 1, count)
    return np.interp(places, range(len(scales)), scales).tolist()


def _rows_in_interval(interval: Interval | None, timesteps: Sequence[float]) -> tuple[bool, ...]:
    """Return, for every row, whether its timestep of the original process lies in the interval."""
    if interval is None:
        return (True,) * len(timesteps)
    return tuple(interval[0] <= t <= interval[1] for t in timesteps)


def network_guides(request: SampleRequest, default: float) -> list[NetworkGuide]:
    """Return the guides by networks that a request asks for; `default` is the classifier's default scale."""
    guides = [guide for guide in request.guides if isinstance(guide, NetworkGuide)]
    if scale := requested_scale(request, default):
        guides.append(by_classifier(scale, request.guidance_interval))
    return guides


def guidance_by_row(
    request: SampleRequest,
    default: float,
    rows: Sequence[Row],
    timesteps: Sequence[float],
    skipped: int = 0,
) -> tuple[RowGuidance, ...]:
    """Return the guidance of each row by networks, () for none.

    default: the classifier's default scale. skipped: how many rows of the solver's table come before these.
    """
    guides = {guide.network: guide for guide in request.guides if isinstance(guide, NetworkGuide)}
    null, weak = (
        _weights(guides[name].guidance_scale, 1.0, guides[name].interval, timesteps, skipped)
        if name in guides
        else None
        for name in ("null class", "weak network")
    )
    by_gradient = guides.get("classifier")
    scale, interval = requested_scale(request, default), request.guidance_interval
    if not guides and not scale:
        return ()
    if by_gradient is not None:
        scale, interval = by_gradient.guidance_scale, by_gradient.interval
    scales = _weights(scale, 0.0, interval, timesteps, skipped) if scale else [0.0] * len(rows)
    # Where a solver's row has no place for the gradient, the classifier isn't evaluated.
    guided = [i for i, row in enumerate(rows) if scales[i] and (row.k_pre or row.k_post or row.k_mean)]
    computed = set(guided) if by_gradient is None else by_gradient.computed_rows(guided)
    used = set(guided) if by_gradient is not None and by_gradient.reuse else computed
    scales = [scale if i in used else 0.0 for i, scale in enumerate(scales)]
    if null is None and weak is None and used == computed:
        by_scale = {scale: RowGuidance(scale) for scale in set(scales)}
        return tuple(by_scale[scale] for scale in scales)
    null, weak = ([0.0] * len(rows) if weights is None else weights for weights in (null, weak))
    for i, (of_null, of_weak) in enumerate(zip(null, weak, strict=True)):
        if of_null * of_weak < 0:
            actual = f"null class {of_null + 1:g}, weak network {of_weak + 1:g} in row {i}"
            raise invalid("guides", actual, "scales both above 1, or both below it")
    return tuple(
        RowGuidance(scales[i], i in used and i not in computed, null[i], weak[i]) for i in range(len(rows))
    )


def guides_by_function(
    request: SampleRequest, timesteps: Sequence[float]
) -> tuple[tuple[Guide, tuple[bool, ...]], ...]:
    """Return the guides by functions that a request asks for, each with the rows at which it applies."""
    guides = [guide for guide in request.guides if isinstance(guide, Guide)]
    if request.guidance_fn is not None:
        guides.append(Guide(request.guidance_fn, interval=request.guidance_interval))
    return tuple((guide, _rows_in_interval(guide.interval, timesteps)) for guide in guides)


def requested_scale(request: SampleRequest, default: float) -> Scale:
    """Return the scale of `guidance`, or the default, which holds without other guides; 0 for none."""
    if request.guidance is not None:
        return request.guidance
    is_guided = request.guides or request.guidance_fn is not None
    return 0.0 if is_guided or getattr(request.solver, "starts_from", "noise") == "image" else default


def _weights(
    scale: Scale, neutral: float, interval: Interval | None, timesteps: Sequence[float], skipped: int
) -> list[float]:
    """Return each row's difference from the scale without effect, 0 outside the interval."""
    scales = spread(scale, skipped + len(timesteps))[skipped:]
    pairs = zip(scales, _rows_in_interval(interval, timesteps), strict=True)
    return [scale - neutral if applied else 0.0 for scale, applied in pairs]
