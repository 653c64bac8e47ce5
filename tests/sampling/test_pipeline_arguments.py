"""Tests of wrong arguments of `Pipeline.sample`: a line names argument, value and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument
from admfast.sampling import guides
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.request import SampleRequest
from tests.small import PROCESS, cascade, classifier, pipeline, randn, unet, upsampler

IMAGE = randn(1, 1, 8, 8)
BAD = [
    # classes and seeds
    ({"classes": 4}, "classes=4"),
    ({"classes": [0, -1]}, "classes=-1"),
    ({"classes": 1.5}, "classes=1.5"),
    ({"classes": [True]}, "classes=True"),
    ({"classes": []}, r"classes=\[\]"),
    ({"classes": "0-3"}, "classes='0-3'"),
    ({"classes": [None]}, "classes=None"),
    ({"classes": [[0, 1]]}, r"classes=\[0, 1\]"),
    ({"seeds": -1}, "seeds=-1"),
    ({"seeds": [2**64]}, "seeds=18446744073709551616"),
    ({"seeds": 0.5}, "seeds=0.5"),
    ({"seeds": "7"}, "seeds='7'"),
    ({"seeds": []}, r"seeds=\[\]"),
    # steps
    ({"steps": 0}, "steps=0"),
    ({"steps": 1001}, "steps=1001"),
    ({"steps": 2.0}, "steps=2.0"),
    ({"steps": True}, "steps=True"),
    ({"steps": 4, "respacing": "4"}, "steps=4"),
    ({"respacing": "dim25"}, "respacing='dim25'"),
    ({"respacing": "ddim0"}, "respacing='ddim0'"),
    ({"respacing": "0"}, "respacing='0'"),
    ({"respacing": []}, r"respacing=\[\]"),
    ({"respacing": [0, 1000]}, "respacing timestep=1000"),
    ({"respacing": 2.5}, "respacing=2.5"),
    ({"upsampler_steps": 3}, "upsampler_steps=3"),
    # the solver
    ({"solver": "ddim:eta=2"}, "eta=2"),
    ({"solver": "ddim:order=2"}, "order=2"),
    ({"solver": "ddin"}, "solver='ddin'"),
    ({"solver": "euler_ancestral"}, "solver='euler_ancestral'"),
    ({"solver": ["ddim"]}, r"solver=\['ddim'\]"),
    ({"eta": 0.5}, "eta=0.5"),
    ({"solver": "ddim", "eta": 1.5}, "eta=1.5"),
    ({"solver": "ddim", "eta": float("nan")}, "eta=nan"),
    ({"solver": "ddim", "eta": "0"}, "eta='0'"),
    ({"clip": "no"}, "clip='no'"),
    ({"impl": 3}, "impl=3"),
    ({"impl": "fused"}, "impl='fused'"),
    # guidance and other functions
    ({"guides": 3}, "guides=3"),
    ({"guides": [lambda x, t: x]}, "guides=<function"),
    ({"guides": guides.by_classifier(2.0), "guidance": 1.0}, "guides="),
    ({"guides": guides.by_x(lambda x, t: x[..., 0])}, r"guidance\(x, t\).shape"),
    ({"guidance": float("inf")}, "guidance=inf"),
    ({"guidance": "2"}, "guidance='2'"),
    ({"guidance": 1.0, "guidance_fn": lambda x, t: x}, "guidance=1.0"),
    ({"guidance_fn": 3}, "guidance_fn=3"),
    ({"guidance_fn": lambda x, t: x[:, :, 0]}, r"guidance\(x, t\).shape=\(1, 1, 8\)"),
    ({"guidance_fn": lambda x, t: None}, r"guidance\(x, t\)='NoneType'"),
    ({"guidance_fn": lambda x, t: x.numpy()}, r"guidance\(x, t\)='ndarray'"),
    ({"denoised_fn": lambda x0: None}, r"denoised_fn\(x_0\)='NoneType'"),
    ({"denoised_fn": lambda x0: x0.numpy()}, r"denoised_fn\(x_0\)='ndarray'"),
    ({"denoised_fn": 0.5}, "denoised_fn=0.5"),
    ({"denoised_fn": lambda x0: x0[..., 0]}, r"denoised_fn\(x_0\).shape=\(1, 1, 8\)"),
    ({"callback": "print"}, "callback='print'"),
    ({"every": 0}, "every=0"),
    ({"every": 1.5}, "every=1.5"),
    # images
    ({"noise": randn(1, 1, 0, 8)}, r"noise.shape=\(1, 1, 0, 8\)"),
    ({"solver": "ddim-inverse"}, "x_start=None"),
    (
        {"solver": "ddim-inverse", "x_start": IMAGE, "noise": IMAGE},
        "x_start='given together with noise'",
    ),
    ({"solver": "ddim-inverse", "x_start": IMAGE, "t_start": 5}, "t_start=5"),
    ({"solver": "ddim-inverse", "x_start": IMAGE}, "output='uint8'"),
    ({"noise": randn(1, 3, 8, 8)}, r"noise.shape=\(1, 3, 8, 8\)"),
    ({"noise": IMAGE, "seeds": [0, 1]}, r"noise.shape=\(1, 1, 8, 8\)"),
    ({"noise": IMAGE.numpy()}, "noise='ndarray'"),
    ({"noise": IMAGE.to(torch.uint8)}, "noise.dtype=torch.uint8"),
    ({"step_noise": randn(3, 1, 1, 8, 8)}, r"step_noise.shape=\(3, 1, 1, 8, 8\)"),
    ({"step_noise": [IMAGE] * 4}, "step_noise='list'"),
    ({"low_res": IMAGE}, r"low_res.shape=\(1, 1, 8, 8\)"),
    ({"x_start": IMAGE}, "t_start=None"),
    ({"t_start": 5}, "x_start=None"),
    ({"x_start": IMAGE, "t_start": 1000}, "t_start=1000"),
    ({"x_start": IMAGE, "t_start": -1}, "t_start=-1"),
    ({"x_start": IMAGE, "t_start": 0.5}, "t_start=0.5"),
    ({"x_start": IMAGE, "t_start": 500, "solver": "euler:churn=2"}, "x_start='given'"),
    ({"spacing": "karras", "respacing": "5"}, "spacing='karras'"),
    ({"spacing": "log_snr"}, "spacing='log_snr'"),
    ({"dynamic_threshold": 0}, "dynamic_threshold=0"),
    ({"dynamic_threshold": 1.5}, "dynamic_threshold=1.5"),
    (
        {"x_start": IMAGE, "t_start": 5, "respacing": [10, 20]},
        "t_start=5",
    ),
    (
        {"x_start": IMAGE[..., :4], "t_start": 5, "noise": IMAGE},
        r"x_start.shape=\(1, 1, 8, 4\)",
    ),
    ({"x_start": IMAGE.long(), "t_start": 5}, "x_start.dtype=torch.int64"),
    ({"noise": IMAGE[..., :7]}, r"noise.shape=\(1, 1, 8, 7\)"),
    ({"noise": IMAGE[..., 0]}, r"noise.shape=\(1, 1, 8\)"),
    ({"x_start": IMAGE[:, :, :3], "t_start": 5}, r"x_start.shape=\(1, 1, 3, 8\)"),
    ({"size": 0}, "size=0"),
    ({"size": True}, "size=True"),
    ({"size": "8.8"}, "size='8.8'"),
    ({"size": (8, 8.0)}, "size=8.0"),
    ({"size": ()}, r"size=\(\)"),
    ({"size": (8, 8, 8)}, r"size=\(8, 8, 8\)"),
    ({"size": (8, 13), "guidance": 0}, r"size=\(8, 13\): .*nearest: 8x12"),
    ({"size": 16}, "size=16: 8x8"),
    ({"size": (4, 16)}, r"size=\(4, 16\): 8x8"),
    ({"size": (8, 16), "noise": IMAGE, "guidance": 0}, r"noise.shape=\(1, 1, 8, 8\)"),
    # output
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 1.5}, "batch_size=1.5"),
    ({"output": "pil"}, "output='pil'"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message[:40] for _, message in BAD])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InvalidArgument, match=f"^{message}") as caught:
        pipeline().sample(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, message", BAD, ids=[message[:40] for _, message in BAD])
def test_what_can_be_known_before_is_found_without_sampling(arguments, message, monkeypatch):
    if message.startswith((r"guidance\(", r"denoised_fn\(")):
        pytest.skip("shows only when the function or the network is called")
    monkeypatch.setattr("admfast.sampling.pipeline.run", None)
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
    with pytest.raises(InvalidArgument, match="^low_res="):
        cascade(low_res_size=3).check()


@pytest.mark.parametrize("method", [Pipeline.sample, Pipeline.check])
def test_sample_and_check_take_the_settings_of_a_request(method):
    _, *names = inspect.signature(method).parameters.values()
    entries = [entry for entry in dataclasses.fields(SampleRequest)]
    assert [(p.name, p.default) for p in names] == [(entry.name, entry.default) for entry in entries]
    with pytest.raises(InvalidArgument, match="^stepz=3: .*steps"):
        method(pipeline(), stepz=3)


def test_the_inverse_begins_from_the_image_and_has_no_guidance_of_its_own():
    pipe = pipeline()
    given = {"solver": "ddim-inverse", "output": "float"}
    from_image = pipe.sample(0, 1, x_start=IMAGE, **given)
    assert torch.equal(from_image, pipe.sample(0, 1, noise=IMAGE, guidance=0, **given))
    assert not torch.equal(from_image, pipe.sample(0, 1, x_start=IMAGE, guidance=1, **given))
    with pytest.raises(InvalidArgument, match="^solver='ddim-inverse'"):
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
    message = r"low_res=\(20, 36\): .* 5 divides"
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
    with pytest.raises(InvalidArgument, match=r"^classes=\[0\]: "):
        pipe.sample(0)
    with pytest.raises(InvalidArgument, match="^guidance=2.0: small has no classifier; 0 is none"):
        pipe.sample(guidance=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "low_res=None: upsamplers need it"),
        ({"low_res": randn(2, 1, 8, 8), "seeds": 0}, r"low_res.shape=\(2, 1, 8, 8\): .*h, w\).* 1 seed"),
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
    with pytest.raises(InvalidArgument, match=f"^upsampler_steps={steps}: "):
        cascade().sample(upsampler_steps=steps)


def test_base_images_must_be_multiples_of_what_the_upsampler_enlarges():
    with pytest.raises(InvalidArgument, match=r"^low_res=\(8, 8\): .* 6 divides"):
        cascade(low_res_size=3).sample(steps=1)
    with pytest.raises(InvalidArgument, match=r"^low_res=\(8, 8\): sides of 16 pixels"):
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
