"""Tests of `predict`: the process's formulas at whole timesteps, and linear log-SNR between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig, MeanType, VarType
from admfast.errors import InvalidArgument
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.predict import Predictor
from tests.small import CLASSES, PROCESS, classifier, pipeline, randn, unet, upsampler

SHAPE = (4, 2, 3, 3)
X = randn(*SHAPE, dtype=torch.float64)
T = torch.tensor([0, 1, 500, 999])
MEANS, VARS = tuple(MeanType), tuple(VarType)
# float64 arithmetic in another order. x_0 is up to 157 times larger than x.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def model(x: torch.Tensor, t: torch.Tensor, channels: int = 4) -> torch.Tensor:
    u = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) / 1000
    return torch.cat([torch.tanh(x + u), 0.7 * torch.cos(x - u)], dim=1)[:, :channels]


def predictor(mean: MeanType, var: VarType, **settings) -> tuple[Predictor, object]:
    """Return the predictor of a process, and a model with the channels that it needs."""
    process = DiffusionConfig(mean_type=mean, var_type=var, **settings)
    return Predictor(process), lambda x, t: model(x, t, 4 if var.learned else 2)


@pytest.mark.parametrize("mean", MEANS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("var", VARS, ids=lambda kind: kind.name)
def test_whole_timesteps_are_the_process_s_formulas(mean, var):
    predict, network = predictor(mean, var)
    s, at = predict.process.schedule, T.numpy()

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values[at]).view(-1, 1, 1, 1)

    bar, out = column(s.alphas_cumprod), network(X, T)
    m = out[:, :2]
    if mean is MeanType.EPSILON:
        eps, x0 = m, (X - (1 - bar).sqrt() * m) / bar.sqrt()
    else:
        c1, c2 = column(s.posterior_mean_coef1), column(s.posterior_mean_coef2)
        x0 = m if mean is MeanType.START_X else (m - c2 * X) / c1
        eps = (X - bar.sqrt() * x0) / (1 - bar).sqrt()
    low = column(s.posterior_log_variance_clipped)
    high = column(np.log(s.betas))
    if var is VarType.LEARNED_RANGE:
        log_var = low + (out[:, 2:] + 1) / 2 * (high - low)
    elif var is VarType.LEARNED:
        log_var = out[:, 2:]
    elif var is VarType.FIXED_SMALL:
        log_var = low.expand(SHAPE)
    else:
        first = math.log(s.posterior_variance[1])
        log_var = torch.where(T.view(-1, 1, 1, 1) == 0, first, high).expand(SHAPE)
    found = predict(network, X, T)
    torch.testing.assert_close(found.eps, eps, **FLOAT64)
    torch.testing.assert_close(found.x0, x0, **FLOAT64)
    torch.testing.assert_close(found.log_var, log_var, **FLOAT64)
    if mean is not MeanType.PREVIOUS_X:
        again = predict(network, X, T.double())
        for name in ("eps", "x0", "log_var"):
            torch.testing.assert_close(getattr(again, name), getattr(found, name), **FLOAT64)


@pytest.mark.parametrize("var", VARS, ids=lambda kind: kind.name)
def test_between_two_timesteps_log_snr_is_linear_and_all_else_between(var):
    predict, _ = predictor(MeanType.EPSILON, var)
    s = predict.process.schedule
    shares, x = np.linspace(0, 1, 9), torch.ones(9, 2, 1, 1, dtype=torch.float64)

    def constant(value: float):
        return lambda x, t: torch.full((len(x), 4 if var.learned else 2, 1, 1), value, dtype=x.dtype)

    for low in (0, 1, 250, 998):
        t = torch.tensor(low + shares)
        # x0 = (x - noise * out) / signal, so two outputs reveal signal and noise.
        at_zero, at_one = (predict(constant(value), x, t) for value in (0.0, 1.0))
        signal = 1 / at_zero.x0[:, 0, 0, 0]
        noise = 1 - at_one.x0[:, 0, 0, 0] * signal
        log_snr = 2 * (signal.log() - noise.log())
        expected = (1 - shares) * float(s.log_snr(low)) + shares * float(s.log_snr(low + 1))
        np.testing.assert_allclose(log_snr.numpy(), expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose((signal**2 + noise**2).numpy(), 1, rtol=0, atol=1e-12)
        log_var = at_zero.log_var[:, 0, 0, 0]
        steps = log_var.diff()
        assert log_var.isfinite().all() and ((steps >= 0).all() or (steps <= 0).all())
        whole = predict(constant(0.0), x[:2], torch.tensor([low, low + 1]))
        torch.testing.assert_close(log_var[[0, -1]], whole.log_var[:, 0, 0, 0], **FLOAT64)


def test_the_network_sees_t_as_it_is_or_rescaled():
    seen = []

    def network(x, t):
        seen.append(t)
        return model(x, t)

    predict, _ = predictor(MeanType.EPSILON, VarType.LEARNED_RANGE, steps=100, rescale_timesteps=True)
    x = X.float()
    predict(network, x, 7)
    predict(network, x, 7.25)
    predict(network, x, torch.tensor([0.0, 0.5, 98.75, 99.0]))
    assert [t.tolist() for t in seen] == [[70.0] * 4, [72.5] * 4, [0.0, 5.0, 987.5, 990.0]]
    seen.clear()
    predict, _ = predictor(MeanType.EPSILON, VarType.LEARNED_RANGE)
    for t in (7, 7.0, np.float32(7.5), np.int64(8), T):
        predict(network, x, t)
    assert [t.tolist() for t in seen] == [[7] * 4, [7] * 4, [7.5] * 4, [8] * 4, T.tolist()]
    assert [t.dtype.is_floating_point for t in seen] == [False, False, True, False, False]


ONE_FOR_ALL = [torch.tensor(500), torch.tensor([500]), torch.tensor(500.0), torch.tensor([500] * 2).int()]
ONE_FOR_ALL += [[500], (500.0, 500), np.array(500), np.array([500.0, 500.0]), [torch.tensor(500)] * 2]


@pytest.mark.parametrize("t", ONE_FOR_ALL, ids=lambda t: f"{type(t).__name__} {t}")
def test_one_timestep_serves_all_images_whatever_holds_it(t):
    pipe, x = pipeline(), randn(2, 1, 8, 8)
    found, wanted = pipe.predict(x, t, torch.tensor(3)), pipe.predict(x, 500, [3, 3])
    assert torch.equal(found.x0, wanted.x0) and torch.equal(found.log_var, wanted.log_var)


@pytest.mark.parametrize(
    "t", [[3, 800], np.array([3, 800]), torch.tensor([3, 800], dtype=torch.int16)], ids=str
)
def test_each_image_has_its_timestep(t):
    pipe, x = pipeline(), randn(2, 1, 8, 8)
    assert torch.equal(pipe.predict(x, t, [0, 1]).x0, pipe.predict(x, torch.tensor([3, 800]), [0, 1]).x0)


def test_fractions_and_a_gradient_in_t():
    pipe, x, t = pipeline(), randn(2, 1, 8, 8), torch.tensor(500.5, requires_grad=True)
    found = pipe.predict(x, t, 1).x0
    assert torch.equal(found, pipe.predict(x, 500.5, [1, 1]).x0)
    assert torch.autograd.grad(found.sum(), t)[0].abs() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [500, 500.5])
def test_the_fields_are_like_x(dtype, t):
    found = pipeline().predict(randn(2, 1, 8, 8, dtype=dtype), t, [0, 1])
    for value in (found.eps, found.x0, found.log_var):
        assert value.shape == (2, 1, 8, 8) and value.dtype == dtype and value.isfinite().all()


# Through the pipeline


def test_prediction_is_the_network_s_output():
    pipe, x, t = pipeline(), randn(2, 1, 8, 8), torch.tensor([3, 800])
    found, out = pipe.predict(x, t, [0, 3]), pipe.net(x, t, torch.tensor([0, 3]))
    # The network and its input are the same; only the order of sums may differ.
    torch.testing.assert_close(found.eps, out[:, :1], rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in pipe.net.parameters())
    torch.testing.assert_close(pipe.predict(x, t, torch.tensor([0, 3])).eps, found.eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [0, 500, 999, 500.25], ids=str)
def test_gradcheck(t):
    pipe = pipeline()
    pipe.net.double()
    x = randn(1, 1, 4, 4, dtype=torch.float64).requires_grad_(True)

    def fields(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p = pipe.predict(x, t, [1])
        # x_0 divides by sqrt(alpha_bar), 0.006 at the end. Scaled back, one step size suits all outputs.
        return p.eps, p.x0 * float(pipe.process().schedule.sqrt_alphas_cumprod[int(t)]), p.log_var

    assert torch.autograd.gradcheck(fields, (x,), fast_mode=True)


def test_gradients_reach_x_alone_twice_and_through_torch_func():
    pipe, x = pipeline(), randn(2, 1, 8, 8).requires_grad_(True)
    loss = pipe.predict(x, 400, [0, 1]).x0.square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    by_func = torch.func.grad(lambda x: pipe.predict(x, 400, [0, 1]).x0.square().sum())(x.detach())
    scale = first.abs().max()
    assert (first - second).abs().max() <= 1e-4 * scale and (first - by_func).abs().max() <= 1e-4 * scale
    assert all(p.grad is None and not p.requires_grad for p in pipe.net.parameters())


def test_a_table_made_under_inference_mode_serves_gradients_later():
    pipe, x = pipeline(), randn(1, 1, 8, 8)
    with torch.inference_mode():
        pipe.predict(x, 400.5, [0])
        pipe.predict(x, 400, [0])
    for t in (400.5, 400):
        y = x.clone().requires_grad_(True)
        assert torch.autograd.grad(pipe.predict(y, t, [0]).x0.sum(), y)[0].abs().max() > 0


def test_an_upsampler_predicts_with_its_low_resolution_image():
    pipe = Pipeline("up", upsampler(), PROCESS)
    x, low_res = randn(2, 1, 16, 16), randn(2, 1, 8, 8).requires_grad_(True)
    found = pipe.predict(x, 10, [0, 1], low_res=low_res)
    assert torch.autograd.grad(found.x0.sum(), low_res)[0].abs().max() > 0


@pytest.mark.parametrize("one", [[1], (1,), np.array([1]), torch.tensor([1]), torch.tensor(1), 1], ids=repr)
def test_one_class_serves_the_batch(one):
    pipe, x = pipeline(), randn(3, 1, 8, 8)
    assert torch.equal(pipe.predict(x, 5, one).eps, pipe.predict(x, 5, [1, 1, 1]).eps)
    images = pipe.sample(one, noise=x, steps=2)
    assert torch.equal(images, pipe.sample([1, 1, 1], noise=x, steps=2)) and len(images) == 3


# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t": -1}, "t=-1: "),
        ({"t": 999.5}, "t=999.5: "),
        ({"t": float("nan")}, "t=nan: "),
        ({"t": "7"}, "t='7': "),
        ({"t": None}, "t=None: "),
        ({"t": torch.tensor([3, 1000])}, r"t=\[3, 1000\]: 0 to 999"),
        ({"t": torch.tensor([3.0, float("nan")])}, r"t=\[3.0, nan\]: 0 to 999"),
        ({"t": torch.tensor([3] * 3)}, r"t.shape=\(3,\): a number, \[1\] or \[2\]"),
        ({"t": [3, 4, 5]}, r"t.shape=\(3,\): "),
        ({"t": [[3, 4]]}, r"t=\[3, 4\]: "),
        ({"t": torch.tensor(1000)}, "t=1000: "),
        ({"t": torch.tensor(True)}, "t.dtype=torch.bool: "),
        ({"t": [True, False]}, "t=True: "),
        ({"classes": None}, "classes=None: this network needs one of 0 to 3 for each image"),
        ({"classes": [0, CLASSES]}, "classes=4: a whole number from 0 to 3"),
        ({"classes": [0, -1]}, "classes=-1: a whole number from 0 to 3"),
        ({"classes": [0, 1, 0]}, r"classes=\[0, 1, 0\]: .*2 images"),
        ({"classes": [[0]]}, r"classes=\[0\]: "),
        ({"classes": [0, 0.5]}, "classes=0.5: a whole number from 0 to 3"),
        ({"classes": torch.tensor([0.0, 1.0])}, "classes=0.0: a whole number from 0 to 3"),
        ({"classes": "01"}, "classes='01': a whole number from 0 to 3"),
        ({"x_t": X.numpy()}, "x_t='ndarray': a tensor of floats"),
        ({"x_t": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "x_t.dtype=torch.uint8"),
        ({"x_t": randn(2, 3, 8, 8)}, r"x.shape=\(2, 3, 8, 8\): \[N, 1, ...\]"),
        ({"low_res": randn(2, 1, 4, 4)}, r"low_res.shape=\(2, 1, 4, 4\): "),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"x_t": randn(2, 1, 8, 8), "t": 5, "classes": [0, 1], **changes}
    with pytest.raises(InvalidArgument, match=f"^{message}") as caught:
        pipeline().predict(**arguments)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_network_is_named():
    x = randn(2, 1, 8, 8)
    unconditional = pipeline(net=unet(num_classes=None), classifier=None, guidance=0.0)
    with pytest.raises(InvalidArgument, match=r"^classes=\[0, 1\]: "):
        unconditional.predict(x, 5, [0, 1])
    guided = pipeline(net=unet(num_classes=None), classifier=classifier())
    with pytest.raises(InvalidArgument, match=r"^classes=\[0, 1\]: "):
        guided.predict(x, 5, [0, 1])
    up = Pipeline("up", upsampler(), PROCESS)
    with pytest.raises(InvalidArgument, match="low_res=None: upsamplers need it"):
        up.predict(randn(2, 1, 16, 16), 5, [0, 1])
    with pytest.raises(InvalidArgument, match=r"low_res.shape=\(1, 1, 8, 8\): \(2, 1, h, w\)"):
        up.predict(randn(2, 1, 16, 16), 5, [0, 1], low_res=x[:1])
    with pytest.raises(InvalidArgument, match="^low_res="):
        up.predict(randn(2, 1, 16, 16), 5, [0, 1], low_res=torch.linspace(0, 255, 128).view(2, 1, 8, 8))
    predict, network = predictor(MeanType.PREVIOUS_X, VarType.LEARNED)
    with pytest.raises(InvalidArgument, match="t='float': whole timesteps"):
        predict(network, X, 3.5)
