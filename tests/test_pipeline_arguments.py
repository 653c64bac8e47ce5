"""Every wrong argument of `Pipeline.sample`: one line with its name, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig
from admfast.engine.asking import Asked
from admfast.errors import InvalidArgument
from admfast.pipeline import Pipeline
from tests.small import PROCESS, cascade, classifier, pipeline, randn, unet, upsampler

IMAGE = randn(1, 1, 8, 8)
BAD = [
    # classes and seeds
    ({"classes": 4}, "classes=4: a whole number from 0 to 3"),
    ({"classes": [0, -1]}, "classes=-1: a whole number from 0 to 3"),
    ({"classes": 1.5}, "classes=1.5: a whole number from 0 to 3"),
    ({"classes": [True]}, "classes=True: a whole number from 0 to 3"),
    ({"classes": []}, r"classes=\[\]: at least one class"),
    ({"classes": "0-3"}, "classes='0-3': a whole number from 0 to 3"),
    ({"classes": [None]}, "classes=None: a whole number from 0 to 3"),
    ({"classes": [[0, 1]]}, r"classes=\[0, 1\]: a whole number from 0 to 3"),
    ({"seeds": -1}, "seeds=-1: a whole number from 0 to 18446744073709551615"),
    ({"seeds": [2**64]}, "seeds=18446744073709551616: a whole number from 0 to 18446744073709551615"),
    ({"seeds": 0.5}, "seeds=0.5: a whole number"),
    ({"seeds": "7"}, "seeds='7': a whole number"),
    ({"seeds": []}, r"seeds=\[\]: at least one seed"),
    # steps
    ({"steps": 0}, "steps=0: a whole number from 1 to 1000"),
    ({"steps": 1001}, "steps=1001: a whole number from 1 to 1000"),
    ({"steps": 2.0}, "steps=2.0: a whole number from 1 to 1000"),
    ({"steps": True}, "steps=True: a whole number from 1 to 1000"),
    ({"steps": 4, "respacing": "4"}, "steps=4: not together with respacing"),
    ({"respacing": "dim25"}, "respacing='dim25': a count such as '250'.* nearest: ddim25"),
    ({"respacing": "ddim0"}, "respacing='ddim0': ddimN with N from 1 to 1000"),
    ({"respacing": "0"}, "respacing='0': at least one step"),
    ({"respacing": []}, r"respacing=\[\]: at least one timestep"),
    ({"respacing": [0, 1000]}, "respacing timestep=1000: a whole number from 0 to 999"),
    ({"respacing": 2.5}, "respacing=2.5: a whole number from 0 to 1000"),
    ({"upsampler_steps": 3}, "upsampler_steps=3: small has no upsampler"),
    # the solver
    ({"solver": "ddin"}, "solver='ddin': nearest: ddim"),
    ({"solver": "euler_ancestral"}, "solver='euler_ancestral': one of: ddpm, ddim, ddim-inverse"),
    ({"solver": None}, "solver=None: one of: ddpm, ddim, ddim-inverse"),
    ({"solver": ["ddim"]}, r"solver=\['ddim'\]"),
    ({"eta": 0.5}, "eta=0.5: the solver ddpm has no such option"),
    ({"solver": "ddim", "eta": 1.5}, "eta=1.5: 0 to 1"),
    ({"solver": "ddim", "eta": float("nan")}, "eta=nan: a finite number"),
    ({"solver": "ddim", "eta": "0"}, "eta='0': a finite number"),
    ({"clip": "no"}, "clip='no': True or False"),
    ({"impl": 3}, "impl=3: the name of an implementation, or None"),
    ({"impl": "fused"}, "impl='fused': no implementation of normal is called 'fused'"),
    # guidance and other functions
    ({"guidance": float("inf")}, "guidance=inf: a finite number"),
    ({"guidance": "2"}, "guidance='2': a finite number"),
    ({"guidance": 1.0, "guidance_fn": lambda x, t: x}, "guidance=1.0: not together with guidance_fn"),
    ({"guidance_fn": 3}, "guidance_fn=3: a function, or None"),
    ({"guidance_fn": lambda x, t: x[:, :, 0]}, r"guidance\(x, t\).shape=\(1, 1, 8\): \(1, 1, 8, 8\)"),
    ({"guidance_fn": lambda x, t: None}, r"guidance\(x, t\)='NoneType': a tensor of floats"),
    ({"guidance_fn": lambda x, t: x.numpy()}, r"guidance\(x, t\)='ndarray': a tensor of floats"),
    ({"denoised_fn": lambda x0: None}, r"denoised_fn\(x_0\)='NoneType': a tensor of floats"),
    ({"denoised_fn": lambda x0: x0.numpy()}, r"denoised_fn\(x_0\)='ndarray': a tensor of floats"),
    ({"denoised_fn": 0.5}, "denoised_fn=0.5: a function, or None"),
    ({"denoised_fn": lambda x0: x0[..., 0]}, r"denoised_fn\(x_0\).shape=\(1, 1, 8\): \(1, 1, 8, 8\)"),
    ({"callback": "print"}, "callback='print': a function, or None"),
    ({"every": 0}, "every=0: a whole number"),
    ({"every": 1.5}, "every=1.5: a whole number"),
    # images
    ({"noise": randn(1, 1, 0, 8)}, r"noise.shape=\(1, 1, 0, 8\): at least one image, and no side empty"),
    ({"solver": "ddim-inverse"}, "x_start=None: ddim-inverse takes images apart: give them"),
    (
        {"solver": "ddim-inverse", "x_start": IMAGE, "noise": IMAGE},
        "x_start='given together with noise': ddim-inverse takes images apart",
    ),
    ({"solver": "ddim-inverse", "x_start": IMAGE, "t_start": 5}, "t_start=5: not for ddim-inverse"),
    ({"noise": randn(1, 3, 8, 8)}, r"noise.shape=\(1, 3, 8, 8\): \(1, 1, 8, 8\)"),
    ({"noise": IMAGE, "seeds": [0, 1]}, r"noise.shape=\(1, 1, 8, 8\): \(2, 1, 8, 8\)"),
    ({"noise": IMAGE.numpy()}, "noise='ndarray': a tensor of floats"),
    ({"noise": IMAGE.to(torch.uint8)}, "noise.dtype=torch.uint8"),
    ({"step_noise": randn(3, 1, 1, 8, 8)}, r"step_noise.shape=\(3, 1, 1, 8, 8\): \(4, 1, 1, 8, 8\)"),
    ({"step_noise": [IMAGE] * 4}, "step_noise='list': a tensor of floats"),
    ({"low_res": IMAGE}, "low_res='given': upsamplers need it and no other network takes it"),
    ({"x_start": IMAGE}, r"x_start, t_start=\(True, None\): give both or neither"),
    ({"t_start": 5}, r"x_start, t_start=\(False, 5\): give both or neither"),
    ({"x_start": IMAGE, "t_start": 1000}, "t_start=1000: a whole number from 0 to 999"),
    ({"x_start": IMAGE, "t_start": -1}, "t_start=-1: a whole number from 0 to 999"),
    ({"x_start": IMAGE, "t_start": 0.5}, "t_start=0.5: a whole number from 0 to 999"),
    (
        {"x_start": IMAGE, "t_start": 5, "respacing": [10, 20]},
        "t_start=5: 10 or more, the first step of this respacing",
    ),
    (
        {"x_start": IMAGE[..., :4], "t_start": 5, "noise": IMAGE},
        r"x_start.shape=\(1, 1, 8, 4\): \(1, 1, 8, 8\)",
    ),
    ({"x_start": IMAGE.long(), "t_start": 5}, "x_start.dtype=torch.int64"),
    ({"noise": IMAGE[..., :7]}, r"x.shape=\(1, 1, 8, 7\): sides that 2 divides"),
    # what comes out
    ({"batch_size": 0}, "batch_size=0: a whole number"),
    ({"batch_size": 1.5}, "batch_size=1.5: a whole number"),
    ({"output": "pil"}, "output='pil'"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message[:40] for _, message in BAD])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InvalidArgument, match=f"^{message}") as caught:
        pipeline().sample(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, message", BAD, ids=[message[:40] for _, message in BAD])
def test_what_can_be_known_before_is_found_without_sampling(arguments, message, monkeypatch):
    if message.startswith((r"guidance\(", r"denoised_fn\(", r"x.shape")):
        pytest.skip("shows only when the function or the network is called")
    monkeypatch.setattr("admfast.pipeline.sample_batch", None)
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        pipeline().check(**arguments)


def test_the_environment_s_implementations_are_checked_before(monkeypatch):
    monkeypatch.setenv("ADMFAST_IMPL", "sampler_step=nvcc")
    with pytest.raises(InvalidArgument, match="ADMFAST_IMPL='sampler_step=nvcc': no implementation of"):
        pipeline().check()


def test_a_check_counts_the_steps():
    assert pipeline().check([0], [1], steps=3) == {"base": 3}
    assert pipeline().check(x_start=IMAGE, t_start=500) == {"base": 2}
    assert cascade().check(respacing="2,3") == {"base": 5, "upsampler": 3}
    with pytest.raises(InvalidArgument, match="multiples of 3 pixels"):
        cascade(low_res_size=3).check()
    with pytest.raises(InvalidArgument, match="stepz=3: sample has no such argument; nearest: steps"):
        pipeline().check(stepz=3)


def test_a_check_takes_what_sample_takes():
    names = list(inspect.signature(Pipeline.sample).parameters.values())[1:]
    fields = dataclasses.fields(Asked)
    assert [(p.name, p.default) for p in names] == [(f.name, f.default) for f in fields]


def test_the_inverse_begins_from_the_image_and_has_no_guidance_of_its_own():
    pipe = pipeline()
    given = {"solver": "ddim-inverse", "output": "float"}
    from_image = pipe.sample(0, 1, x_start=IMAGE, **given)
    assert torch.equal(from_image, pipe.sample(0, 1, noise=IMAGE, guidance=0, **given))
    assert not torch.equal(from_image, pipe.sample(0, 1, x_start=IMAGE, guidance=1, **given))
    with pytest.raises(InvalidArgument, match="solver='ddim-inverse': not for small: an upsampler follows"):
        cascade().sample(x_start=IMAGE, **given)


def test_functions_that_work_in_place_leave_the_state():
    pipe = pipeline(classifier=None, guidance=0.0)
    wanted = pipe.sample(0, 1, guidance_fn=lambda x, t: x * 2)
    assert torch.equal(pipe.sample(0, 1, guidance_fn=lambda x, t: x.mul_(2)), wanted)
    wanted = pipe.sample(0, 1, denoised_fn=lambda x0: x0 / 2)
    assert torch.equal(pipe.sample(0, 1, denoised_fn=lambda x0: x0.div_(2)), wanted)


def test_an_empty_batch_is_refused_by_predict():
    with pytest.raises(InvalidArgument, match=r"x_t.shape=\(0, 1, 8, 8\): at least one image"):
        pipeline().predict(IMAGE[:0], 5, [])
    with pytest.raises(InvalidArgument, match=r"low_res.shape=\(1, 1, 0, 0\): at least one image"):
        Pipeline("up", upsampler(), PROCESS).predict(randn(1, 1, 16, 16), 5, [0], randn(1, 1, 0, 0))


def test_a_pipeline_in_one_line():
    assert repr(cascade()) == (
        "Pipeline('small': unet of 8 pixels, 4 classes, classifier, guidance 1, upsampler to 16 pixels; "
        "float32 on cpu)"
    )


def test_wide_base_images_lose_no_column():
    pipe = cascade(low_res_size=4, classifier=None, guidance=0.0)
    assert pipe.sample(0, 1, noise=randn(1, 1, 8, 16), steps=1).shape == (1, 16, 32, 1)
    message = r"low_res=\(20, 36\): sides that are multiples of 4 pixels, and of 5"
    with pytest.raises(InvalidArgument, match=message):
        pipe.sample(0, 1, noise=randn(1, 1, 20, 36), steps=1)


def test_numbers_of_other_libraries_are_numbers():
    pipe = pipeline()
    wanted = pipe.sample([1, 2], [3, 4], steps=2, guidance=2.0, batch_size=2)
    found = pipe.sample(
        np.array([1, 2]),
        torch.tensor([3, 4]),
        steps=np.int64(2),
        guidance=np.float32(2.0),
        batch_size=np.int32(2),
    )
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert pipe.sample(np.int64(1), np.uint64(2**64 - 1), steps=1).shape == (1, 8, 8, 1)


def test_what_a_pipeline_without_classes_or_classifier_refuses():
    pipe = pipeline(net=unet(num_classes=None), classifier=None, guidance=0.0)
    with pytest.raises(InvalidArgument, match="^classes='given': small has no classes"):
        pipe.sample(0)
    with pytest.raises(InvalidArgument, match="^guidance=2.0: small has no classifier; 0 is none"):
        pipe.sample(guidance=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "low_res=None: upsamplers need it"),
        ({"low_res": randn(2, 1, 8, 8), "seeds": 0}, r"low_res.shape=\(2, 1, 8, 8\): \(1, 1, h, w\)"),
        ({"low_res": randn(1, 3, 8, 8)}, r"low_res.shape=\(1, 3, 8, 8\): \(1, 1, h, w\)"),
        ({"low_res": randn(1, 1, 8)}, r"low_res.shape=\(1, 1, 8\): \(1, 1, h, w\)"),
        (
            {"low_res": torch.zeros(1, 8, 8, 1, dtype=torch.uint8)},
            "low_res.dtype=torch.uint8",
        ),
        ({"low_res": IMAGE, "upsampler_steps": 2}, "upsampler_steps=2: up has no upsampler"),
    ],
)
def test_what_an_upsampler_refuses(arguments, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        Pipeline("up", upsampler(), PROCESS, steps=2).sample(**arguments)


@pytest.mark.parametrize("steps", [0, 1001, 0.5])
def test_steps_of_a_cascade_s_upsampler_are_called_so(steps):
    with pytest.raises(InvalidArgument, match=f"^upsampler_steps={steps}: a whole number from 1 to 1000"):
        cascade().sample(upsampler_steps=steps)


def test_base_images_must_be_multiples_of_what_the_upsampler_enlarges():
    with pytest.raises(InvalidArgument, match=r"^low_res=\(8, 8\): sides that are multiples of 3 pixels"):
        cascade(low_res_size=3).sample(steps=1)
    with pytest.raises(InvalidArgument, match=r"^low_res=\(8, 8\): sides that are multiples of 16 pixels"):
        cascade(low_res_size=16).sample(steps=1)


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            {"classifier": classifier(out_channels=5)},
            "classifier='5 classes': as the network: 4 classes",
        ),
        (
            {"classifier": classifier(in_channels=3)},
            "classifier='3 channels, 2-D': as the network: 1 channels, 2-D",
        ),
        (
            {"classifier": classifier(dims=1, pool="spatial")},
            "classifier='1 channels, 1-D': as the network: 1 channels, 2-D",
        ),
        (
            {"upsampler": Pipeline("up", upsampler(num_classes=9), PROCESS)},
            "upsampler='9 classes': as the network: 4 classes",
        ),
        (
            {"upsampler": Pipeline("up", upsampler(in_channels=3, out_channels=6), PROCESS)},
            "upsampler='3 channels, 2-D': as the network: 1 channels, 2-D",
        ),
        (
            {
                "net": unet(num_classes=None),
                "classifier": None,
                "guidance": 0.0,
                "upsampler": Pipeline("up", upsampler(), PROCESS),
            },
            "upsampler='4 classes': as the network: no classes",
        ),
        (
            {"diffusion": DiffusionConfig()},
            "diffusion='FIXED_LARGE': a process with learned variance, as the network",
        ),
        (
            {"net": unet(out_channels=1)},
            "diffusion='LEARNED_RANGE': a process without learned variance, as the network",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_when_they_are_put_together(parts, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        pipeline(**parts)
