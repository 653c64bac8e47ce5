"""Tests of the solver, spacing and scale that a number of steps or a quality chooses."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from admfast import guides
from admfast.errors import InvalidArgument
from admfast.sampling.auto import TABLES, resolve
from admfast.sampling.request import SampleRequest
from admfast.solvers import ddpm, parse_solver, unipc
from tests.small import pipeline


def resolved(name: str = "other", guidance: float = 1.0, **settings) -> SampleRequest:
    pipe = dataclasses.replace(pipeline(), name=name, guidance=guidance, steps=250)
    return resolve(SampleRequest(**{"solver": "auto", **settings}), pipe)[0]


@pytest.mark.parametrize(
    "guidance, steps, solver, spacing",
    [
        (1.0, 10, "unipc", "uniform"),
        (1.0, 99, "unipc", "uniform"),
        (1.0, 100, "ddpm", None),
        (8.0, 10, "ddim", None),
        (8.0, 20, "dpmpp", "uniform"),
        (8.0, 250, "ddpm", None),
        (0.0, 5, "deis", "uniform"),
        (0.0, 10, "ipndm", "uniform"),
        (0.0, 20, "unipc:order=3", "uniform"),
    ],
)
def test_steps_and_scale_choose_the_solver(guidance, steps, solver, spacing):
    found = resolved(steps=steps, guidance=guidance)
    assert found.solver == parse_solver(solver) and found.spacing == spacing and found.steps == steps
    # The largest scale of any row counts.
    spread = resolved(steps=steps, guidance=0, guides=guides.by_classifier([0, guidance, 0]))
    assert spread.solver == found.solver


def test_every_entry_names_a_solver_and_its_source():
    for entries in TABLES.values():
        assert entries[-1].steps is None and all(entry.source for entry in entries)
        limits = [entry.steps for entry in entries[:-1]]
        assert limits == sorted(limits)
        for entry in entries:
            parse_solver(entry.solver)  # raises for a wrong one


def test_what_is_given_stays():
    found = resolved(steps=10, spacing="karras", guidance_interval=(0, 500))
    assert (found.solver, found.spacing, found.guidance_interval) == (unipc(), "karras", (0.0, 500.0))
    assert resolved(solver="ddpm", steps=10) == SampleRequest(solver="ddpm", steps=10)
    assert resolved(respacing="karras10").spacing is None


@pytest.mark.parametrize("quality, steps", [("draft", 10), ("good", 25), ("best", 250)])
def test_a_quality_is_a_number_of_steps(quality, steps):
    found = resolved(solver=None, quality=quality)
    assert found.steps == steps and found.quality is None
    assert found.solver == (ddpm() if steps == 250 else unipc())
    assert resolved(solver="ddpm", quality=quality).solver == ddpm()


def test_the_scale_of_the_256_model_grows_when_steps_fall():
    scales = [resolved("imagenet256", steps=steps).guidance for steps in (250, 100, 50, 25, 10)]
    assert scales == [None, 1.6, 2.05, 2.5, 2.5]
    assert resolved("imagenet512", steps=10).guidance is None
    pipe = dataclasses.replace(pipeline(), name="imagenet256")
    request = SampleRequest(solver="auto", steps=10, guidance=1.5)
    assert resolve(request, pipe)[0].guidance == 1.5


def test_sample_takes_them():
    pipe = pipeline()
    settings = {"seeds": [1, 2], "output": "float"}
    wanted = pipe.sample(**settings, steps=10, solver="unipc", spacing="uniform")
    assert torch.equal(pipe.sample(**settings, steps=10, solver="auto"), wanted)
    assert torch.equal(pipe.sample(**settings, quality="draft"), wanted)
    assert pipe.check(quality="good") == {"base": 25}
    request = SampleRequest(solver="auto", steps=10)
    assert SampleRequest.from_json(request.to_json()) == request


def test_order_3_at_a_high_scale_warns_and_names_the_cure():
    pipe = pipeline()
    with pytest.warns(UserWarning, match="order=2, or dynamic_threshold"):
        pipe.check(solver="dpmpp:order=3", steps=10, guidance=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.check(solver="dpmpp:order=3", steps=10, guidance=2)
        pipe.check(solver="dpmpp:order=2", steps=10, guidance=8)
        pipe.check(solver="dpmpp:order=3", steps=10, guidance=8, dynamic_threshold=0.995)


@pytest.mark.parametrize(
    "settings, argument",
    [
        ({"quality": "great"}, "quality='great'"),
        ({"quality": "draft", "steps": 10}, "steps=10"),
        ({"quality": "draft", "respacing": "10"}, "respacing='10'"),
        ({"solver": "auto", "eta": 0.5}, "eta=0.5"),
    ],
)
def test_wrong_settings_are_named(settings, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}"):
        SampleRequest(**settings)
