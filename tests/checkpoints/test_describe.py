"""Tests of the report of `inspect`: work, memory and values."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from admfast.checkpoints import count_forward_work, describe, fingerprint, network_shapes, write_weights
from admfast.checkpoints.describe import count_guidance_flops
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError
from admfast.models import ClassifierConfig, build
from admfast.models.description import Description
from admfast.models.preset_types import ModelPreset
from admfast.models.presets import MODELS, preset
from tests.small import CLASSIFIER, SMALL_NETS, SMALL_UNET, SMALL_UPSAMPLER
from tests.tools.random_checkpoint import random_state

# GFLOP of a forward pass at batch 1, with 2 FLOP per multiply-add, counted on the published code by torch.
PUBLISHED_GFLOP = {
    "64x64_diffusion": 219.356,
    "128x128_diffusion": 613.856,
    "256x256_diffusion": 2239.666,
    "256x256_diffusion_uncond": 2239.666,
    "lsun_bedroom": 2239.666,
    "512x512_diffusion": 3964.670,
    "64_256_upsampler": 1263.285,
    "128_512_upsampler": 5009.570,
    "64x64_classifier": 38.158,
    "128x128_classifier": 42.081,
    "256x256_classifier": 146.697,
    "512x512_classifier": 225.534,
}


@pytest.mark.parametrize("name", PUBLISHED_GFLOP)
def test_work_is_the_published_work(name):
    config = preset(name).config
    gflop = count_forward_work(config).flops / 1e9
    if isinstance(config, ClassifierConfig):
        # The published pool returns one token, but projects the other 64 tokens to the classes too.
        gflop += 2 * config.widths()[-1] * 1000 * 64 / 1e9
    assert gflop == pytest.approx(PUBLISHED_GFLOP[name], rel=1e-3)
    assert gflop == pytest.approx(PUBLISHED_GFLOP[name], abs=0.002), "differs from the published digits"


@pytest.mark.parametrize("sides", [None, (16, 16), (16, 32)])
def test_the_gradient_of_a_convolution_is_as_much_work_as_itself(sides):
    """The gradient of the attention products costs twice the forward; the embedding has no gradient in x."""
    config = ClassifierConfig(**{**CLASSIFIER, "pool": "adaptive", "attention_resolutions": ()})
    net = build(config)
    embedding = [*net.time_embed, *(m.emb_layers[1] for m in net.modules() if hasattr(m, "emb_layers"))]
    linear = sum(2 * m.weight.numel() for m in embedding if isinstance(m, torch.nn.Linear))
    height, width = sides or (config.image_size, config.image_size)
    # Attention is in the middle block only, at half the sides: q k^T and its product with v.
    attention = 2 * 2 * (height * width // 4) ** 2 * config.widths()[-1]
    forward = count_forward_work(config, sides=sides).flops
    assert count_guidance_flops(config, sides) == 2 * forward - linear + attention


def test_work_follows_batch_and_precision():
    one, four = count_forward_work(SMALL_UNET), count_forward_work(SMALL_UNET, batch=4)
    assert four.flops == 4 * one.flops
    assert four.weight_bytes == one.weight_bytes == 4 * sum(p.numel() for p in build(SMALL_UNET).parameters())
    assert 3.5 * one.activation_bytes < four.activation_bytes <= 4 * one.activation_bytes
    half = count_forward_work(SMALL_UNET, dtype=torch.bfloat16)
    assert half.flops == one.flops
    convolutions = sum(
        m.weight.numel() + m.bias.numel()
        for part in ("input_blocks", "middle_block", "output_blocks")
        for m in getattr(build(SMALL_UNET), part).modules()
        if isinstance(m, torch.nn.Conv1d | torch.nn.Conv2d)
    )
    assert half.weight_bytes == one.weight_bytes - 2 * convolutions
    assert half.activation_bytes < one.activation_bytes


@pytest.mark.parametrize("config", SMALL_NETS, ids=lambda config: config.kind)
def test_memory_holds_what_must_be_alive_together(config):
    """The memory is between 2 and 20 times the largest activation."""
    largest = 4 * 16 * 16 * max(config.widths())
    work = count_forward_work(config)
    assert 2 * largest <= work.activation_bytes <= 20 * largest


def test_memory_is_what_a_real_pass_allocates():
    """The count on real tensors is the same as on meta tensors."""
    from admfast.checkpoints.describe import LiveBytes
    from admfast.ops.dispatch import override_impl

    net = build(SMALL_UNET)
    inputs = {
        "x": torch.zeros(2, 3, 16, 16),
        "timesteps": torch.zeros(2),
        "y": torch.zeros(2, dtype=torch.long),
    }
    live = LiveBytes(net, inputs)
    with override_impl("reference"), torch.no_grad(), live:
        out = net(**inputs)
    assert live.peak == pytest.approx(count_forward_work(SMALL_UNET, batch=2).activation_bytes, rel=0.05)
    assert live.now == out.untyped_storage().nbytes(), "only the output may still be allocated"


def test_the_count_runs_on_the_references_and_puts_the_environment_back(monkeypatch):
    expected = count_forward_work(SMALL_UNET)
    monkeypatch.setenv("ADMFAST_IMPL", "attention=none_of_that_name")  # would raise if it were read
    assert count_forward_work(SMALL_UNET) == expected
    assert os.environ["ADMFAST_IMPL"] == "attention=none_of_that_name"
    monkeypatch.delenv("ADMFAST_IMPL")
    count_forward_work(SMALL_UNET)
    assert "ADMFAST_IMPL" not in os.environ


def test_report_on_a_described_file(tmp_path):
    state = random_state(SMALL_UNET)
    state["out.2.bias"][:2] = float("nan")
    state["out.0.weight"][0] = float("inf")
    path = tmp_path / "x.safetensors"
    write_weights(
        path, state, Description(SMALL_UNET, DiffusionConfig(learn_sigma=True), {"steps": 9}), torch.float16
    )
    rows = describe(path, batch=3)
    report = dict(rows)
    assert len(report) == len(rows)
    size, count = path.stat().st_size, sum(value.numel() for value in state.values())
    assert report["file"] == f"{path}, {size:,} bytes"
    assert report["network"] == "unet" and report["model"] == "none of the released models"
    assert report["source"] == "the description that the file carries"
    assert report["blocks"].startswith("1 residual block a level, ")
    assert report["image"] == "16x16, 3 channels" and report["widths"] == "32, 64 (base 32)"
    assert report["output"] == "6 channels, 10 classes"
    assert report["attention"] == "heads of 32 channels, legacy qkv order, at downsampling 2"
    assert "noise_schedule=linear" in report["diffusion"] and report["training"] == "steps=9"
    assert report["parameters"] == f"{count:,} in {len(state)} tensors"
    assert report["on disk"] == f"{count:,} float16"
    assert report["values"] == "2 NaN and 1 infinite in 2 tensors, the first out.0.weight"
    gflop = count_forward_work(SMALL_UNET).flops / 1e9
    assert report["work"].startswith(f"{gflop:,.1f} GFLOP an image")
    work = count_forward_work(SMALL_UNET, 3)
    total = (work.weight_bytes + work.activation_bytes) / 2**20
    assert report["memory"].startswith(f"{total:.1f} MiB at batch 3, torso float32: weights ")
    assert "nearest" not in report and "missing" not in report


def test_a_shipped_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.models.preset_types.DIGITS_FOLDER", tmp_path.resolve())
    write_weights(
        tmp_path / "upsampler.safetensors", random_state(SMALL_UPSAMPLER), Description(SMALL_UPSAMPLER)
    )
    report = dict(describe(tmp_path / "upsampler.safetensors"))
    assert report["model"] == "digits32_upsampler, as shipped" and report["network"] == "upsampler"


def test_report_on_a_file_that_leaves_options_open(tmp_path):
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET))
    report = dict(describe(tmp_path / "x.pt"))
    assert report["network"] == "a unet with 32 base channels x (1,2)"
    assert "give num_heads or num_head_channels (a divisor of 64)" in report["missing"]
    assert "memory" not in report and report["values"] == "all finite"
    answered = dict(
        describe(
            tmp_path / "x.pt",
            options={"num_heads": 2, "use_new_attention_order": True, "image_size": 16},
            check_values=False,
        )
    )
    assert answered["attention"].startswith("2 heads, new qkv order")
    assert "memory" in answered and "missing" not in answered and "values" not in answered


def test_report_on_released_shapes(tmp_path):
    """The files have the shapes of released models but store one value: a few hundred kilobytes each."""

    def save(name, shapes):
        torch.save({k: torch.zeros(1).expand(s) for k, s in shapes.items()}, tmp_path / name)
        return dict(describe(tmp_path / name, check_values=False))

    uncond = network_shapes(preset("lsun_cat").config)
    assert save("lsun_cat.pt", uncond)["model"] == (
        "has the keys and shapes of lsun_cat; size and hash of the published file are not known"
    )
    renamed = save("mine.pt", uncond)
    assert renamed["model"].startswith(
        "has the keys and shapes of 256x256_diffusion_uncond, lsun_bedroom, lsun_cat, lsun_horse, "
    )
    assert renamed["assumed"] == (
        "num_head_channels=64, use_new_attention_order=False, noise_schedule=linear, steps=1000, "
        "dropout=0.0 (matters in training only)"
    )
    assert renamed["work"].startswith("2,239.7 GFLOP") and renamed["parameters"].startswith(
        "552,814,086 in 566"
    )
    tuned = {**uncond, "label_emb.weight": (7, 1024)}
    report = save("tuned.pt", tuned)
    assert report["nearest"] == (
        "256x256_diffusion_uncond; the file differs from it: 1 key unexpected (label_emb.weight [7, 1024])"
    ) or report["nearest"].startswith("256x256_diffusion; the file differs from it: 1 key with another shape")


def test_a_file_is_called_the_published_one_by_its_hash_alone(tmp_path, monkeypatch):
    path = tmp_path / "known.pt"
    torch.save(random_state(SMALL_UNET), path)
    data = path.read_bytes()
    known = ModelPreset(
        name="known",
        file="known.pt",
        network=SMALL_UNET,
        process=DiffusionConfig(learn_sigma=True),
        url="https://example.org/",
        fingerprint=fingerprint(network_shapes(SMALL_UNET)),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )

    def model(**changes):
        monkeypatch.setitem(MODELS, "known", dataclasses.replace(known, **changes))
        return dict(describe(path))["model"]

    shapes = "has the keys and shapes of known; "
    assert model() == f"{shapes}it is the published file, by size and sha256"
    assert model(sha256="0" * 64) == f"{shapes}its sha256 differs from the published file"
    wrong = f"its size differs from the published file: {len(data):,}, not 7 bytes"
    assert model(size=7) == shapes + wrong
    said = dict(describe(path, options={"num_head_channels": 32}))["assumed"]
    assert said == "use_new_attention_order=False, noise_schedule=linear, steps=1000"


def test_a_preset_that_does_not_fit_is_refused(tmp_path):
    torch.save(random_state(SMALL_UNET), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: does not fit preset 64x64_diffusion: .* keys missing"):
        describe(tmp_path / "x.pt", preset="64x64_diffusion")


def test_importing_the_floor_is_light():
    """Importing loads neither triton nor xformers, and needs no home folder."""
    program = (
        "import sys, admfast.checkpoints, admfast.files; "
        "print([name for name in ('triton', 'xformers', 'typer') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
        },
    )
    assert done.stdout == "[]\n", done.stderr
