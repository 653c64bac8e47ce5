"""Tests of guidance by networks: the null class, a weak network, and the classifier at some of the rows."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from admfast import guides
from admfast.checkpoints import write_weights
from admfast.diffusion import DiffusionConfig
from admfast.engine.guidance import classifier_guidance
from admfast.engine.options import EngineOptions
from admfast.errors import InvalidArgument
from admfast.models.description import Description
from admfast.ops.update import as_seeds
from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import plan
from admfast.sampling.request import SampleRequest
from admfast.solvers import make_solver
from tests.parity.golden import NETWORK_OUTPUT_LIMIT
from tests.small import (
    CLASSES,
    PROCESS,
    SIDE,
    assert_close,
    pipeline,
    randn,
    run_table,
    unet,
    upsampler,
    write,
)

LABELS, SEEDS, STEPS = [2, 1], [3, 5], 6
X_T = randn(2, 1, SIDE, SIDE)
SOLVERS = ["ddpm", "ddim", "dpmpp"]


def guided(**parts) -> Pipeline:
    """Return a pipeline with a null class and a weak network of another width."""
    return pipeline(**{"null_class": True, "weak": unet(7, model_channels=64), **parts})


def images(pipe: Pipeline, *given: guides.NetworkGuide, **settings) -> Tensor:
    settings = {"seeds": SEEDS, "steps": STEPS, "noise": X_T, "output": "float", "guides": given, **settings}
    return pipe.sample(LABELS, **settings)


def by_hand(solver: str, model, guidance=None, x_t: Tensor = X_T) -> Tensor:
    """Return the images of the rows of a solver by plain functions."""
    solver = make_solver(solver)
    table = solver.table(PROCESS.build(solver.respacing_for(STEPS, None)), True)
    return run_table(table, model, x_t, guidance=guidance, seeds=as_seeds(SEEDS)).x


def called(net: torch.nn.Module, run) -> int:
    """Return how often a network is called by `run`, whose rows then run as plain Python."""
    calls = []
    hook = net.register_forward_pre_hook(lambda *_: calls.append(None))
    run()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("null, weak", [(1.25, 1.0), (1.0, 1.25), (1.25, 1.25), (0.75, 0.75)])
def test_differences_of_outputs_are_added_to_the_mean_and_not_to_the_variance(null, weak, solver):
    pipe = guided()
    labels, null_labels = torch.tensor(LABELS), torch.full((2,), CLASSES - 1)

    def model(error: float, x: Tensor, t: Tensor) -> Tensor:
        out, out_null, out_weak = (
            o + error * o.abs().max() * randn(*o.shape, seed=seed)
            for seed, o in enumerate(
                (pipe.net(x, t, y=labels), pipe.net(x, t, y=null_labels), pipe.weak(x, t, y=labels))
            )
        )
        mean = out + (null - 1) * (out - out_null) + (weak - 1) * (out - out_weak)
        return torch.cat([mean[:, :1], out[:, 1:]], dim=1)

    found = images(pipe, guides.by_null_class(null), guides.by_weak_network(weak), solver=solver)
    wanted = by_hand(solver, functools.partial(model, 0.0))
    # Differences of outputs amplify their roundings: so far an output at the limit of a network takes images.
    limit = (by_hand(solver, functools.partial(model, NETWORK_OUTPUT_LIMIT)) - wanted).abs().max()
    assert (found - wanted).abs().max() <= limit < 0.01
    assert (found - images(pipe, solver=solver, guidance=0)).abs().max() > 0.01


def test_rows_of_every_kind_are_those_of_plain_functions():
    given = [
        guides.by_classifier([1.0, 4.0], (200, 900), every=2, reuse=True),
        guides.by_null_class(2.0, (0, 600)),
        guides.by_weak_network([1.0, 3.0]),
    ]
    settings = {"steps": 20, "output": "float"}
    found = images(guided(), *given, **settings)
    for options in (EngineOptions(prepared=False), EngineOptions(graph=False)):
        assert_close(found, images(guided(options=options), *given, **settings))
    # A row of each kind runs its own operations, so a repeated row gives the bits of the first ones.
    assert torch.equal(found, images(guided(options=EngineOptions(graph=False)), *given, **settings))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_is_used_again(solver):
    pipe = guided()
    own = classifier_guidance(pipe.classifier, torch.tensor(LABELS), 3.0)
    kept: list[Tensor] = []

    def every_third(x: Tensor, t: Tensor) -> Tensor:
        if len(kept) % 3 == 0:
            kept.append(own(x, t))
        else:
            kept.append(kept[-1])
        return kept[-1]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return pipe.net(x, t, y=torch.tensor(LABELS))

    found = images(pipe, guides.by_classifier(3.0, every=3, reuse=True), solver=solver)
    assert_close(found, by_hand(solver, model, every_third))
    assert (found - images(pipe, guides.by_classifier(3.0), solver=solver)).abs().max() > 0.001


@pytest.mark.parametrize(
    "guide, rows",
    [
        (guides.by_classifier(2.0), 10),
        (guides.by_classifier(0.0), 0),
        (guides.by_classifier(2.0, every=3), 4),
        (guides.by_classifier(2.0, every=3, reuse=True), 4),
        (guides.by_classifier(2.0, count=4), 4),
        (guides.by_classifier(2.0, count=99), 10),
        (guides.by_classifier([2.0] * 3 + [0.0] * 7), 3),
        (guides.by_classifier(2.0, (500, 999)), 5),
    ],
)
def test_the_classifier_runs_only_where_it_counts(guide, rows):
    pipe = guided()
    assert called(pipe.classifier, lambda: images(pipe, guide, steps=10)) == rows
    images(pipe, guide, steps=10)
    assert pipe.last_run.stages[0].guided_rows == rows


@pytest.mark.parametrize("interval, rows", [(None, 10), ((500, 999), 5)])
def test_a_second_output_is_computed_only_where_it_counts(interval, rows):
    pipe = guided()
    null, weak = guides.by_null_class(2.0, interval), guides.by_weak_network(2.0, interval)
    assert called(pipe.net, lambda: images(pipe, null, steps=10)) == 10 + rows
    assert called(pipe.weak, lambda: images(pipe, weak, steps=10)) == rows
    neutral = guides.by_null_class(1.0), guides.by_weak_network(1.0)
    assert called(pipe.net, lambda: images(pipe, *neutral, steps=10)) == 10
    assert torch.equal(images(pipe, *neutral), images(pipe, guidance=0))
    images(pipe, null, weak, steps=10)
    stage = pipe.last_run.stages[0]
    assert (stage.null_class_rows, stage.weak_network_rows, stage.reused_rows) == (rows, rows, 0)
    images(pipe, null, steps=10)
    stage = pipe.last_run.stages[0]
    assert (stage.null_class_rows, stage.weak_network_rows) == (rows, 0)


@pytest.mark.parametrize("interval", [(1000, 2000), (-5, -1)])
def test_an_interval_without_timesteps_is_refused(interval):
    pipe = guided()
    for name, settings in (
        ("guidance_interval", {"guidance": 2.0, "guidance_interval": interval}),
        ("interval", {"guides": guides.by_weak_network(2.0, interval)}),
        ("interval", {"guides": guides.by_x(lambda x, t: x, interval)}),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}="):
            pipe.check(**settings)
    pipe.check(guides=guides.by_weak_network(2.0, (999, 2000)))


def test_a_row_without_a_place_for_the_gradient_does_not_compute_it():
    table = make_solver("ddim").table(PROCESS.build("ddim4"), True)
    rows = [dataclasses.replace(row, k_post=0.0) if i == 1 else row for i, row in enumerate(table.rows)]
    found = guides.guidance_by_row(SampleRequest(guidance=2.0), 0.0, rows, [750, 500, 250, 0])
    assert [row.scale for row in found] == [2.0, 0.0, 2.0, 2.0]


def test_several_scales_are_spread_over_the_rows():
    assert guides.spread((1.0, 3.0), 5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guides.spread((1.0, 5.0, 2.0), 3) == [1.0, 5.0, 2.0]
    assert guides.spread(2.0, 3) == [2.0] * 3 and guides.spread((2.0,), 3) == [2.0] * 3
    with pytest.raises(InvalidArgument, match="^guidance="):
        guides.spread((2.0, 4.0), 1)
    pipe = guided()
    one_for_each = images(pipe, guides.by_classifier(np.linspace(0, 5, STEPS)))
    assert_close(one_for_each, images(pipe, guidance=[0, 5]))
    assert (one_for_each - images(pipe, guidance=5)).abs().max() > 0.01


def test_scales_stay_with_their_steps_where_a_call_begins_midway():
    pipe, seen = guided(), []
    scales = [float(i) for i in range(1, 11)]
    begin = {"noise": None, "x_start": X_T.clamp(-1, 1), "t_start": 500, "steps": 10}
    settings = SampleRequest(LABELS, SEEDS, **begin, guidance=scales)
    seen = [row.scale for row in plan(settings, pipe).guidance]
    assert seen == scales[-len(seen) :] and 0 < len(seen) < 10


@pytest.mark.parametrize("change", ["in place", "through data"])
def test_changed_weights_of_the_weak_network_are_noticed(change):
    pipe, weak = guided(), guides.by_weak_network(2.0)
    before = images(pipe, weak, steps=5)
    parameter = pipe.weak.input_blocks[0][0].weight
    if change == "in place":
        with torch.no_grad():
            parameter.mul_(1.5)
    else:
        parameter.data.mul_(1.5)
    after = images(pipe, weak, steps=5)
    fresh = guided(weak=copy.deepcopy(pipe.weak))
    assert torch.equal(after, images(fresh, weak, steps=5)) and not torch.equal(after, before)
    assert pipe.weak.is_folded


def test_refresh_reaches_the_weak_network(monkeypatch):
    pipe, refolded = guided(), []
    for name in ("net", "classifier", "weak"):
        monkeypatch.setattr(getattr(pipe, name), "refold", lambda name=name: refolded.append(name))
    pipe.refresh()
    assert refolded == ["net", "classifier", "weak"]


def test_the_inverse_of_ddim_has_no_default_guidance():
    request = SampleRequest(x_start=X_T.clamp(-1, 1), solver="ddim-inverse", output="float")
    assert guides.requested_scale(request, 2.0) == 0
    assert guides.requested_scale(SampleRequest(), 2.0) == 2.0


def test_a_weak_network_of_another_process_is_refused(tmp_path):
    net, weak = write(tmp_path / "net.safetensors", unet()), tmp_path / "weak.safetensors"
    for changes in ({"predict_xstart": True}, {"noise_schedule": "cosine"}, {"steps": 50}):
        settings = {"noise_schedule": "linear", "steps": 100, "learn_sigma": True, **changes}
        other = unet(7)
        write_weights(weak, other.state_dict(), Description(other.config, DiffusionConfig(**settings)))
        with pytest.raises(InvalidArgument, match="^weak="):
            load(net, weak=weak, device="cpu", precision="fp32")
    pipe = load(net, weak=write(weak, unet(7)), device="cpu", precision="fp32")
    assert torch.isfinite(images(pipe, guides.by_weak_network(2.0))).all()
    with pytest.raises(InvalidArgument, match="^weak_options="):
        load(net, weak_options={"entry": "ema"}, device="cpu")


def test_more_of_the_gradients_are_computed_early():
    rows = guides.by_classifier(1.0, count=5).computed_rows(range(100))
    assert sorted(rows) == [0, 4, 16, 36, 64]
    assert sorted(guides.by_classifier(1.0, count=50).computed_rows(range(250)))[:4] == [0, 1, 2, 3]
    assert len(guides.by_classifier(1.0, count=50).computed_rows(range(250))) == 50


def test_a_weak_network_without_classes_gets_no_labels():
    weak = unet(7, num_classes=None)
    found = images(pipeline(weak=weak), guides.by_weak_network(2.0))
    pipe = pipeline()

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = pipe.net(x, t, y=torch.tensor(LABELS))
        return torch.cat([2 * out[:, :1] - weak(x, t)[:, :1], out[:, 1:]], dim=1)

    assert_close(found, by_hand("ddpm", model))


def test_the_null_class_of_an_upsampler_has_the_same_small_images():
    net, solver = upsampler(), "ddim"
    pipe = Pipeline("small-up", net, PROCESS, low_res_size=SIDE, null_class=True)
    x_t, low_res = randn(2, 1, 2 * SIDE, 2 * SIDE), randn(2, 1, SIDE, SIDE, seed=1).clamp(-1, 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        out, null = (
            net(x, t, low_res=low_res, y=y) for y in (torch.tensor(LABELS), torch.full((2,), CLASSES - 1))
        )
        return torch.cat([2 * out[:, :1] - null[:, :1], out[:, 1:]], dim=1)

    found = images(pipe, guides.by_null_class(2.0), solver=solver, noise=x_t, low_res=low_res)
    assert_close(found, by_hand(solver, model, x_t=x_t))


def test_a_guided_prediction_is_that_of_the_mixed_output():
    seen: list[Tensor] = []

    def noting(x_t: Tensor, t: Tensor, prediction) -> Tensor:
        seen.extend([t, prediction.eps.detach().clone()])
        return torch.zeros_like(x_t)

    pipe = guided()
    images(pipe, guides.by_null_class(3.0), guides.by_prediction(noting), steps=1)
    labels, null_labels = torch.tensor(LABELS), torch.full((2,), CLASSES - 1)
    out, null = (pipe.net(X_T, seen[0], y=y)[:, :1] for y in (labels, null_labels))
    assert_close(seen[1], 3 * out - 2 * null)


def test_a_request_with_guides_by_networks_is_json():
    given = [guides.by_classifier([1, 2], (0, 500), every=2, reuse=True), guides.by_null_class(2)]
    request = SampleRequest(LABELS, SEEDS, guides=given, steps=3)
    assert SampleRequest.from_json(request.to_json()) == request
    with pytest.raises(InvalidArgument, match="^guides="):
        SampleRequest.from_json('{"guides": [{"network": "classifier", "scale": 1}]}')


@pytest.mark.parametrize(
    "parts, given, argument",
    [
        ({"null_class": False}, [guides.by_null_class(2.0)], "guides='null class': "),
        ({"weak": None}, [guides.by_weak_network(2.0)], "guides='weak network': "),
        ({"classifier": None}, [guides.by_classifier(2.0)], "guidance=2.0: small has no classifier"),
        ({}, [guides.by_null_class(2.0)] * 2, "guides="),
        ({}, [guides.by_null_class(3.0), guides.by_weak_network(-1.0)], "guides="),
    ],
)
def test_what_a_pipeline_lacks_is_named(parts, given, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}"):
        images(guided(**parts), *given)


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: guides.by_null_class([]), r"guidance_scale=\[\]"),
        (lambda: guides.by_classifier([1, "2"]), "guidance_scale='2'"),
        (lambda: guides.by_classifier(1.0, every=0), "every=0"),
        (lambda: guides.by_classifier(1.0, every=2, count=3), "every=2"),
        (lambda: guides.by_classifier(1.0, count=0), "count=0"),
        (lambda: guides.by_classifier(1.0, reuse=True), "reuse=True"),
        (lambda: guides.NetworkGuide("null class", 2.0, every=3), "network='null class'"),
        (lambda: guides.NetworkGuide("net", 1.0), "network='net'"),
        (lambda: pipeline(weak=unet(7, in_channels=3, out_channels=6)), "weak='3 channels"),
        (lambda: pipeline(weak=torch.nn.Linear(2, 2)), "weak='Linear'"),
        (lambda: pipeline(weak=unet(7, out_channels=1)), "weak='unet of 1 outputs'"),
        (lambda: pipeline(weak=unet(7, num_classes=9)), "weak='9 classes'"),
        (lambda: pipeline(net=unet(num_classes=None), null_class=True), "null_class=True"),
    ],
)
def test_wrong_values_are_named(make, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}"):
        make()
