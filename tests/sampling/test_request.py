"""Tests of `SampleRequest`: its checks, the one form of every setting, and JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig
from admfast.engine.options import EngineOptions
from admfast.errors import InvalidArgument
from admfast.sampling import guides
from admfast.sampling.loop import run
from admfast.sampling.plan import plan, requested_images
from admfast.sampling.request import SampleRequest
from admfast.solvers import ddim
from tests.small import assert_close, cascade, pipeline, randn, unet

REQUESTS = [
    SampleRequest(),
    SampleRequest(3, range(5), steps=7, solver=ddim(eta=0.5), guidance=2.0, batch_size=2),
    SampleRequest([1, 2], [2**64 - 1], respacing="ddim25", clip=False, output="float", impl="reference"),
    SampleRequest(size=64, seeds=3),
    SampleRequest(
        respacing=[0, 10, 20], size=(64, 96), guidance_interval=(200, 800), upsampler_steps=4, every=3
    ),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_through_json_and_back(request_):
    text = request_.to_json()
    assert SampleRequest.from_json(text) == request_ and set(json.loads(text)) <= set(vars(request_))


@pytest.mark.parametrize(
    "given",
    [
        {"noise": randn(1, 1, 8, 8)},
        {"denoised_fn": torch.tanh},
        {"callback": print},
        {"guidance_fn": torch.add},
        {"guides": guides.by_x(torch.add)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_json_does_not_hold_is_named(given):
    with pytest.raises(InvalidArgument, match=f"^{next(iter(given))}="):
        SampleRequest(**given).to_json()


@pytest.mark.parametrize(
    "text, argument",
    [
        ('{"stepz": 3}', "stepz=3"),
        ('{"steps": 0}', "steps=0"),
        ("{", "text='{'"),
        ("[3]", r"text='\[3\]'"),
        ('{"cls": 1}', "cls=1"),
        (None, "text='None'"),
    ],
)
def test_wrong_json_is_named(text, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}: "):
        SampleRequest.from_json(text)


def test_every_setting_has_one_form():
    request = SampleRequest(np.array([1, 2]), iter([3, 4]), solver="ddim", eta=0.5, respacing=np.int64(4))
    assert (request.classes, request.seeds, request.respacing) == ((1, 2), (3, 4), 4)
    assert request.solver == ddim(eta=0.5) and request.eta is None
    assert dataclasses.replace(request, steps=3, respacing=None).seeds == (3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.steps = 3


def test_a_plan_is_cut_into_parts():
    pipe = cascade()
    request = SampleRequest(
        [0, 1, 2], [5, 6, 7], noise=randn(3, 1, 8, 8), step_noise=randn(4, 3, 1, 8, 8), output="float"
    )
    whole = plan(request, pipe)
    part = whole.part(1, 5)
    assert whole.part(0, 3) is whole and whole.steps == part.steps == {"base": 4, "upsampler": 3}
    assert (part.shape, part.seeds.tolist(), part.labels.tolist(), part.first) == (
        (2, 1, 8, 8),
        [6, 7],
        [1, 2],
        1,
    )
    assert torch.equal(part.noise, request.noise[1:]) and torch.equal(
        part.step_noise, request.step_noise[:, 1:]
    )
    assert part.upsampler_plan.seeds.tolist() == [6, 7] and part.upsampler_plan.first == 1
    # With another batch size sums are rounded in another order. The noise is the same.
    assert_close(run(part), run(whole)[1:])


def test_a_request_is_what_sample_runs():
    pipe = pipeline()
    assert torch.equal(run(plan(SampleRequest(1, [2, 3], steps=2), pipe)), pipe.sample(1, [2, 3], steps=2))


@pytest.mark.parametrize(
    "classes, seeds, planned",
    [
        (None, None, ([0], [0])),
        (None, [6, 2**63], ([6, 2**63], [2, 2**63 % 4])),
        ([3, 1], None, ([0, 1], [3, 1])),
        ([3, 1], [5, 6, 7], ([5, 6, 7], [3, 1, 3])),
    ],
)
def test_classes_and_seeds_of_every_image(classes, seeds, planned):
    keys, labels, shape = requested_images(SampleRequest(classes, seeds), pipeline())
    assert (list(keys), labels) == planned and shape == (len(keys), 1, 8, 8)
    plain = pipeline(net=unet(num_classes=None), classifier=None, guidance=0.0)
    assert requested_images(SampleRequest(seeds=seeds), plain)[1] is None


@pytest.mark.parametrize("three", [torch.tensor(3), np.array(3), np.int64(3)])
@pytest.mark.parametrize("name", ["steps", "upsampler_steps", "batch_size", "every", "respacing"])
def test_one_number_is_one_whatever_holds_it(name, three):
    found = getattr(SampleRequest(**{name: three}), name)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("half", [torch.tensor(0.5), np.array(0.5), np.float32(0.5)])
def test_a_fraction_is_one_whatever_holds_it(half):
    given = {"guidance": half, "solver": "ddim", "eta": half, "guidance_interval": (half, 800)}
    wanted = SampleRequest(guidance=0.5, solver=ddim(eta=0.5), guidance_interval=(0.5, 800))
    assert SampleRequest(**given) == wanted and SampleRequest(**given).to_json() == wanted.to_json()
    assert ddim(eta=half) == ddim(eta=0.5) and guides.by_classifier(half) == guides.by_classifier(0.5)
    pipe = dataclasses.replace(pipeline(), guidance=half, steps=torch.tensor(4))
    assert repr(pipe.guidance) == "0.5" and pipe.check() == {"base": 4}


@pytest.mark.parametrize(
    "make, given, plain",
    [
        (SampleRequest, {"size": torch.tensor([64, 96])}, {"size": (64, 96)}),
        (SampleRequest, {"size": np.int64(64)}, {"size": 64}),
        (SampleRequest, {"size": "36x48"}, {"size": (36, 48)}),
        (SampleRequest, {"size": " 8 X 12"}, {"size": (8, 12)}),
        (SampleRequest, {"size": "64"}, {"size": 64}),
        (SampleRequest, {"clip": np.bool_(False)}, {"clip": False}),
        (SampleRequest, {"clip": torch.tensor(True)}, {"clip": True}),
        (DiffusionConfig, {"use_kl": np.bool_(True)}, {"use_kl": True}),
        (EngineOptions, {"graph": np.array(False)}, {"graph": False}),
        (guides.Guide, {"function": torch.add, "sees_prediction": torch.tensor(True)},
         {"function": torch.add, "sees_prediction": True}),
        (SampleRequest, {"respacing": torch.tensor([10, 20])}, {"respacing": (10, 20)}),
        (SampleRequest, {"classes": torch.tensor(1), "seeds": [np.array(2)]}, {"classes": 1, "seeds": 2}),
        (DiffusionConfig, {"steps": torch.tensor(100)}, {"steps": 100}),
        (DiffusionConfig, {"respacing": torch.tensor(4)}, {"respacing": 4}),
        (DiffusionConfig, {"respacing": np.array([0, 4])}, {"respacing": (0, 4)}),
        (EngineOptions, {"rows_at_a_time": torch.tensor(5)}, {"rows_at_a_time": 5}),
    ],
)  # fmt: skip
def test_records_keep_plain_numbers(make, given, plain):
    found = make(**given)
    assert found == make(**plain) and repr(found) == repr(make(**plain))


def test_a_network_s_configuration_keeps_plain_numbers():
    plain = unet().config
    whole = {name: torch.tensor(getattr(plain, name)) for name in ("image_size", "model_channels", "dims")}
    given = whole | {"channel_mult": torch.tensor(plain.channel_mult), "dropout": np.array(0.0)}
    assert repr(dataclasses.replace(plain, **given)) == repr(plain)


def test_a_whole_number_that_no_float_holds_is_named():
    with pytest.raises(InvalidArgument, match="^guidance="):
        SampleRequest(guidance=10**400)


@pytest.mark.parametrize("size", ["", "x", "8x", "8,12", "-8", "8.0x8"])
def test_a_text_that_is_no_size_is_named(size):
    with pytest.raises(InvalidArgument, match="^size="):
        SampleRequest(size=size)


@pytest.mark.parametrize("name", ["x_start", "low_res"])
def test_levels_of_0_to_255_are_no_images_of_floats(name):
    """Levels from 0 to 255 as floats are refused; the same image in [-1, 1] is accepted."""
    levels = torch.arange(0, 256, 85.0).view(1, 1, 2, 2)
    more = {"t_start": 5} if name == "x_start" else {}
    with pytest.raises(InvalidArgument, match=f"^{name}=.*0 to 255"):
        SampleRequest(**{name: levels}, **more)
    images = levels / 127.5 - 1
    assert getattr(SampleRequest(**{name: images}, **more), name) is images
    if name == "x_start":  # without clipping x may be any quantity
        assert SampleRequest(x_start=levels, clip=False, **more).x_start is levels
