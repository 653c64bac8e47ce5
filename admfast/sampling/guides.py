"""Guides: gradients of log-probabilities at x_t that steer sampling. Several guides are summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.sampling.predict import Prediction

Interval = Sequence[float]  # (lowest, highest)
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Guide:
    """A guide: guide(x_t, t, prediction) returns a gradient of x_t's shape.

    Attributes:
        function: function(x_t, t), or function(x_t, t, prediction) if `sees_prediction`. None means the
            gradient of the pipeline's classifier, which a prepared step computes.
        sees_prediction: the function also gets the network's `Prediction`. Gradients are recorded, x_t is a
            leaf that requires a gradient, and the prediction depends on it.
        guidance_scale: factor of the gradient.
        interval: (lowest, highest) timestep of the original process at which the guide applies; None means
            all timesteps.

    The function gets t [N] as a classifier sees it, and only the images of one batch: `prediction.first` is
    the index of the batch's first image among all requested images. It may change its arguments in place. In
    a cascade, guides act only on the base model's steps.
    """

    function: Callable[..., Tensor] | None = None
    sees_prediction: bool = False
    guidance_scale: float = 1.0
    interval: Interval | None = None

    def __post_init__(self) -> None:
        checks.optional_callables(function=self.function)
        checks.store_booleans(self, "sees_prediction")
        guidance_scale = checks.finite_float(
            "guidance_scale", self.guidance_scale, least=-LARGEST, most=LARGEST
        )
        object.__setattr__(self, "guidance_scale", guidance_scale)
        if self.function is None and self.sees_prediction:
            raise invalid("function", None, "a function of (x_t, t, prediction)")
        if self.interval is not None:
            object.__setattr__(self, "interval", checks.interval("interval", self.interval))

    def __call__(self, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Return the scaled gradient. Raises: InvalidArgument if it isn't a float tensor of x_t's shape."""
        if self.function is None:
            raise invalid("function", None, "a function; None works only as a guide of `sample`")
        # Copies, which a function may keep or change. With a prediction, x_t is a copy already.
        arguments = (
            (x_t, t.clone(), prediction) if self.sees_prediction else (x_t.detach().clone(), t.clone())
        )
        gradient = checks.image_tensor("guidance(x, t)", self.function(*arguments), tuple(x_t.shape))
        return gradient if self.guidance_scale == 1 else gradient * self.guidance_scale


def by_classifier(guidance_scale: float, interval: Interval | None = None) -> Guide:
    """Return the guide of the pipeline's classifier: guidance_scale * d/dx log p(class | x_t)."""
    return Guide(guidance_scale=guidance_scale, interval=interval)


def by_x(function: Callable[[Tensor, Tensor], Tensor], interval: Interval | None = None) -> Guide:
    """Return a guide that calls function(x_t, t) without recording gradients."""
    return Guide(function, interval=interval)


def by_prediction(
    function: Callable[[Tensor, Tensor, Prediction], Tensor], interval: Interval | None = None
) -> Guide:
    """Return a guide that calls function(x_t, t, prediction), which may differentiate prediction by x_t.

    The network runs once per step however many guides there are, and each guide gets its own graph. With two
    or more such guides, second derivatives through the network are not available.
    """
    return Guide(function, sees_prediction=True, interval=interval)
