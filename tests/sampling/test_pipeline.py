"""Tests of `Pipeline.sample`: seeds, guidance, starting midway, given noise, steps, cascades."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.diffusion import DiffusionConfig
from admfast.engine.guidance import classifier_guidance
from admfast.engine.precision import POLICIES
from admfast.errors import InvalidArgument
from admfast.files.levels import from_uint8, to_uint8
from admfast.ops.update import Stream, as_seeds, normal
from admfast.sampling.loop import Progress
from admfast.sampling.pipeline import Pipeline
from admfast.verify.budget import default_budget
from tests.small import CLASSES, PROCESS, assert_close, cascade, classifier, pipeline, randn, unet, upsampler

SEEDS = [3, 0, 2**63 + 5, 11, 7, 2**64 - 1, 8, 100]
SHAPE = (1, 8, 8)


def silent() -> Pipeline:
    """Return a pipeline whose network outputs zeros, so that images are sums of the noise."""
    pipe = pipeline(classifier=None, guidance=0.0)
    nn.init.zeros_(pipe.net.out[2].weight)
    nn.init.zeros_(pipe.net.out[2].bias)
    return pipe


def watch(net: nn.Module) -> list[dict[str, Any]]:
    """Return a list that records x, t and the conditions of every later call of a network."""
    calls: list[dict[str, Any]] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = {"x": args[0], "t": args[1], **kwargs}
        calls.append({name: value.clone() for name, value in given.items()})  # prepared steps reuse buffers

    net.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def assert_same_images(found: Tensor, wanted: Tensor) -> None:
    """Assert that uint8 images are equal up to rounding, which sometimes moves a value to the next level."""
    assert found.dtype == wanted.dtype == torch.uint8 and found.shape == wanted.shape
    levels = (found.int() - wanted.int()).abs()
    assert levels.max() <= 1 and (levels > 0).float().mean() < 1e-3


# A seed always gives the same image


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("solver, eta", [("ddpm", None), ("ddim", 1.0)])
def test_noise_is_a_function_of_the_seed_alone(size, solver, eta):
    pipe = silent()
    options = {"solver": solver, "eta": eta, "steps": 5, "output": "float"}
    whole = pipe.sample(0, SEEDS, batch_size=8, **options)
    order = [6, 1, 7, 0, 4, 2, 5, 3]
    shuffled = pipe.sample(0, [SEEDS[i] for i in order], batch_size=size, **options)
    assert torch.equal(shuffled, whole[order])
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 8


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_x_t_is_the_noise_of_its_stream_in_any_batch(precision):
    pipe = pipeline(policy=POLICIES[precision])
    calls = watch(pipe.net)
    expected = normal(as_seeds(SEEDS), SHAPE, 0, Stream.X_T)
    for size in (1, 3, 8):
        calls.clear()
        pipe.sample(0, SEEDS, steps=1, batch_size=size)
        assert torch.equal(torch.cat([call["x"] for call in calls]), expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_images_in_half_precision_are_the_same_up_to_its_rounding(precision):
    pipe = pipeline(policy=POLICIES[precision])
    classes, options = [i % CLASSES for i in range(8)], {"output": "float"}
    whole = pipe.sample(classes, SEEDS, batch_size=8, **options)
    for size in (1, 3):
        error = pipe.sample(classes, SEEDS, batch_size=size, **options) - whole
        norms = error.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        assert norms.max() <= default_budget(pipe.policy).step
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 8


def test_images_are_the_same_in_any_batch_and_order():
    pipe = pipeline()
    classes = [i % CLASSES for i in range(8)]
    whole = pipe.sample(classes, SEEDS, batch_size=8)
    assert whole.shape == (8, 8, 8, 1) and whole.float().std() > 20
    order = [5, 0, 3, 7, 2, 6, 1, 4]
    for size in (1, 3):
        found = pipe.sample([classes[i] for i in order], [SEEDS[i] for i in order], batch_size=size)
        assert_same_images(found, whole[order])


# Classes and seeds


@pytest.mark.parametrize(
    "classes, seeds, wanted_classes, wanted_seeds",
    [
        (None, None, [0], [0]),
        (2, None, [2], [0]),
        ([1, 3], None, [1, 3], [0, 1]),
        (None, 6, [2], [6]),
        (None, range(4, 10), [0, 1, 2, 3, 0, 1], range(4, 10)),
        ([3, 0], range(5), [3, 0, 3, 0, 3], range(5)),
        (torch.tensor([1, 2]), torch.tensor([8, 9]), [1, 2], [8, 9]),
        (iter([1, 2]), iter([8, 9]), [1, 2], [8, 9]),
    ],
)
def test_classes_take_turns_and_follow_the_seed(classes, seeds, wanted_classes, wanted_seeds):
    pipe = pipeline()
    calls = watch(pipe.net)
    images = pipe.sample(classes, seeds, steps=1)
    assert len(images) == len(wanted_seeds)
    assert calls[0]["y"].tolist() == wanted_classes
    assert torch.equal(calls[0]["x"], normal(as_seeds(list(wanted_seeds)), SHAPE, 0, Stream.X_T))


def test_the_class_of_a_seed_is_that_of_its_unsigned_value():
    pipe = pipeline(net=unet(num_classes=3), classifier=None, guidance=0.0)
    calls = watch(pipe.net)
    seeds = [2, 2**63, 2**63 + 1, 2**64 - 1]
    pipe.sample(seeds=seeds, steps=1)
    assert calls[0]["y"].tolist() == [seed % 3 for seed in seeds] == [2, 2, 0, 0]


def test_an_unconditional_network_is_guided_to_its_classifier_s_classes():
    guided = pipeline(net=unet(num_classes=None))
    assert guided.num_classes == CLASSES
    calls, pushed = watch(guided.net), watch(guided.classifier)
    images = guided.sample([3, 1], [5, 5])
    assert "y" not in calls[0] and len(pushed) == 4
    assert not torch.equal(images[0], images[1])
    free = pipeline(net=unet(num_classes=None), classifier=None, guidance=0.0)
    assert free.num_classes is None and free.sample(seeds=[1, 2]).shape == (2, 8, 8, 1)


# Guidance


def test_no_guidance_is_no_classifier():
    pipe, without = pipeline(), pipeline(classifier=None, guidance=0.0)
    calls = watch(pipe.classifier)
    assert_same_images(pipe.sample(seeds=range(2), guidance=0), without.sample(seeds=range(2)))
    assert not calls
    assert not torch.equal(pipe.sample(seeds=range(2)), without.sample(seeds=range(2)))
    assert len(calls) == 4, "by default the system's guidance must be used"


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_guidance_fn_stands_for_the_classifier(solver):
    pipe, labels = pipeline(), torch.tensor([2, 1])
    own = classifier_guidance(classifier(1).requires_grad_(False), labels, 3.0)
    by_scale = pipe.sample(labels, range(2), guidance=3.0, solver=solver, output="float")
    by_function = pipe.sample(labels, range(2), guidance_fn=own, solver=solver, output="float")
    assert_close(by_function, by_scale)
    assert (by_scale - pipe.sample(labels, range(2), solver=solver, output="float")).abs().max() > 1e-3


def test_guidance_fn_can_differentiate_a_prediction():
    pipe, target = pipeline(), torch.full((2, 1, 8, 8), 0.5)

    def towards_target(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_(True)
            x0 = pipe.predict(x, t, [0, 1]).x0.clamp(-1, 1)
            return torch.autograd.grad(-(x0 - target).square().sum(), x)[0]

    images = pipe.sample([0, 1], guidance_fn=towards_target, output="float")
    assert images.isfinite().all() and not images.requires_grad


# Given noise, and starting midway


@pytest.mark.parametrize("solver, eta", [("ddpm", None), ("ddim", 0.7)])
def test_given_noise_stands_for_the_seeds_noise(solver, eta):
    pipe, keys = pipeline(), as_seeds(SEEDS[:3])
    options = {"solver": solver, "eta": eta, "output": "float"}
    steps = torch.stack([normal(keys, SHAPE, row, Stream.STEPS) for row in range(4)])
    noise = normal(keys, SHAPE, 0, Stream.X_T)
    wanted = pipe.sample([0, 1, 2], SEEDS[:3], **options)
    found = pipe.sample([0, 1, 2], [50, 51, 52], noise=noise, step_noise=steps, batch_size=2, **options)
    assert_close(found, wanted)
    other = pipe.sample([0, 1, 2], [50, 51, 52], noise=noise, **options)
    assert (other - wanted).abs().max() > 0.1, "without step_noise the steps must use the seeds' noise"


def test_beginning_at_the_last_step_is_the_whole_run_from_a_noised_image():
    pipe, x_start, noise = pipeline(), randn(2, *SHAPE).clamp(-1, 1), randn(2, *SHAPE, seed=1)
    bar = float(pipe.process().schedule.alphas_cumprod[999])
    x_t = bar**0.5 * x_start + (1 - bar) ** 0.5 * noise
    begun = pipe.sample([0, 1], SEEDS[:2], x_start=x_start, t_start=999, noise=noise, output="float")
    whole = pipe.sample([0, 1], SEEDS[:2], noise=x_t, output="float")
    assert_close(begun, whole)


@pytest.mark.parametrize(
    "t_start, index, t", [(999, 3, 999), (998, 2, 666), (666, 2, 666), (400, 1, 333), (0, 0, 0)]
)
def test_beginning_midway_takes_the_step_at_or_below_with_its_own_noise(t_start, index, t):
    pipe = silent()
    calls = watch(pipe.net)
    x_start, noise = randn(2, *SHAPE) / 4, randn(2, *SHAPE, seed=1)
    seeds, options = SEEDS[:2], {"output": "float"}
    found = pipe.sample(0, seeds, x_start=x_start, t_start=t_start, noise=noise, **options)
    assert [call["t"][0].item() for call in calls] == [999, 666, 333, 0][3 - index :]
    bar = float(pipe.process().schedule.alphas_cumprod[t])
    torch.testing.assert_close(
        calls[0]["x"], bar**0.5 * x_start + (1 - bar) ** 0.5 * noise, rtol=0, atol=1e-6
    )
    # Each step uses the noise of its row in the whole run, even if the first rows are left out.
    rows = torch.stack([normal(as_seeds(seeds), SHAPE, row, Stream.STEPS) for row in range(4)])
    given = pipe.sample(0, [1, 2], x_start=x_start, t_start=t_start, noise=noise, step_noise=rows, **options)
    assert torch.equal(found, given)


def test_beginning_midway_takes_the_seeds_noise_where_none_is_given():
    pipe, x_start = silent(), randn(2, *SHAPE) / 4
    noise = normal(as_seeds(SEEDS[:2]), SHAPE, 0, Stream.X_T)
    arguments = {"x_start": x_start, "t_start": 500, "output": "float"}
    own = pipe.sample(0, SEEDS[:2], **arguments)
    assert torch.equal(own, pipe.sample(0, SEEDS[:2], noise=noise, **arguments))
    assert pipe.sample(0, **arguments).shape == (2, *SHAPE), "there should be one image per given image"


@pytest.mark.parametrize("solver", ["unipc", "dpmpp:order=3", "deis", "ipndm", "heun"])
def test_a_solver_with_a_memory_begins_midway_without_one(solver):
    pipe, x_start, noise = silent(), randn(2, *SHAPE) / 4, randn(2, *SHAPE, seed=1)
    arguments = {"noise": noise, "solver": solver, "output": "float"}
    begun = pipe.sample(0, SEEDS[:2], x_start=x_start, t_start=600, respacing="uniform5", **arguments)
    # The same as a run of only these timesteps, from the same noised image.
    bar = float(pipe.process().schedule.alphas_cumprod[599])
    arguments["noise"] = bar**0.5 * x_start + (1 - bar) ** 0.5 * noise
    assert_close(begun, pipe.sample(0, SEEDS[:2], respacing=[199, 399, 599], **arguments))


# Steps


def test_steps_are_the_published_respacing_of_the_solver():
    pipe = pipeline()
    calls = watch(pipe.net)

    def timesteps(**options) -> list[int]:
        calls.clear()
        pipe.sample(0, 0, **options)
        return [call["t"].item() for call in calls]

    assert timesteps() == timesteps(steps=4) == timesteps(respacing="4") == [999, 666, 333, 0]
    assert timesteps(solver="ddim") == timesteps(solver="ddpm", respacing="ddim4") == [750, 500, 250, 0]
    assert timesteps(respacing=[0, 10, 20]) == timesteps(respacing="[0,10,20]") == [20, 10, 0]
    assert timesteps(respacing="2,1") == [500, 499, 0]
    assert timesteps(steps=1) == timesteps(solver="ddim", steps=1) == [0]
    seen: list[int] = []
    pipe.sample(0, 0, steps=7, callback=lambda p: seen.append(p.done), every=3)
    assert seen == [3, 6, 7]


def test_denoised_fn_and_clip_act():
    pipe = pipeline()
    reported: list[Tensor] = []
    keep = lambda p: reported.append(p.x0.clone())  # noqa: E731
    pipe.sample(0, 0, callback=keep, denoised_fn=lambda x0: 0.3 * x0.clamp(-1, 1))
    assert max(float(x0.abs().max()) for x0 in reported) <= 0.3 * (1 + 2**-22)
    reported.clear()
    pipe.sample(0, 0, callback=keep, clip=False)
    assert float(reported[0].abs().max()) > 2


def reconstruction_error(stride: int) -> float:
    """Return the largest error after noising images by inverse DDIM up to t < 400 and denoising by DDIM."""
    pipe = pipeline(classifier=None, guidance=0.0)
    # A smaller output changes little from step to step, like a trained network's.
    pipe.net.out[2].weight.data *= 0.1
    image, states = randn(2, *SHAPE) / 2, []
    keep = lambda p: states.append(p.x.clone())  # noqa: E731
    options = {"respacing": range(0, 400, stride), "clip": False, "output": "float"}
    pipe.sample(0, range(2), solver="ddim-inverse", noise=image, callback=keep, **options)
    # The last row of the inverse goes to alpha_bar = 0, so DDIM starts from the state before it.
    back = pipe.sample(0, range(2), solver="ddim", noise=states[-2], **options)
    return float((back - image).abs().max())


def test_ddim_reconstructs_what_its_inverse_took_apart():
    coarse, fine = reconstruction_error(40), reconstruction_error(8)
    # Both directions are Euler steps of first order: a fifth of the step gives a fifth of the error.
    assert 0.1 * coarse < fine < 0.3 * coarse


# Output


def test_float_and_uint8_are_the_same_images():
    pipe = pipeline()
    floats = pipe.sample(seeds=range(2), output="float")
    assert floats.dtype == torch.float32 and floats.shape == (2, *SHAPE)
    assert not floats.requires_grad and floats.abs().max() < 1.5
    levels = pipe.sample(seeds=range(2))
    assert levels.device.type == "cpu" and levels.shape == (2, 8, 8, 1)
    assert_same_images(levels, to_uint8(floats))
    assert pipe.sample(seeds=range(2), guidance=0, output="float").abs().max() <= 1


@pytest.mark.parametrize("dims, channels", [(1, 2), (2, 5), (3, 1)])
def test_any_dimension_and_channels(dims, channels):
    net = unet(dims=dims, in_channels=channels, out_channels=2 * channels)
    pipe = pipeline(net=net, classifier=None, guidance=0.0)
    assert pipe.sample(0, range(2)).shape == (2, *[8] * dims, channels)


def test_noise_says_the_size_of_the_images():
    pipe = pipeline(classifier=None, guidance=0.0)
    assert pipe.sample(noise=randn(2, 1, 4, 12)).shape == (2, 4, 12, 1)


def test_reference_and_default_update_agree():
    pipe = pipeline()
    reference, default = (pipe.sample(seeds=range(2), output="float", impl=i) for i in ("reference", None))
    assert_close(default, reference)


@pytest.mark.parametrize(
    "process",
    [
        DiffusionConfig(noise_schedule="cosine", steps=50, learn_sigma=True, rescale_timesteps=True),
        DiffusionConfig(predict_xstart=True, learn_sigma=True),
        DiffusionConfig(mean_type="PREVIOUS_X", var_type="LEARNED"),
    ],
    ids=["cosine, rescaled", "x_0", "previous x"],
)
def test_other_processes(process):
    assert pipeline(diffusion=process).sample(seeds=range(2)).shape == (2, 8, 8, 1)


def test_networks_are_frozen_and_in_evaluation_mode():
    pipe = pipeline(net=unet(dropout=0.5).train())
    for net in (pipe.net, pipe.classifier):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert (pipe.device.type, pipe.config) == ("cpu", pipe.net.config)


def test_the_default_batch_fits_the_largest_images_of_a_cascade():
    assert pipeline().default_batch_size == 2**16 // 64
    assert cascade().default_batch_size == 2**16 // 256
    calls: list[Progress] = []
    pipe = pipeline()
    pipe.sample(seeds=range(5), batch_size=2, steps=1, callback=calls.append)
    assert [(call.first, len(call.x), call.stage) for call in calls] == [
        (0, 2, "base"),
        (2, 2, "base"),
        (4, 1, "base"),
    ]


# Upsamplers


def test_an_upsampler_is_a_pipeline_too():
    pipe = Pipeline("up", upsampler(), PROCESS, steps=3)
    calls, low_res = watch(pipe.net), randn(2, 1, 4, 4).clamp(-1, 1)
    images = pipe.sample([0, 1], low_res=low_res, batch_size=1)
    assert images.shape == (2, 16, 16, 1)
    assert torch.equal(torch.cat([calls[0]["low_res"], calls[3]["low_res"]]), low_res)
    assert torch.equal(calls[3]["x"], normal(as_seeds([1]), (1, 16, 16), 0, Stream.X_T))


@pytest.mark.parametrize("low_res_size", [8, 4, 2, None])
def test_a_cascade_is_the_base_model_then_the_upsampler_with_streams_of_its_own(low_res_size):
    pipe = cascade(low_res_size)
    base = pipe.sample([0, 1, 2], SEEDS[:3], output="float", batch_size=2)
    up, stages = pipe.upsampler, []
    keys = as_seeds(SEEDS[:3])
    alone = pipeline()
    # Use the same batches: a level that rounds differently would change the upsampled image.
    small = from_uint8(alone.sample([0, 1, 2], SEEDS[:3], batch_size=2))
    factor = 1 if low_res_size is None else 8 // low_res_size
    means = F.avg_pool2d(small, factor)
    found = up.sample(
        [0, 1, 2],
        [60, 61, 62],
        low_res=means,
        noise=normal(keys, (1, 16, 16), 0, Stream.UPSAMPLER_X_T),
        step_noise=torch.stack([normal(keys, (1, 16, 16), r, Stream.UPSAMPLER_STEPS) for r in range(3)]),
        output="float",
    )
    assert base.shape == (3, 1, 16, 16)
    assert_close(base, found)
    calls = watch(up.net)
    keep = lambda p: stages.append((p.stage, p.first, p.done, p.total, p.x.shape[2]))  # noqa: E731
    pipe.sample([0, 1, 2], SEEDS[:3], batch_size=2, callback=keep, every=2, steps=2, upsampler_steps=3)
    assert stages == [
        (stage, first, done, total, side)
        for first in (0, 2)
        for stage, done, total, side in (("base", 2, 2, 8), ("upsampler", 2, 3, 16), ("upsampler", 3, 3, 16))
    ]
    assert calls[0]["low_res"].shape == (2, 1, 8 // factor, 8 // factor)
    assert calls[0]["y"].tolist() == [0, 1]


def test_a_cascade_needs_no_classes_of_the_upsampler_and_keeps_guidance_for_the_base():
    up = Pipeline("up", upsampler(num_classes=None), PROCESS, steps=2, low_res_size=8)
    pipe = pipeline(upsampler=up)
    calls = watch(up.net)
    assert pipe.sample([0, 1], guidance=5.0).shape == (2, 16, 16, 1)
    assert len(calls) == 2 and "y" not in calls[0]


def test_a_spacing_is_a_respacing_of_as_many_steps():
    pipe = pipeline()
    for spacing in ("uniform", "karras"):
        named = pipe.sample(0, SEEDS[:2], steps=5, spacing=spacing, solver="unipc", output="float")
        spelt = pipe.sample(0, SEEDS[:2], respacing=f"{spacing}5", solver="unipc", output="float")
        assert torch.equal(named, spelt)
    calls = watch(pipe.net)
    pipe.sample(0, SEEDS[:1], steps=5, spacing="log-snr", solver="ddim")
    seen = [call["t"][0].item() for call in calls]
    assert len(seen) == 5 and seen[0] == 999 and any(t != int(t) for t in seen)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", ["dynamic_threshold", "denoised_fn"])
def test_an_update_that_ignores_x0_takes_no_limit_of_x0(name, clip):
    diffusion = DiffusionConfig(mean_type="PREVIOUS_X", learn_sigma=True)
    pipe = pipeline(diffusion=diffusion)
    value = 0.9 if name == "dynamic_threshold" else lambda x0: x0
    with pytest.raises(InvalidArgument, match=f"^{name}='given': not for a network that predicts the prev"):
        pipe.check(0, [1], steps=3, guidance=0, clip=clip, **{name: value})
    assert pipe.check(0, [1], steps=3, guidance=0, clip=clip, solver="ddim", **{name: value})
