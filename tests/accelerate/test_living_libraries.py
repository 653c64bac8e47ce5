"""Tests with azula, deepinv and diffusers installed: their networks converted, their algorithms on ours."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import admfast
from admfast.accelerate.denoisers import NoiseLevels
from admfast.accelerate.forward_methods import ForwardMethod
from admfast.errors import InvalidArgument
from bench.program_cores import StandIns
from tests.accelerate.client import filled
from tests.small import assert_close, randn

MISSING = "pip install --no-deps -r tests/accelerate/requirements.txt"


@contextlib.contextmanager
def importing(*names: str) -> Iterator[None]:
    """Replace torchvision, which a CPU build of torch can't import, and skip if a library is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} isn't installed: {MISSING}")
    finder = StandIns(["torchvision"])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def without_stand_ins() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def libraries():
    with importing("azula", "deepinv"):
        import azula.guidance
        import azula.plugins.adm
        import deepinv
    yield SimpleNamespace(azula=azula, adm=azula.plugins.adm, deepinv=deepinv)
    without_stand_ins()


@pytest.fixture(scope="module")
def diffusers():
    with importing("diffusers"):
        import diffusers

        assert diffusers.UNet2DModel and diffusers.DDIMPipeline  # diffusers imports these on first access
    yield diffusers
    without_stand_ins()


def pooled(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 4)


def azula_denoiser(adm) -> torch.nn.Module:
    from azula.plugins.adm._src.unet import UNetModel

    net = UNetModel(
        image_size=32, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1,
        attention_resolutions=(2,), channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True,
        resblock_updown=True,
    )  # fmt: skip
    return adm.AblatedDenoiser(filled(net), learn_var=True).eval()


def restored(azula, denoiser, y: Tensor, x: Tensor, **more: Any) -> Tensor:
    """Run their DPS from t = 0.7: with random weights, a chain from t = 1 amplifies rounding by 1e5."""
    sampler = azula.guidance.DPSSampler(denoiser, y=y, A=pooled, zeta=1.0, start=0.7, steps=10, silent=True)
    torch.manual_seed(0)
    return sampler(x, **more)


def test_azulas_posterior_sampling_on_its_own_network(libraries):
    theirs = azula_denoiser(libraries.adm)
    ours = admfast.accelerate(copy.deepcopy(theirs))
    assert isinstance(ours.backbone.accelerated_forward, ForwardMethod) and any(
        p.requires_grad for p in ours.parameters()
    )
    x, y = randn(1, 3, 32, 32), randn(1, 3, 8, 8, seed=1)
    with torch.no_grad():
        assert_close(ours(x, torch.tensor(0.5)).mean, theirs(x, torch.tensor(0.5)).mean)
    assert_close(restored(libraries.azula, ours, y, x), restored(libraries.azula, theirs, y, x))


def test_azulas_posterior_sampling_on_our_pipeline(libraries):
    from azula.plugins.adm._src.unet import UNetModel

    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    options = {key: value for key, value in pipe.config.to_dict().items() if key != "kind"}
    net = UNetModel(**options)
    net.load_state_dict(pipe.net.state_dict())
    theirs = libraries.adm.AblatedDenoiser(
        net.eval(), learn_var=True, discrete_schedule=pipe.diffusion.noise_schedule
    )
    ours = admfast.accelerate.denoiser(pipe, "azula", rounded=True)
    x, label = randn(1, 1, 32, 32), torch.tensor([3])
    y = pooled(pipe.sample(classes=[3], seeds=[0], output="float"))
    with torch.no_grad():
        for t in torch.tensor([0.01, 0.3, 0.5]):
            assert_close(ours(x, t, label=label).mean, theirs(x, t, label=label).mean)
    found, expected = (restored(libraries.azula, d, y, x, label=label) for d in (ours, theirs))
    assert_close(found, expected)


