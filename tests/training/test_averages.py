"""Tests of averages of the weights: rates, power functions, and widths reconstructed afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from admfast.errors import InvalidArgument
from admfast.training.ema import Averages, combine, gamma_from_width, reconstruction_factors

STEPS = 200


def moving() -> tuple[nn.ParameterList, list[Tensor]]:
    """Return a parameter in float64 and the values that it takes."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(STEPS, 8, generator=generator, dtype=torch.float64).cumsum(0)
    return nn.ParameterList([torch.zeros(8, dtype=torch.float64)]), list(walk)


def averaged(
    averages: Averages, net: nn.ParameterList, walk: list[Tensor], keep: tuple[int, ...] = ()
) -> dict:
    stored = {}
    for step, value in enumerate(walk):
        net[0].data.copy_(value)
        averages.update(step)
        if step + 1 in keep:
            stored[step + 1] = {n: {"0": averages.weights(n)["0"].clone()} for n in averages.names}
    return stored


def power_average(walk: list[Tensor], width: float) -> Tensor:
    """Return the average by definition: the value of step i has the share (i/n)^(g+1) - ((i-1)/n)^(g+1)."""
    i = torch.arange(1, len(walk) + 1, dtype=torch.float64) / len(walk)
    cumulated = i ** (gamma_from_width(width) + 1)
    shares = torch.diff(cumulated, prepend=torch.zeros(1, dtype=torch.float64))
    # In the recursion step n gets the factor 1 - (1 - 1/n)^(g+1), which leads to these shares.
    return (shares[:, None] * torch.stack(walk)).sum(0)


def test_rates_and_warm_up():
    net, walk = moving()
    averages, warm = Averages(net, [0.5, 0.9]), Averages(net, [0.9], warmup=True)
    assert averages.names == ("0.5", "0.9")
    for step, value in enumerate(walk[:20]):
        before, before_warm = averages.weights("0.9")["0"].clone(), warm.weights()["0"].clone()
        net[0].data.copy_(value)
        averages.update(step)
        warm.update(step)
        torch.testing.assert_close(averages.weights("0.9")["0"], 0.9 * before + 0.1 * value)
        stored = min(0.9, (1 + step) / (10 + step))
        torch.testing.assert_close(warm.weights()["0"], stored * before_warm + (1 - stored) * value)
    with pytest.raises(InvalidArgument, match="ema"):
        averages.weights("0.7")


def test_a_step_that_was_skipped_changes_no_average():
    net, walk = moving()
    averages = Averages(net, [0.5], [0.1])
    averaged(averages, net, walk[:3])
    before = {name: averages.weights(name)["0"].clone() for name in averages.names}
    net[0].data.add_(1)
    averages.update(3, torch.tensor(0.0))
    assert all(torch.equal(averages.weights(name)["0"], before[name]) for name in before)
    averages.update(3, torch.tensor(1.0))
    assert not any(torch.equal(averages.weights(name)["0"], before[name]) for name in before)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_power_functions_have_their_width(width):
    gamma = gamma_from_width(width)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2)
    net, walk = moving()
    averages = Averages(net, [], [width])
    averaged(averages, net, walk)
    torch.testing.assert_close(averages.weights()["0"], power_average(walk, width))


@pytest.mark.parametrize("width", [0.06, 0.1, 0.2])
def test_any_width_is_put_together_from_two(width):
    net, walk = moving()
    averages = Averages(net, [], [0.05, 0.1])
    stored = averaged(averages, net, walk, keep=tuple(range(10, STEPS + 1, 10)))
    profiles = [(n, float(name[6:])) for n, states in stored.items() for name in states]
    states = [state for states in stored.values() for state in states.values()]
    found = combine(states, reconstruction_factors(profiles, (STEPS, width)))["0"]
    truth, nearest = power_average(walk, width), stored[STEPS]["power-0.1"]["0"]
    error = (found - truth).norm()
    assert error < 0.05 * truth.norm()
    if width != 0.1:
        assert error < 0.5 * (nearest - truth).norm(), "hardly better than a stored average"


def test_widths_that_are_none():
    for width in (0.0, 0.29, float("nan")):
        with pytest.raises(InvalidArgument, match="width"):
            gamma_from_width(width)
    with pytest.raises(InvalidArgument, match="stored"):
        reconstruction_factors([], (10, 0.1))
    assert gamma_from_width(0.28867) == pytest.approx(0, abs=1e-3)
