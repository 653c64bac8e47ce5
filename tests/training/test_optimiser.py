"""The optimiser of the training loop: torch's AdamW in all but speed, states included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from admfast.training.optimiser import AdamWEma


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2)).double()


def fill_gradients(net: nn.Module, seed: int) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    net.zero_grad()
    net(x).square().mean().backward()


def steps(net: nn.Module, optimiser: AdamWEma | torch.optim.AdamW, count: range) -> None:
    for seed in count:
        fill_gradients(net, seed)
        if isinstance(optimiser, AdamWEma):
            optimiser.step(1e-2, 0.9)
        else:
            optimiser.step()


def assert_close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)  # some rounding of float64


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-to-torch", "torch-to-ours"])
def test_states_are_exchanged_with_torch(ours_first, tmp_path):
    nets = network(), network(), network()
    averages = copy.deepcopy(nets[0])
    ours = [AdamWEma(net.parameters(), averages.parameters(), 0.1) for net in nets]
    theirs = [torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1) for net in nets]
    steps(nets[2], theirs[2], range(10))
    first, second = (ours[0], theirs[1]) if ours_first else (theirs[0], ours[1])
    steps(nets[0], first, range(6))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    nets[1].load_state_dict(nets[0].state_dict())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(nets[1], second, range(6, 10))
    assert_close(nets[1], nets[2])


def test_a_parameter_without_a_gradient_stays_with_its_average():
    net = network()
    average = copy.deepcopy(net)
    optimiser = AdamWEma(net.parameters(), average.parameters(), 0.1)
    fill_gradients(net, 0)
    net[0].bias.grad = None
    before = copy.deepcopy(net)
    optimiser.step(1e-2, 0.9)
    assert torch.equal(net[0].bias, before[0].bias) and torch.equal(average[0].bias, before[0].bias)
    assert not torch.equal(net[0].weight, before[0].weight)
    expected = 0.9 * before[0].weight + 0.1 * net[0].weight
    torch.testing.assert_close(average[0].weight, expected)
    optimiser.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_the_state_of_another_network_is_refused():
    net, other = network(), nn.Linear(4, 6).double()
    optimiser = AdamWEma(other.parameters(), copy.deepcopy(other).parameters(), 0.0)
    fill = torch.ones(1, 4, dtype=torch.float64)
    other(fill).sum().backward()
    optimiser.step(0.1, 0.5)
    with pytest.raises(ValueError, match="size"):
        AdamWEma(net.parameters(), net.parameters(), 0.0).load_state_dict(optimiser.state_dict())
    turned = nn.Linear(6, 4).double()
    message = r"exp_avg of parameter 0 is \(6, 4\), not \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        AdamWEma(turned.parameters(), turned.parameters(), 0.0).load_state_dict(optimiser.state_dict())
