"""Average the weights over a run: exponentially with fixed rates, and with power-function profiles.

Rate r: a <- r a + (1 - r) w after every step. Power function: after step n (from 1) a <- b a + (1 - b) w with
b = (1 - 1/n)^(gamma + 1), so that the weights of step i have a share nearly proportional to (i/n)^gamma.
gamma follows from a relative width sigma: sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Two such
averages, stored during the run, are enough to make the average of any other width afterwards.
Source: Karras et al. 2024 (EDM2), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from admfast import checks
from admfast.errors import allowed_names, invalid

Profile = tuple[int, float]  # number of steps made, relative width


class Averages:
    """The averages of a network's parameters, by name: "0.9999" for a rate, "power-0.05" for a width.

    Args:
        net: the network. The averages begin as copies of its parameters, with their dtypes and device.
        rates: 0..1. powers: relative widths.
        warmup: limit rates to at most (1 + step) / (10 + step).
    """

    def __init__(
        self, net: nn.Module, rates: Iterable[float], powers: Iterable[float] = (), warmup: bool = False
    ) -> None:
        self.rates = {f"{rate:g}": rate for rate in rates}
        self.powers = {f"power-{width:g}": width for width in powers}
        self.warmup = warmup
        self._names = [name for name, _ in net.named_parameters()]
        self._parameters: list[Tensor] = list(net.parameters())
        self._values = {
            name: [p.detach().clone() for p in self._parameters] for name in (*self.rates, *self.powers)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages: the rates first, as given."""
        return tuple(self._values)

    @torch.no_grad()
    def update(self, step: int, was_changed: Tensor | None = None) -> None:
        """Add the current parameters to the averages after step `step` (from 0).

        was_changed: 1 if the step changed the weights, 0 if it was skipped; a tensor on their device, from
        which nothing is read back. None means 1.
        """
        for name, values in self._values.items():
            share = 1 - self._decay(name, step)
            if was_changed is None:
                torch._foreach_lerp_(values, self._parameters, share)
            else:
                weight = was_changed.to(values[0].dtype) * share
                torch._foreach_lerp_(values, self._parameters, [weight] * len(values))  # type: ignore[list-item]

    def _decay(self, name: str, step: int) -> float:
        """Return the weight of the old average in a step's update."""
        if name in self.powers:
            return (1 - 1 / (step + 1)) ** (gamma_from_width(self.powers[name]) + 1)
        rate = self.rates[name]
        return min(rate, (1 + step) / (10 + step)) if self.warmup else rate

    def weights(self, name: str | None = None) -> dict[str, Tensor]:
        """Return an average as a state dict that shares its memory. Raises InvalidArgument.

        name: name of the average; None takes the first.
        """
        name = self.names[0] if name is None else name
        if name not in self._values:
            raise invalid("ema", name, allowed_names(name, self.names))
        return dict(zip(self._names, self._values[name], strict=True))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return every average as a state dict."""
        return {name: self.weights(name) for name in self._values}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load values in place. Raises InvalidArgument if the names of the averages differ."""
        if set(state) != set(self._values):
            raise invalid("ema", sorted(state), f"the averages of this run: {', '.join(self.names)}")
        for name, values in self._values.items():
            for key, value in zip(self._names, values, strict=True):
                value.copy_(state[name][key])


def gamma_from_width(width: float) -> float:
    """Return gamma of a relative width: the largest root of s^2 (g + 2)^2 (g + 3) = g + 1.

    width: above 0 and below 0.289 (gamma 0, the mean of all steps). Raises InvalidArgument.
    """
    square = checks.finite_float("width", width, above=0, below=0.2887) ** 2
    # s^2 (g^3 + 7 g^2 + 16 g + 12) - g - 1
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(roots[np.abs(roots.imag) < 1e-6].real.max())


def reconstruction_factors(stored: Sequence[Profile], target: Profile) -> list[float]:
    """Return the factors of stored averages whose weighted sum is the target average, by least squares.

    The profile of (n, sigma) is p(i) = (gamma + 1) i^gamma / n^(gamma + 1) for steps i up to n. The factors x
    minimise the integral of (sum x_k p_k - p)^2, so A x = b, where A and b hold integrals of products of two
    profiles. Source: EDM2, algorithm 3.

    stored, target: number of steps and relative width of each. Raises InvalidArgument if `stored` is empty.
    """
    if not stored:
        raise invalid("stored", 0, "at least one stored average")
    stored_products = np.array([[_product(a, b) for b in stored] for a in stored])
    target_products = np.array([_product(a, target) for a in stored])
    return [float(factor) for factor in np.linalg.lstsq(stored_products, target_products, rcond=None)[0]]


def _product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    (n, width), (m, other_width) = sorted([a, b])
    gamma, other_gamma = gamma_from_width(width), gamma_from_width(other_width)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * (n / m) ** other_gamma / m


def combine(states: Sequence[dict[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_k factors_k states_k, added in float64 and rounded to the states' dtype."""
    return {
        key: sum(
            (state[key].double() * factor for state, factor in zip(states, factors, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        ).to(value.dtype)
        for key, value in states[0].items()
    }
