"""Small files that stand in for a reader's files: released weights, checkpoints, photographs, programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from admfast.checkpoints import fingerprint, network_shapes, write_weights
from admfast.cli.main import main
from admfast.evaluation.inception_weights import FILES
from admfast.evaluation.networks import DINO_FOLDER
from admfast.evaluation.published_weights import PUBLISHED_WEIGHTS
from admfast.files.images import write_png
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, UpsamplerConfig
from admfast.models.presets import MODELS, SYSTEMS
from tests.accelerate import client
from tests.tools.random_checkpoint import random_state
from tests.tools.random_inception import random_inception

SMALLER = 8  # each side of a stand-in's images is an eighth of the released model's
FEW: dict[str, Any] = {
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (2,),
}
# The published flags that build the network of `client.UNetModel`.
FLAGS = (
    "--image_size 64 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --attention_resolutions 32 "
    "--num_heads 2 --learn_sigma True --use_scale_shift_norm True --resblock_updown True"
)
# A short `image_sample.py`: it reads flags, builds the network, loads weights and samples.
SCRIPT = """
import argparse
from guided_diffusion import dist_util
from guided_diffusion.script_util import (
    add_dict_to_argparser, args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults)
defaults = model_and_diffusion_defaults()
parser = argparse.ArgumentParser()
add_dict_to_argparser(parser, {**defaults, "model_path": "", "num_samples": 1})
args = parser.parse_args()
samples = args.timestep_respacing != ""
args.timestep_respacing = "2"
dist_util.setup_dist()
model, diffusion = create_model_and_diffusion(**args_to_dict(args, defaults.keys()))
model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
if samples:
    diffusion.p_sample_loop(model.eval(), (1, 3, args.image_size, args.image_size))
"""
PROGRAM = """
import torch
from tests.accelerate.client import UNetModel, filled
if __name__ == "__main__":
    model = filled(UNetModel()).eval()
    with torch.no_grad():
        print(model(torch.zeros(1, 3, 64, 64), torch.tensor([5])).shape)
"""


def small(config: NetConfig) -> NetConfig:
    """Return a small network of the same kind, with the same channels and classes."""
    changes = {**FEW, "image_size": config.image_size // SMALLER, "num_head_channels": 32}
    return dataclasses.replace(config, **changes)


def replace_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the released models by small ones with the same names."""
    stand_ins = {}
    for name, model in MODELS.items():
        if not model.shipped:
            network = small(model.config)
            known = fingerprint(network_shapes(network))
            low = None if model.low_res_size is None else model.low_res_size // SMALLER
            stand_ins[name] = dataclasses.replace(
                model, network=network, fingerprint=known, low_res_size=low, size=None, sha256=None, md5=None
            )
            monkeypatch.setitem(MODELS, name, stand_ins[name])
    for name, system in SYSTEMS.items():
        parts = {part: getattr(system, part) for part in ("diffusion", "classifier", "upsampler")}
        parts = {part: stand_ins.get(model.name, model) for part, model in parts.items() if model is not None}
        monkeypatch.setitem(SYSTEMS, name, dataclasses.replace(system, **parts))
    for name, files in PUBLISHED_WEIGHTS.items():
        unknown = {path: dataclasses.replace(file, size=None, sha256=None) for path, file in files.items()}
        monkeypatch.setitem(PUBLISHED_WEIGHTS, name, unknown)


