"""Averages of the weights over a run: at fixed rates, and of power-function profiles of any length.

Rate r: a <- r a + (1 - r) w after every step. Power function: after step n (from 1) a <- b a + (1 - b) w with
b = (1 - 1/n)^(gamma + 1), which gives the weights of step i a share near (i/n)^gamma; gamma belongs to a
relative width sigma by sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Two of them, stored along the
run, give the average of any other width afterwards. Source: Karras et al. 2024 (EDM2), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from admfast import checks
from admfast.errors import invalid, nearest

Profile = tuple[int, float]  # steps behind it, relative width


class Averages:
    """The averages of a network's parameters, by name: "0.9999" for a rate, "power-0.05" for a width.

    Args:
        net: whose parameters they begin as; floats in the parameters' dtype and on their device.
        rates: 0..1. powers: relative widths.
        warmup: hold rates down to (1 + step) / (10 + step).
    """

    def __init__(
        self, net: nn.Module, rates: Iterable[float], powers: Iterable[float] = (), warmup: bool = False
    ) -> None:
        self.rates = {f"{rate:g}": rate for rate in rates}
        self.powers = {f"power-{width:g}": width for width in powers}
        self.warmup = warmup
        self._names = [name for name, _ in net.named_parameters()]
        self._of: list[Tensor] = list(net.parameters())
        self._values = {name: [p.detach().clone() for p in self._of] for name in (*self.rates, *self.powers)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages: the rates first, as given."""
        return tuple(self._values)

    @torch.no_grad()
    def update(self, step: int, moved: Tensor | None = None) -> None:
        """Take the parameters in after step `step` (from 0).

        moved: 1 where the step changed the weights, 0 where it was skipped, on their device (nothing is read
            from it); None for 1.
        """
        for name, values in self._values.items():
            share = 1 - self._kept(name, step)
            if moved is None:
                torch._foreach_lerp_(values, self._of, share)
            else:
                weight = moved.to(values[0].dtype) * share
                torch._foreach_lerp_(values, self._of, [weight] * len(values))  # type: ignore[list-item]

    def _kept(self, name: str, step: int) -> float:
        """Return the share of an average that a step leaves in it."""
        if name in self.powers:
            return (1 - 1 / (step + 1)) ** (gamma_of(self.powers[name]) + 1)
        rate = self.rates[name]
        return min(rate, (1 + step) / (10 + step)) if self.warmup else rate

    def weights(self, name: str | None = None) -> dict[str, Tensor]:
        """Return an average as a state dict, sharing its memory; None gives the first. InvalidArgument."""
        name = self.names[0] if name is None else name
        if name not in self._values:
            raise invalid("ema", name, nearest(name, self.names))
        return dict(zip(self._names, self._values[name], strict=True))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return every average as a state dict."""
        return {name: self.weights(name) for name in self._values}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over values in place. Raises InvalidArgument where the averages are others."""
        if set(state) != set(self._values):
            raise invalid("ema", sorted(state), f"the averages of this run: {', '.join(self.names)}")
        for name, values in self._values.items():
            for key, value in zip(self._names, values, strict=True):
                value.copy_(state[name][key])


def gamma_of(width: float) -> float:
    """Return gamma of a relative width: the largest root of s^2 (g + 2)^2 (g + 3) = g + 1.

    width: above 0 and below 0.289 (gamma 0, the mean of all steps). Raises InvalidArgument.
    """
    square = checks.real("width", width, above=0, below=0.2887) ** 2
    # s^2 (g^3 + 7 g^2 + 16 g + 12) - g - 1
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(roots[np.abs(roots.imag) < 1e-6].real.max())


def reconstruction(stored: Sequence[Profile], wanted: Profile) -> list[float]:
    """Return the factors with which stored averages add up to the one that is wanted, by least squares.

    The profile of (n, sigma) is p(i) = (gamma + 1) i^gamma / n^(gamma + 1) for steps i up to n; the factors
    x minimise the integral of (sum x_k p_k - p)^2, so A x = b with the products of profiles. Source: EDM2,
    algorithm 3.

    stored, wanted: steps and relative width of each. Raises InvalidArgument without a stored average.
    """
    if not stored:
        raise invalid("stored", 0, "at least one stored average")
    between = np.array([[_product(a, b) for b in stored] for a in stored])
    with_wanted = np.array([_product(a, wanted) for a in stored])
    return [float(factor) for factor in np.linalg.lstsq(between, with_wanted, rcond=None)[0]]


def _product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    (n, width), (m, other) = sorted([a, b])
    g, h = gamma_of(width), gamma_of(other)
    return (g + 1) * (h + 1) / (g + h + 1) * (n / m) ** h / m


def combined(states: Sequence[dict[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_k factors_k states_k, added in float64 and rounded to the states' dtype."""
    return {
        key: sum(
            (state[key].double() * factor for state, factor in zip(states, factors, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        ).to(value.dtype)
        for key, value in states[0].items()
    }
