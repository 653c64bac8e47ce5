"""Tests of the four objectives: their terms, their scales, and the parameters that each term trains."""

from __future__ import annotations

import pytest
import torch

from admfast.diffusion import (
    GaussianDiffusion,
    LossType,
    MeanType,
    make_schedule,
    training_losses,
    vb_terms_bpd,
)
from admfast.errors import InvalidArgument

SHAPE = (4, 3, 4, 5)
STEPS = torch.tensor([0, 1, 12, 24])


def process(loss: str, mean: str = "EPSILON", var: str = "LEARNED_RANGE") -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule("linear", 1000, "25"), mean, var, loss)


def inputs(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_start = torch.randint(0, 256, SHAPE, generator=generator).to(dtype) / 127.5 - 1
    return x_start, torch.randn(SHAPE, generator=generator, dtype=dtype)


class Network:
    """A network whose output channels are a * mean and, if learned, 0.2 * b * x."""

    def __init__(self, mean=0.5, learned=True):
        self.a = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.b = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.mean, self.learned, self.calls = mean, learned, []

    def __call__(self, x_t, t, **kwargs):
        self.calls.append((x_t, t, kwargs))
        mean = self.a * self.mean * torch.ones_like(x_t)
        return torch.cat([mean, 0.2 * self.b * x_t], dim=1) if self.learned else mean


@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_mse_is_zero_for_the_target(mean):
    d = process("MSE", mean.name, "FIXED_LARGE")
    x_start, noise = inputs()
    x_t = d.q_sample(x_start, STEPS, noise)
    previous = d.q_posterior(x_start, x_t, STEPS).mean
    target = {MeanType.EPSILON: noise, MeanType.START_X: x_start, MeanType.PREVIOUS_X: previous}[mean]
    terms = training_losses(d, Network(target, learned=False), x_start, STEPS, noise)
    assert set(terms) == {"loss", "mse"} and not terms["loss"].any()
    off = training_losses(d, Network(target + 0.5, learned=False), x_start, STEPS, noise)
    torch.testing.assert_close(off["mse"], torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("loss", list(LossType), ids=lambda v: v.name)
def test_parts_and_scales(loss):
    d, network = process(loss.name), Network()
    x_start, noise = inputs()
    terms = training_losses(d, network, x_start, STEPS, noise, {"y": 3})
    x_t, t, kwargs = network.calls[0]
    assert len(network.calls) == 1 and kwargs == {"y": 3}
    assert torch.equal(x_t, d.q_sample(x_start, STEPS, noise)) and torch.equal(t, d.model_t(STEPS))
    vb = vb_terms_bpd(d, network(x_t, t), x_start, x_t, STEPS, clip_denoised=False).output
    if loss.is_vb():
        assert set(terms) == {"loss"}
        torch.testing.assert_close(terms["loss"], vb * (25 if loss is LossType.RESCALED_KL else 1))
        return
    assert set(terms) == {"loss", "mse", "vb"}
    torch.testing.assert_close(terms["vb"], vb * (0.025 if loss is LossType.RESCALED_MSE else 1))
    torch.testing.assert_close(terms["mse"], ((noise - 0.5) ** 2).flatten(1).mean(1))
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_the_bound_beside_mse_teaches_the_variance_alone():
    d, network = process("MSE"), Network()
    terms = training_losses(d, network, *_ordered(inputs()))
    (a,) = torch.autograd.grad(terms["vb"].sum(), network.a, retain_graph=True, allow_unused=True)
    (b,) = torch.autograd.grad(terms["vb"].sum(), network.b, retain_graph=True)
    assert a is None or float(a) == 0
    assert float(b) != 0
    (from_mse,) = torch.autograd.grad(terms["mse"].sum(), network.a, retain_graph=True)
    (from_loss,) = torch.autograd.grad(terms["loss"].sum(), network.a)
    assert float(from_mse) == float(from_loss) != 0


def test_kl_teaches_both():
    d, network = process("KL"), Network()
    training_losses(d, network, *_ordered(inputs()))["loss"].sum().backward()
    assert float(network.a.grad) != 0 and float(network.b.grad) != 0


def _ordered(pair):
    x_start, noise = pair
    return x_start, STEPS, noise


def test_float64_in_float64_out():
    x_start, noise = inputs()
    wide = training_losses(process("MSE"), Network(), x_start, STEPS, noise)
    narrow = training_losses(process("MSE"), Network(), x_start.float(), STEPS, noise.float())
    assert all(value.dtype == torch.float64 for value in wide.values())
    for name, value in narrow.items():
        torch.testing.assert_close(value.double(), wide[name], rtol=1e-4, atol=1e-5)


def test_noise_is_drawn_if_none():
    d = process("MSE")
    x_start, _ = inputs()
    torch.manual_seed(7)
    drawn = training_losses(d, Network(), x_start, STEPS)
    torch.manual_seed(7)
    given = training_losses(d, Network(), x_start, STEPS, torch.randn_like(x_start))
    assert torch.equal(drawn["loss"], given["loss"])


def test_a_wrong_output_is_named():
    x_start, noise = inputs()
    for loss in ("MSE", "KL"):
        with pytest.raises(InvalidArgument, match="model_output.shape=.*LEARNED_RANGE"):
            training_losses(process(loss), Network(learned=False), x_start, STEPS, noise)
    with pytest.raises(InvalidArgument, match="noise.shape"):
        training_losses(process("MSE"), Network(), x_start, STEPS, noise[:1])
