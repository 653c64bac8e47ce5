"""Tests of guides: three kinds that add up, each with its interval, from one evaluation of the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admfast import guides
from admfast.errors import InvalidArgument
from tests.small import assert_close, pipeline, randn

LABELS, SEEDS = [2, 1], [3, 5]
TARGET = torch.full((2, 1, 8, 8), 0.5)


def images(**settings) -> Tensor:
    return pipeline().sample(**{"classes": LABELS, "seeds": SEEDS, "output": "float", "steps": 6, **settings})


def towards_target(x_t: Tensor, t: Tensor, prediction) -> Tensor:
    return torch.autograd.grad(-(prediction.x0 - TARGET).square().sum(), x_t, retain_graph=True)[0]


def to_the_left(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.ones_like(x_t)


def test_the_classifier_as_a_guide_is_guidance():
    interval = (200, 800)
    by_guide = images(guides=guides.by_classifier(3.0, interval))
    assert torch.equal(by_guide, images(guidance=3.0, guidance_interval=interval))
    assert not torch.equal(by_guide, images(guidance=3.0))


def test_a_guide_of_x_is_guidance_fn():
    assert torch.equal(images(guides=guides.by_x(to_the_left)), images(guidance_fn=to_the_left))


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_guide_of_the_prediction_sees_what_predict_says(solver):
    pipe = pipeline()

    def by_predict(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_(True)
            x0 = pipe.predict(x, t, LABELS).x0
            return torch.autograd.grad(-(x0 - TARGET).square().sum(), x)[0]

    found = images(guides=guides.by_prediction(towards_target), solver=solver)
    assert_close(found, images(guidance_fn=by_predict, solver=solver))
    assert (found - images(guidance=0, solver=solver)).abs().max() > 0.01


def test_prediction_and_x_are_those_of_predict_at_every_step():
    pipe, seen = pipeline(), []

    def watch(x_t: Tensor, t: Tensor, prediction) -> Tensor:
        assert x_t.requires_grad and x_t.is_leaf and torch.is_grad_enabled()
        seen.append(
            (x_t.detach().clone(), t.clone(), *(getattr(prediction, n) for n in ("eps", "x0", "log_var")))
        )
        return torch.zeros_like(x_t)

    pipe.sample(LABELS, SEEDS, steps=3, guides=guides.by_prediction(watch))
    assert [int(t[0]) for _, t, *_ in seen] == [999, 500, 0]
    for x_t, t, *said in seen:
        wanted = pipe.predict(x_t, t, LABELS)
        for found, name in zip(said, ("eps", "x0", "log_var"), strict=True):
            assert found.requires_grad
            assert_close(found, getattr(wanted, name))


def test_the_network_is_evaluated_once_a_step_however_many_guides_see_it():
    pipe, calls = pipeline(), []
    pipe.net.register_forward_pre_hook(lambda *_: calls.append(None))
    several = [
        guides.by_prediction(towards_target),
        guides.by_x(to_the_left),
        guides.by_prediction(towards_target),
    ]
    pipe.sample(LABELS, SEEDS, steps=4, guides=several)
    assert len(calls) == 4


def test_guides_add_up():
    twice = guides.Guide(towards_target, sees_prediction=True, guidance_scale=2.0)
    one = guides.by_prediction(towards_target)
    assert_close(images(guides=[one, one]), images(guides=twice))
    left = images(guides=[one, guides.by_x(to_the_left)])
    assert (left - images(guides=one)).abs().max() > 0.01
    with_classifier = images(guides=[one, guides.by_classifier(2.0)])
    assert_close(with_classifier, images(guides=one, guidance=2.0))
    assert (with_classifier - images(guides=one)).abs().max() > 0.01


def by_backward(x_t: Tensor, t: Tensor, prediction) -> Tensor:
    (-(prediction.x0 - TARGET).square().sum()).backward()
    return x_t.grad


def without_keeping(x_t: Tensor, t: Tensor, prediction) -> Tensor:
    return torch.autograd.grad(-(prediction.x0 - TARGET).square().sum(), x_t)[0]


@pytest.mark.parametrize("function", [by_backward, without_keeping])
def test_guides_add_up_however_they_differentiate(function):
    one = guides.by_prediction(function)
    twice = guides.Guide(towards_target, sees_prediction=True, guidance_scale=2.0)
    assert_close(images(guides=[one, one]), images(guides=twice))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["x_t", "eps", "x0", "log_var"])
def test_a_guide_may_work_in_place(name, count):
    def spoiling(x_t: Tensor, t: Tensor, prediction) -> Tensor:
        with torch.no_grad():
            (x_t if name == "x_t" else getattr(prediction, name)).mul_(0)
        return torch.zeros_like(x_t)

    none = guides.by_prediction(lambda x_t, t, prediction: torch.zeros_like(x_t))
    assert torch.equal(images(guides=[guides.by_prediction(spoiling)] * count), images(guides=none))


def test_a_guide_is_told_which_images_it_gets():
    seen = []

    def noting(x_t: Tensor, t: Tensor, prediction) -> Tensor:
        seen.append((prediction.first, len(x_t)))
        return torch.zeros_like(x_t)

    images(classes=[0], seeds=range(5), batch_size=2, steps=1, guides=guides.by_prediction(noting))
    assert seen == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("scale", [1e300, float("nan"), "2"])
def test_a_scale_is_a_number_of_float32(scale):
    with pytest.raises(InvalidArgument, match="^guidance_scale="):
        guides.by_classifier(scale)


def test_what_is_no_guide_is_refused():
    with pytest.raises(InvalidArgument, match="^function="):
        guides.Guide(None, sees_prediction=True)
    with pytest.raises(InvalidArgument, match="^guidance_interval="):
        images(guides=guides.by_classifier(2.0), guidance_interval=(0, 1))


def test_each_guide_has_its_interval():
    seen: dict[str, list[int]] = {"high": [], "low": []}

    def noting(name: str, interval: tuple[float, float]) -> guides.Guide:
        return guides.by_x(lambda x, t: seen[name].append(int(t[0])) or 0 * x, interval)

    images(guides=[noting("high", (500, 999)), noting("low", (0, 400))], steps=10)
    kept = pipeline().process("10").schedule.timestep_map.tolist()
    assert seen["high"] == [t for t in reversed(kept) if 500 <= t]
    assert seen["low"] == [t for t in reversed(kept) if t <= 400]


def test_guides_without_guidance_stand_for_the_classifier():
    nothing = guides.by_x(lambda x, t: 0 * x)
    assert_close(images(guides=nothing), images(guidance=0))


def measured(respacing: str) -> guides.Guide:
    """Return a guide by a measurement of the whole image, for a respacing."""
    return guides.by_measurement(pipeline().process(respacing), lambda x: x, randn(1, 1, 8, 8))


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: guides.by_x(3), "function=3"),
        (lambda: guides.by_classifier("2"), "guidance_scale='2'"),
        (lambda: guides.by_classifier(1.0, (800, 200)), r"interval=\(800, 200\)"),
        (lambda: guides.by_x(print, (1, 2, 3)), r"interval=\(1, 2, 3\)"),
        (lambda: guides.by_x(print, "200,800"), "interval='200,800'"),
        (lambda: images(guides=guides.by_prediction(lambda x, t, p: p.x0[:1])), r"guidance\(x, t\).shape"),
        (lambda: images(guides=measured("6"), steps=5), "process="),
    ],
)
def test_wrong_guides_are_named(make, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}"):
        make()


def test_a_guide_leaves_no_gradients_behind():
    found = images(guides=guides.by_prediction(towards_target), noise=randn(2, 1, 8, 8))
    assert not found.requires_grad and found.isfinite().all()


def test_guides_by_prediction_see_the_timestep_of_a_churned_row():
    pipe, seen = pipeline(), []

    def compare(x_t, t, prediction):
        own = pipe.predict(x_t.detach(), t, 0)
        seen.append((float(t[0]), float((prediction.x0 - own.x0).abs().max() / own.x0.abs().max())))
        return torch.zeros_like(x_t)

    pipe.sample(0, [1], steps=5, solver="euler:churn=20", guides=guides.by_prediction(compare), guidance=0)
    assert any(t != int(t) for t, _ in seen)
    # Both take the same output of the network and its coefficients, rounded to float32.
    assert all(error < 1e-5 for _, error in seen), seen