def test_deepinvs_diffunet(libraries):
    net = libraries.deepinv.models.DiffUNet(in_channels=3, out_channels=6, large_model=False, pretrained=None)
    net = filled(net)
    with torch.no_grad():  # keep the predicted noise small so that no pixel is clipped
        net.out[2].weight *= 0.01
        net.out[2].bias *= 0.01
    fast = admfast.accelerate(copy.deepcopy(net))
    assert (
        isinstance(fast.accelerated_forward, ForwardMethod)
        and fast.accelerated_forward.method == "forward_diffusion"
    )
    x, sigma = 0.5 + 0.2 * randn(1, 3, 32, 32).tanh(), torch.tensor(0.1)
    with torch.no_grad():
        expected, found = (
            torch.func.vjp(lambda v, n=n: n(v, sigma), x) for n in (net, fast)
        )  # PiGDM starts with such a vjp
        assert_close(found[0], expected[0])
        assert_close(found[1](x)[0], expected[1](x)[0])
        t = torch.tensor([500])
        assert_close(fast(x, t, type_t="timestep"), net(x, t, type_t="timestep"))
    posterior = libraries.deepinv.sampling.DPSDataFidelity
    physics = libraries.deepinv.physics.Downsampling(img_size=(3, 32, 32), factor=4, filter=None)
    y = physics.A(x) + 0.1  # computed first: `grad` below sets requires_grad on x itself
    grads = [posterior(denoiser=n).grad(x, y, physics, sigma=sigma) for n in (net, fast)]
    assert_close(grads[1], grads[0])


SMALL = {"img_resolution": 16, "model_channels": 32, "channel_mult": (1, 2), "attn_resolutions": (8,)}
EDMS = {
    "ADMUNet": (lambda models: models.ADMUNet(num_blocks=1, pretrained=None, **SMALL), {}),
    "ADMUNet with classes": (
        lambda models: models.ADMUNet(num_blocks=1, pretrained=None, label_dim=4, **SMALL),
        {"class_labels": torch.eye(4)[:2]},
    ),
    "DDPM++": (
        lambda models: models.NCSNpp(model_type="ddpm", num_blocks=1, pretrained=None, **SMALL),
        {"augment_labels": torch.ones(2, 9)},
    ),
}


def gradients(net: torch.nn.Module, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(True)
    call(net, x).sin().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in net.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", EDMS)
def test_deepinvs_networks_of_edms_make(name, libraries):
    make, given = EDMS[name]
    net = filled(make(libraries.deepinv.models))
    holder = SimpleNamespace(denoiser=torch.nn.ModuleList([copy.deepcopy(net)]))
    (fast,) = admfast.accelerate(holder).denoiser
    assert not fast.accelerated_unconverted
    x, sigma = randn(2, 3, 16, 16), torch.tensor([0.3, 2.0])
    with torch.no_grad():
        expected, found = (
            torch.func.vjp(lambda v, n=n: n(v, sigma, **given), x) for n in (net, fast)
        )  # PiGDM starts with such a vjp
        assert_close(found[0], expected[0])
        assert_close(found[1](x)[0], expected[1](x)[0])
    expected, found = (gradients(n, lambda n, x: n(x, sigma, **given), x) for n in (net, fast))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key])


def test_deepinvs_ncsnpp_stays_as_it_is(libraries):
    net = libraries.deepinv.models.NCSNpp(num_blocks=1, pretrained=None, **SMALL)
    classes = [type(module) for module in net.modules()]
    with pytest.raises(InvalidArgument, match="^model="):
        admfast.accelerate(net)
    assert [type(module) for module in net.modules()] == classes
    assert "NCSNpp: as it is" in admfast.accelerate.report(net)


LEVELS = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
DIFFUSERS = {
    "by default": {},
    "as ADM": {
        "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
        "attention_head_dim": 32,
    },
    "other options": {
        "norm_num_groups": 16, "norm_eps": 1e-6, "mid_block_scale_factor": 2**0.5, "attention_head_dim": None,
        "downsample_padding": 0, "num_class_embeds": 4, "dropout": 0.1, "center_input_sample": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_unet(name, diffusers):
    net = filled(diffusers.UNet2DModel(**LEVELS, **DIFFUSERS[name]))
    fast = admfast.accelerate(copy.deepcopy(net))
    assert not fast.accelerated_unconverted
    labels = {"class_labels": torch.tensor([1, 3])} if "num_class_embeds" in DIFFUSERS[name] else {}
    x = randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, found = (n(x, 500, **labels).sample for n in (net, fast))
        assert_close(found, expected)
        assert found.stride() == expected.stride()
        (found,) = fast(x, torch.tensor([500, 500]), return_dict=False, **labels)
        assert_close(found, expected)
    expected, found = (gradients(n, lambda n, x: n(x, 500, **labels).sample, x) for n in (net, fast))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key])


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_diffusers_pipelines(name, diffusers):
    net = filled(diffusers.UNet2DModel(**LEVELS))
    with torch.no_grad():  # small noise: otherwise random weights amplify rounding at every step
        net.conv_out.weight *= 0.01
    scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=100)
    images = []
    for unet in (net, copy.deepcopy(net)):
        pipe = getattr(diffusers, f"{name}Pipeline")(unet, scheduler)
        if unet is not net:
            admfast.accelerate(pipe)
            assert pipe.unet is unet and not unet.accelerated_unconverted
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(torch.tensor(pipe(generator=generator, num_inference_steps=5, output_type="np").images))
    assert_close(images[1], images[0])


