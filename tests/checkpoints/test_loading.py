"""Tests of loading networks: weights in the right places, no second copy, and clear refusals."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from admfast.checkpoints import fingerprint, load_network, network_shapes, write_weights
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, InvalidArgument
from admfast.models import Classifier, UNet, Upsampler, build
from admfast.models.description import Description
from admfast.models.presets import preset
from tests.small import SMALL_CLASSIFIER, SMALL_UNET, SMALL_UPSAMPLER
from tests.tools.random_checkpoint import random_state

SETTINGS = DiffusionConfig(learn_sigma=True, noise_schedule="cosine")
ANSWERS = {"image_size": 16, "num_head_channels": 32, "use_new_attention_order": False}


def reference_output(config, state):
    """Return the output of a network that was filled by plain load_state_dict."""
    net = build(config)
    net.load_state_dict(state)
    return run(net, config)


def run(net, config):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, 16, 16, generator=generator)
    t = torch.tensor([3, 900])
    dtype = next(net.parameters()).dtype
    with torch.no_grad():
        if config.kind == "classifier":
            return net(x.to(dtype), t)
        y = torch.tensor([1, 4]) if config.num_classes else None
        if config.kind == "upsampler":
            low_res = torch.randn(2, config.in_channels, 4, 4, generator=generator)
            return net(x.to(dtype), t, y, low_res=low_res.to(dtype))
        return net(x.to(dtype), t, y)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("config", "kind"),
    [(SMALL_UNET, UNet), (SMALL_UPSAMPLER, Upsampler), (SMALL_CLASSIFIER, Classifier)],
    ids=["u", "up", "c"],
)
def test_a_loaded_network_computes_what_its_weights_say(tmp_path, config, kind, ending):
    state = random_state(config)
    path = tmp_path / f"x.{ending}"
    write_weights(path, state, Description(config, SETTINGS, {"steps": 5}))
    net, info = load_network(path)
    assert type(net) is kind and not net.training
    assert torch.equal(run(net, config), reference_output(config, state))
    assert list(net.state_dict()) == list(network_shapes(config))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())
    assert (info.config, info.diffusion, info.training) == (config, SETTINGS, {"steps": 5})
    assert info.parameters == sum(p.numel() for p in net.parameters())
    assert info.dtypes == {"float32": info.parameters}
    assert info.fingerprint == fingerprint(network_shapes(config))
    assert info.preset is None and info.candidates == () and info.path == path
    assert info.source == "the description that the file carries"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_half_precision_files_are_widened_unless_asked_otherwise(tmp_path, stored, ending):
    state = random_state(SMALL_UNET)
    path = tmp_path / f"x.{ending}"
    write_weights(path, state, Description(SMALL_UNET), dtype=stored)
    rounded = {key: value.to(stored).float() for key, value in state.items()}
    net, info = load_network(path)
    assert torch.equal(run(net, SMALL_UNET), reference_output(SMALL_UNET, rounded))
    assert info.dtypes == {str(stored).removeprefix("torch."): info.parameters}
    assert info.fingerprint == fingerprint(network_shapes(SMALL_UNET))
    for asked, expected in ((None, stored), (torch.float64, torch.float64), (stored, stored)):
        net, _ = load_network(path, dtype=asked)
        assert {p.dtype for p in net.parameters()} == {expected}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_a_network_does_not_follow_the_file(tmp_path, ending, dtype):
    path = tmp_path / f"x.{ending}"
    state = random_state(SMALL_UNET)
    write_weights(path, state, Description(SMALL_UNET))
    net, _ = load_network(path, dtype=dtype)
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in net.state_dict().items())


def test_training_a_loaded_network_leaves_the_file_alone(tmp_path):
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET), Description(SMALL_UNET))
    before = (tmp_path / "x.pt").read_bytes()
    net, _ = load_network(tmp_path / "x.pt")
    net(torch.randn(1, 3, 16, 16), torch.tensor([1]), torch.tensor([1])).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.equal(net.state_dict()["out.2.bias"], random_state(SMALL_UNET)["out.2.bias"])
    assert (tmp_path / "x.pt").read_bytes() == before


def test_the_configuration_from_every_source(tmp_path):
    write_weights(tmp_path / "bare.pt", random_state(SMALL_UNET))
    path = tmp_path / "bare.pt"
    with pytest.raises(CheckpointError, match="give num_heads or num_head_channels"):
        load_network(path)
    by_options, info = load_network(path, **ANSWERS, noise_schedule="cosine")
    assert info.config == SMALL_UNET and info.diffusion == SETTINGS
    assert info.assumed == ("dropout=0.0 (matters in training only)",)
    by_config, info = load_network(path, config=SMALL_UNET)
    assert info.source == "the configuration given" and info.diffusion is None
    assert torch.equal(run(by_options, SMALL_UNET), run(by_config, SMALL_UNET))
    # The same weights with another number of heads are another network.
    other, info = load_network(path, config=SMALL_UNET, num_head_channels=16)
    assert info.config.num_head_channels == 16
    assert not torch.equal(run(other, SMALL_UNET), run(by_config, SMALL_UNET))


def test_weights_that_do_not_fit_say_how_and_whose_they_are(tmp_path):
    path = tmp_path / "x.pt"
    write_weights(path, random_state(SMALL_UNET))
    with pytest.raises(CheckpointError) as caught:
        load_network(path, preset="64x64_diffusion")
    text = str(caught.value)
    assert text.startswith(f"{path}: does not fit preset 64x64_diffusion: ")
    assert (
        "keys missing (" in text
        and "with another shape (time_embed.0.weight [128, 32], not [768, 192]" in text
    )
    with pytest.raises(CheckpointError, match=r"label_emb.weight \[10, 128\], not \[3, 128\]"):
        load_network(path, config=SMALL_UNET, num_classes=3)
    with pytest.raises(CheckpointError, match="1 key unexpected .label_emb.weight .10, 128"):
        load_network(path, config=dataclasses.replace(SMALL_UNET, num_classes=None))
    with pytest.raises(InvalidArgument, match="nearest: num_heads"):
        load_network(path, num_headz=3)


def test_a_wrong_preset_is_told_the_right_one(tmp_path):
    """The tensors are one value expanded to the shapes, so the file is small."""
    shapes = network_shapes(preset("64x64_classifier").config)
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "x.pt")
    assert os.path.getsize(tmp_path / "x.pt") < 1_000_000
    with pytest.raises(CheckpointError, match="preset 128x128_classifier: .*; it fits 64x64_classifier"):
        load_network(tmp_path / "x.pt", preset="128x128_classifier")
    net, info = load_network(tmp_path / "x.pt")
    assert info.preset.name == "64x64_classifier" and info.parameters == 65_438_568
    assert net.config == preset("64x64_classifier").config


def test_weights_must_be_numbers_with_a_point(tmp_path):
    state = random_state(SMALL_UNET)
    state["out.2.bias"] = state["out.2.bias"].long()
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="out.2.bias is torch.int64"):
        load_network(tmp_path / "x.pt", config=SMALL_UNET)


def test_nan_is_loaded(tmp_path):
    state = random_state(SMALL_UNET)
    state["out.2.bias"][0] = float("nan")
    write_weights(tmp_path / "x.pt", state, Description(SMALL_UNET))
    net, _ = load_network(tmp_path / "x.pt")
    assert net.out[2].bias.isnan().sum() == 1


def test_device(tmp_path):
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET), Description(SMALL_UNET))
    net, _ = load_network(tmp_path / "x.pt", device="meta")
    assert {p.device.type for p in net.parameters()} == {"meta"}
