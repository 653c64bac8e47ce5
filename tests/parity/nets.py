"""The networks of the golden data, built from their folders."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from admfast.models import (
    ClassifierConfig,
    NetConfig,
    UNetConfig,
    UpsamplerConfig,
    build,
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)


def config_of(ctor: str, kwargs: dict) -> NetConfig:
    """Return our configuration for a published constructor and its keyword arguments."""
    kwargs = {
        name: value for name, value in kwargs.items() if name not in ("use_fp16", "classifier_use_fp16")
    }
    if ctor in ("create_model", "create_model_and_diffusion"):
        return unet_config_from_flags(**kwargs)
    if ctor in ("sr_create_model", "sr_create_model_and_diffusion"):
        return upsampler_config_from_flags(**kwargs)
    if ctor == "create_classifier":
        return classifier_config_from_flags(**kwargs)
    direct = {"UNetModel": UNetConfig, "SuperResModel": UpsamplerConfig, "EncoderUNetModel": ClassifierConfig}
    return direct[ctor](**kwargs)


def procedural_state(entries: dict[str, list[int]], seed: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the weights that the golden data defines by a rule: {key: shape} -> {key: float32 tensor}.

    gain: factor of the weights of matrices and convolutions.
    """
    state = {}
    for key, shape in entries.items():
        k = (seed * 1000003 + zlib.crc32(key.encode())) % 2**32
        z = (2 * np.random.RandomState(k).random_sample(shape) - 1) * np.sqrt(3)
        if key.endswith("positional_embedding"):
            z = 0.5 * z
        elif key.endswith("label_emb.weight"):
            pass
        elif key.endswith(".running_var"):
            z = 1 + 0.25 * np.abs(z)
        elif key.endswith((".bias", ".running_mean")):
            z = 0.1 * z
        elif key.endswith(".weight") and len(shape) == 1:
            z = 1 + 0.1 * z
        else:
            z = gain * z / np.sqrt(np.prod(shape[1:]))
        state[key] = torch.from_numpy(z.astype(np.float32))
    return state


def procedural_entries(folder: Path) -> dict[str, dict]:
    """Return the listed facts of every tensor of a procedural case: shape, SHA-256, first values."""
    listed = json.loads((folder / "state_dict_procedural.json").read_text())
    return listed.get("tensors", listed)


def golden_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a golden case, stored or procedural."""
    stored = folder / "state_dict.safetensors"
    if stored.exists():
        return load_file(stored)
    config = json.loads((folder / "config.json").read_text())
    shapes = {key: entry["shape"] for key, entry in procedural_entries(folder).items()}
    return procedural_state(shapes, config["seed"])


def conditions(net: nn.Module, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the stored conditions of a network: labels if it has classes, low_res if it is an upsampler."""
    taken = ["y"] if net.config.num_classes is not None else []
    taken += ["low_res"] if net.config.kind == "upsampler" else []
    return {name: arrays[name] for name in taken}


def load_golden_net(folder: Path) -> nn.Module:
    """Build the network of a golden case with its weights, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    net = build(config_of(config["ctor"], config["kwargs"]))
    net.load_state_dict(golden_state(folder))
    return net
