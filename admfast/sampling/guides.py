"""Guides: gradients of log-probabilities at x_t that steer sampling. They add up."""

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
    """A guide as a value: guide(x_t, t, prediction) is a gradient like x_t.

    Attributes:
        function: function(x_t, t), or function(x_t, t, prediction) where it `sees_prediction`; None is the
            gradient of the pipeline's classifier, which a prepared step computes.
        sees_prediction: the loop makes one differentiable evaluation of the network. The function gets x_t as
            a leaf that requires a gradient and the `Prediction` that hangs on it, with gradients recorded.
        scale: what the gradient is multiplied by.
        interval: (lowest, highest) timestep of the original process at which the guide applies; None is
            everywhere.

    A function gets t as a classifier would, [N], and only the images of its batch: `prediction.first` is the
    number of the first among all images asked for. It may work in place. In a cascade guides act on the base
    model's steps.
    """

    function: Callable[..., Tensor] | None = None
    sees_prediction: bool = False
    scale: float = 1.0
    interval: Interval | None = None

    def __post_init__(self) -> None:
        checks.functions(function=self.function)
        checks.switches(self, "sees_prediction")
        scale = checks.real("scale", self.scale, least=-LARGEST, most=LARGEST)
        object.__setattr__(self, "scale", scale)
        if self.function is None and self.sees_prediction:
            raise invalid("function", None, "a function of (x_t, t, prediction)")
        if self.interval is not None:
            object.__setattr__(self, "interval", checks.interval("interval", self.interval))

    def __call__(self, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Return the scaled gradient. Raises: InvalidArgument for what is no tensor like x_t."""
        if self.function is None:
            raise invalid("function", None, "one to call: the classifier's gradient is the sampler's own")
        # A function that keeps its x, or works in place, must not hold the sampler's.
        given = (x_t, t.clone(), prediction) if self.sees_prediction else (x_t.detach().clone(), t.clone())
        gradient = checks.images("guidance(x, t)", self.function(*given), tuple(x_t.shape))
        return gradient if self.scale == 1 else gradient * self.scale


def by_classifier(scale: float, interval: Interval | None = None) -> Guide:
    """Return guidance by the pipeline's classifier: scale * d/dx log p(class | x_t)."""
    return Guide(scale=scale, interval=interval)


def by_x(function: Callable[[Tensor, Tensor], Tensor], interval: Interval | None = None) -> Guide:
    """Return a guide of function(x_t, t), called without gradients being recorded."""
    return Guide(function, interval=interval)


def by_prediction(
    function: Callable[[Tensor, Tensor, Prediction], Tensor], interval: Interval | None = None
) -> Guide:
    """Return a guide of function(x_t, t, prediction), which may differentiate the prediction in x_t.

    However many there are, the network runs once a step; each guide has a graph of its own. Beside others it
    can't take second derivatives through the network.
    """
    return Guide(function, sees_prediction=True, interval=interval)