def test_diffusers_blocks_that_are_others_stay_and_are_named(diffusers):
    from diffusers.models.attention_processor import AttnProcessor

    firs = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    net = filled(diffusers.UNet2DModel(**{**LEVELS, **firs}))
    net.mid_block.attentions[0].set_processor(AttnProcessor())
    fast = admfast.accelerate(copy.deepcopy(net))
    resampling = {n for n, m in net.named_modules() if getattr(m, "up", None) or getattr(m, "down", None)}
    assert (
        set(fast.accelerated_unconverted) == resampling | {"mid_block.attentions.0"} and len(resampling) == 2
    )
    assert "AttnProcessor" in fast.accelerated_unconverted["mid_block.attentions.0"]
    x = randn(1, 3, 16, 16)
    with torch.no_grad():
        assert_close(fast(x, 500).sample, net(x, 500).sample)
    net = filled(diffusers.UNet2DModel(**LEVELS, act_fn="gelu"))
    fast = admfast.accelerate(copy.deepcopy(net))
    assert {name for name, m in net.named_modules() if type(m).__name__ == "ResnetBlock2D"} == set(
        fast.accelerated_unconverted
    )
    with torch.no_grad():
        assert_close(fast(x, 500).sample, net(x, 500).sample)


def test_our_pipeline_as_a_denoiser_of_deepinv(libraries):
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    schedule = pipe.diffusion.build("").schedule
    alphas_cumprod = torch.tensor(schedule.alphas_cumprod).float()
    label = torch.tensor([3, 4])
    theirs = libraries.deepinv.models.DiffUNet
    stub = SimpleNamespace(
        sqrt_1m_alphas_cumprod=(1 - alphas_cumprod).sqrt(), sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
        _handle_sigma=theirs._handle_sigma, find_nearest=lambda *a: theirs.find_nearest(None, *a),
        forward_diffusion=lambda x, t, y: pipe.net(x, t, y)[:, :1],
    )  # fmt: skip
    ours = admfast.accelerate.denoiser(pipe, "deepinv", rounded=True)
    assert isinstance(ours, libraries.deepinv.models.Denoiser)
    x = randn(2, 1, 32, 32).sigmoid()
    # Between timesteps deepinv divides by the signal of the rounded timestep, we by that of the exact level.
    for steps in ([100, 100], [300, 600]):
        sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()[steps] / 2
        with torch.no_grad():
            assert_close(ours(x, sigma, label), theirs.forward_denoise(stub, x, sigma, label))
    x = x.double().requires_grad_(True)
    assert torch.autograd.grad(ours(x, 0.1, label).sum(), x)[0].dtype == torch.float64


@pytest.mark.parametrize("up", [False, True])
def test_levels_of_timesteps_are_found(up):
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    alphas_cumprod = torch.tensor(pipe.diffusion.build("").schedule.alphas_cumprod)
    steps = torch.tensor([0, 1, 500, 998, 999])
    signal, noise = alphas_cumprod[steps].sqrt(), (1 - alphas_cumprod[steps]).sqrt()
    torch.testing.assert_close(
        NoiseLevels(pipe, rounded=False, round_up=up).timestep(signal, noise), steps.double()
    )
    levels = NoiseLevels(pipe, rounded=False, round_up=up)
    torch.testing.assert_close(levels.timestep(signal, noise), steps.double())
    between = steps[1:4] + 0.5
    ratio = torch.tensor(-pipe.diffusion.build("").schedule.log_snr(between.numpy()) / 2).exp()
    torch.testing.assert_close(levels.timestep(torch.ones(3), ratio), between.double())
    rounded = NoiseLevels(pipe, rounded=True, round_up=up)
    assert rounded.timestep(signal, noise * (1 + 1e-9)).tolist() == [*(steps[:4] + up).tolist(), 999]
    beyond = torch.tensor([1.0, 1e-9]).double()
    assert levels.timestep(beyond, beyond.flip(0)).tolist() == [0, 999]


def test_what_is_no_denoiser_is_refused():
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    for arguments, named in (((pipe, "diffuser"), "library"), ((pipe.net, "azula"), "pipe")):
        with pytest.raises(InvalidArgument, match=f"^{named}="):
            admfast.accelerate.denoiser(*arguments)
