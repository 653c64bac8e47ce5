"""Tests with diffusers installed: it reads our exports, and its pipelines give the same images."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import admfast
from admfast.checkpoints import diffusers as ours
from admfast.checkpoints import network_shapes, write_weights
from admfast.diffusion import DiffusionConfig
from admfast.models.description import Description
from admfast.models.presets import MODELS
from admfast.sampling.pipeline import Pipeline
from tests.checkpoints.exported import HELD, assert_same_output, held, inputs
from tests.small import assert_close, with_weights

PROCESS = DiffusionConfig(learn_sigma=True)


@pytest.fixture(scope="module")
def library():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers isn't installed: pip install --no-deps -r tests/accelerate/requirements.txt")
    return importlib.import_module("diffusers")


def exported(
    folder: Path, name: str, process: DiffusionConfig = PROCESS, **settings
) -> tuple[Pipeline, Path]:
    """Return a pipeline of ours, and the folder that its network was exported to."""
    net = with_weights(held(name))
    write_weights(folder / "net.safetensors", net.state_dict(), Description(net.config, process))
    out = folder / "exported"
    admfast.export(folder / "net.safetensors", out, to="diffusers", **settings)
    return Pipeline("ours", net, process), out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", HELD)
def test_their_network_gives_our_output(library, name, dtype):
    """All channels are compared, those of the noise and those of the variance."""
    config = held(name)
    net = with_weights(config).to(dtype)
    theirs = library.UNet2DModel.from_config(ours.unet_config(config, "ddpm")).to(dtype).eval()
    theirs.load_state_dict(ours.convert_unet_state(net.state_dict(), config, "ddpm"), strict=True)
    x, t, classes = inputs(config, dtype)
    with torch.no_grad():
        assert_same_output(theirs(x, t, class_labels=classes).sample, net(x, t, classes))


@pytest.mark.parametrize("name", ["64x64_diffusion", "256x256_diffusion", "256x256_diffusion_uncond"])
def test_released_networks_fit_at_full_size(library, name):
    config = MODELS[name].config
    with torch.device("meta"):
        theirs = library.UNet2DModel.from_config(ours.unet_config(config))
        state = {key: torch.empty(shape) for key, shape in network_shapes(config).items()}
    found = ours.convert_unet_state(state, config)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def theirs_and_ours(library, pipe: Pipeline, folder: Path, steps: int) -> tuple[Tensor, Tensor]:
    """Return the images of DDIMPipeline and of our DDIM from the same noise, in [-1, 1]."""
    theirs = library.DDIMPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    drawn = torch.Generator().manual_seed(5)
    images = theirs(
        2, drawn, num_inference_steps=steps, use_clipped_model_output=True, output_type="pt"
    ).images
    side = pipe.config.image_size
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    stride = pipe.diffusion.steps // steps
    kept = [i * stride for i in range(steps)]
    if pipe.diffusion.steps % steps == 0:
        assert pipe.process(f"ddim{steps}").schedule.timestep_map.tolist() == kept
    wanted = pipe.sample(seeds=[0, 1], solver="ddim", respacing=kept, noise=noise, output="float")
    return images * 2 - 1, wanted.clamp(-1, 1)


@pytest.mark.parametrize(
    ("process", "steps"),
    [
        (PROCESS, 25),
        (PROCESS, 30),
        (DiffusionConfig(noise_schedule="cosine", learn_sigma=True), 50),
        (DiffusionConfig(steps=200, learn_sigma=True), 10),
        (DiffusionConfig(noise_schedule="cosine", steps=4000, learn_sigma=True), 20),
        (DiffusionConfig(predict_xstart=True, learn_sigma=True), 10),
        (DiffusionConfig(rescale_timesteps=True, learn_sigma=True), 10),
        (DiffusionConfig(var_type="LEARNED"), 10),
    ],
    ids=["linear", "no-divisor", "cosine", "200-steps", "cosine-4000", "x0", "rescaled", "learned"],
)
def test_ddim_pipeline_gives_our_images(library, tmp_path, process, steps):
    assert_close(*theirs_and_ours(library, *exported(tmp_path, "no-classes", process), steps))


@pytest.mark.parametrize("switches", [{}, {"sigma_small": True}], ids=["fixed-large", "fixed-small"])
def test_ddim_pipeline_of_a_network_without_variance(library, tmp_path, switches, monkeypatch):
    monkeypatch.setitem(HELD, "neither", {"num_classes": None, "out_channels": 3})
    assert_close(*theirs_and_ours(library, *exported(tmp_path, "neither", DiffusionConfig(**switches)), 10))


def test_classes_by_network_and_scheduler(library, tmp_path):
    """DDIMPipeline can't pass a class, so the test calls the network and the scheduler."""
    admfast.export("digits32", tmp_path / "digits", to="diffusers")
    theirs = library.DDIMPipeline.from_pretrained(tmp_path / "digits")
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    noise, classes = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)), [3, 8, 9]
    theirs.scheduler.set_timesteps(25)
    x = noise
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            out = theirs.unet(x, t, class_labels=torch.tensor(classes)).sample
            x = theirs.scheduler.step(out, t, x, use_clipped_model_output=True).prev_sample
    wanted = pipe.sample(classes, [0, 1, 2], solver="ddim", steps=25, noise=noise, guidance=0, output="float")
    assert_close(x, wanted)


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("legacy-order", {"learn_sigma": True}),
        ("no-variance", {}),
        ("no-variance", {"sigma_small": True}),
    ],
    ids=["learned-range", "fixed-large", "fixed-small"],
)
def test_ddpm_scheduler_makes_our_steps(library, tmp_path, name, switches):
    """Their step is x_{t-1} = mean + exp(log variance / 2) z, with z from the generator; z = 0 at t = 0."""
    process = DiffusionConfig(noise_schedule="cosine", **switches)
    pipe, folder = exported(tmp_path, name, process, scheduler="ddpm")
    theirs = library.DDPMPipeline.from_pretrained(folder)
    theirs.scheduler.set_timesteps(100)
    x, _, classes = inputs(pipe.config, torch.float32)
    kept = pipe.process("ddim100")
    for i in (0, 1, 50, 99):
        t = theirs.scheduler.timesteps[99 - i]
        with torch.no_grad():
            out = theirs.unet(x, t, class_labels=classes).sample
            found = theirs.scheduler.step(out, t, x, torch.Generator().manual_seed(i)).prev_sample
        p = kept.p_mean_variance(pipe.net(x, t.expand(2), classes), x, torch.full((2,), i))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        assert_close(found, p.mean + (i > 0) * torch.exp(p.log_variance / 2) * noise)


def test_every_setting_is_one_of_theirs(library, tmp_path):
    """diffusers ignores unknown settings silently."""
    for scheduler in ours.SCHEDULERS:
        _, folder = exported(tmp_path, "legacy-order", scheduler=scheduler, overwrite=True)
        for place in ("unet/config.json", "scheduler/scheduler_config.json"):
            said = json.loads((folder / place).read_text())
            of_class = getattr(library, said.pop("_class_name"))
            made, unused = of_class.from_config(said, return_unused_kwargs=True)
            assert set(unused) == {"_diffusers_version"}
            assert {name: made.config[name] for name in said} == said