def write_files(folder: Path, text: str) -> None:
    """Write the files that the code of a page needs and that its text names."""
    used = {model for system in SYSTEMS.values() if system.name in text for model in system.models}
    used |= {model for model in MODELS.values() if model.name in text}
    for model in used:
        if not model.shipped:
            for place in (folder / "models", folder):
                place.mkdir(exist_ok=True)
                write_weights(place / model.file, random_state(model.config))
    face = {**FEW, "image_size": 16, "in_channels": 3, "num_heads": 4, "resblock_updown": True}
    own: dict[str, NetConfig] = {
        "faces.pt": UNetConfig(**face, out_channels=6, num_classes=5, use_scale_shift_norm=True),
        "guide.pt": ClassifierConfig(
            **{**face, "num_heads": 1},
            num_head_channels=32,
            out_channels=5,
            pool="attention",
            use_scale_shift_norm=True,
        ),  # fmt: skip
        "up.pt": UpsamplerConfig(
            **{**face, "image_size": 64}, out_channels=6, num_classes=5, use_scale_shift_norm=True
        ),
    }
    for name, config in own.items():
        if name in text:
            write_weights(folder / name, random_state(config))
    if "photos" in text:
        write_photos(folder / "photos")
    if "admfast evaluate" in text:
        write_sets(folder, text)
    if "samples_16x64x64x3.npz" in text and "out/samples" in text:
        (folder / "out").mkdir()
        # The images are smaller than the name says: attention at 256x256 would take a minute.
        images = np.zeros((1, 8, 8, 3), np.uint8)
        np.savez(folder / "out" / "samples_16x64x64x3.npz", images, np.zeros(1, int))
    if "export runs/photos" in text and "--out runs/photos" not in text:
        short = ["--steps", "2", "--batch-size", "2", "--labels", "none", "--set", "num_classes=None"]
        assert main(["train", "diffusion", "--data", str(folder / "photos"), "--preset", "imagenet64",
                     "--out", str(folder / "runs" / "photos"), *short]) == 0  # fmt: skip


def write_photos(folder: Path) -> None:
    """Write five folders with two images each."""
    random = np.random.default_rng(0)
    for label in range(5):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(2):
            image = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            write_png(folder / f"class{label}" / f"{i}.png", image)


def write_sets(folder: Path, text: str) -> None:
    """Write the weights and sets of images that `admfast evaluate` reads on a page."""
    random, models = np.random.default_rng(0), folder / "models"
    models.mkdir(exist_ok=True)
    if "fetch inception" in text:
        torch.save(random_inception(), models / FILES[0])
    if "dinov2" in text:
        transformers = pytest.importorskip("transformers", reason="the extra eval is not installed")
        small_model = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=224)
        config = transformers.Dinov2Config(**small_model, patch_size=14)
        transformers.Dinov2Model(config).save_pretrained(models / DINO_FOLDER)
    for name in ("samples.npz", "reference.npz", "VIRTUAL_imagenet256_labeled.npz", "digits.npz"):
        side, channels = (32, 1) if name == "digits.npz" else (64, 3)
        images = random.integers(0, 256, (8, side, side, channels), dtype=np.uint8)
        if name in text:
            np.savez(folder / name, images, np.arange(8))
    for name in ("reference", "my-images"):
        if f"{name}/" in text:
            (folder / name).mkdir()
            for i in range(8):
                image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                write_png(folder / name / f"{i}.png", image)


def replace_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give azula's and deepinv's networks random weights, so that nothing is downloaded."""
    import azula.plugins.adm
    import deepinv

    adm, network = azula.plugins.adm, deepinv.models.DiffUNet
    denoiser = adm.AblatedDenoiser(client.filled(client.UNetModel()), learn_var=True)
    monkeypatch.setattr(adm, "load_model", lambda name: denoiser)
    monkeypatch.setattr(deepinv.models, "DiffUNet", lambda: network(pretrained=None))


def program(folder: Path) -> torch.nn.Module:
    """Write a program with its own copy of the published network, and return that network."""
    model = client.filled(client.UNetModel()).eval()
    torch.save(model.state_dict(), folder / "model.pt")
    scripts = folder / "scripts"
    scripts.mkdir()
    (folder / "sample.py").write_text(PROGRAM)
    (scripts / "sample.py").write_text(PROGRAM)
    (scripts / "image_sample.py").write_text(SCRIPT)
    return model
