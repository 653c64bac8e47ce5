"""From a name or a file to a pipeline."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from admfast.checkpoints import load_network
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, Unavailable, invalid, nearest
from admfast.models import Classifier, UNet
from admfast.models.description import DiffusionSettings
from admfast.models.presets import SYSTEMS, ModelPreset, SystemPreset, system
from admfast.pipeline import Pipeline

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Network = UNet | Classifier
ENDINGS = (".pt", ".safetensors")


def load(
    name: str | PathLike[str],
    weights: str | PathLike[str] | None = None,
    *,
    classifier: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    **options: Any,
) -> Pipeline:
    """Load a system by name, or a model by its weights file, ready to sample.

    Args:
        name: a system (`admfast models` lists them: "imagenet256", "digits32", ...), or the path of a
            diffusion model's weights file.
        weights: folder that holds the released files; not needed for systems that ship.
        classifier: weights file of a classifier for a model that is given by path.
        device: "cpu", "cuda", "cuda:1", ...; None takes the GPU where there is one.
        precision: of the networks' torso: "fp32", "tf32" (GPU), "bf16", "fp16"; "auto" is fp16 on a GPU, else
            fp32. Norms, softmax, embeddings, the last layer and the update are in float32 in all of them.
        options: for a file, what can't be told from it (num_heads, noise_schedule, image_size, ...).

    Returns:
        A `Pipeline` whose networks are frozen.

    Raises:
        InvalidArgument: for an unknown system, device or precision.
        CheckpointError: for a file that is missing, damaged, unsafe or of another network.
    """
    on = _device(device)
    dtype = _precision(precision, on)
    if str(name) in SYSTEMS:
        for given, value in (("classifier", classifier), *options.items()):
            if value is not None:
                raise invalid(given, value, f"not for a system: {name} says it")
        return _load_system(system(str(name)), weights, on, dtype)
    path = Path(name)
    if not os.path.exists(path) and path.suffix not in ENDINGS:
        raise invalid("name", str(name), f"neither a system nor a file; {nearest(str(name), SYSTEMS)}")
    if weights is not None:
        raise invalid("weights", str(weights), f"for a system, as the folder of its files; {path} is a file")
    net, info = load_network(path, device=on, **options)
    if not isinstance(net, UNet):
        raise invalid("name", str(name), f"a diffusion model; this file holds a {info.config.kind}")
    if info.diffusion is None:
        raise CheckpointError(f"{path}: nothing says its process; give noise_schedule (linear or cosine)")
    guide: Classifier | None = None
    if classifier is not None:
        loaded, guide_info = load_network(classifier, device=on)
        if not isinstance(loaded, Classifier):
            kind = guide_info.config.kind
            raise invalid("classifier", str(classifier), f"a classifier; this file holds a {kind}")
        guide = loaded
    return Pipeline(
        path.stem,
        _in_precision(net, dtype),
        process_of(info.diffusion),
        None if guide is None else _in_precision(guide, dtype),
        guidance=1.0 if guide is not None else 0.0,
        steps=min(250, info.diffusion.steps),
    )


def process_of(settings: DiffusionSettings) -> DiffusionConfig:
    """The process that a model's settings describe."""
    return DiffusionConfig(**settings.to_dict())


def _load_system(
    chosen: SystemPreset, weights: str | PathLike[str] | None, device: torch.device, dtype: torch.dtype
) -> Pipeline:
    """Load every model of a system; all files are looked for before the first is read."""
    paths = {model.name: _find(chosen, model, weights) for model in chosen.models}

    def network(model: ModelPreset) -> nn.Module:
        preset_name = None if model.shipped else model.name
        net, _ = load_network(paths[model.name], preset=preset_name, device=device)
        assert isinstance(net, Network)
        return _in_precision(net, dtype)

    upsampler = None
    if chosen.upsampler is not None:
        upsampler = Pipeline(
            chosen.upsampler.name,
            network(chosen.upsampler),
            _process(chosen.upsampler),
            steps=chosen.upsampler_steps,
            low_res_size=chosen.upsampler.low_res_size,
        )
    return Pipeline(
        chosen.name,
        network(chosen.diffusion),
        _process(chosen.diffusion),
        None if chosen.classifier is None else network(chosen.classifier),
        guidance=chosen.guidance,
        steps=chosen.steps,
        upsampler=upsampler,
    )


def _process(model: ModelPreset) -> DiffusionConfig:
    settings = model.diffusion
    if settings is None:
        raise CheckpointError(f"{model.name}: nothing says its process")
    return process_of(settings)


def _find(chosen: SystemPreset, model: ModelPreset, weights: str | PathLike[str] | None) -> Path:
    """Where a model's file is; raises CheckpointError that says how to get it."""
    if model.shipped_path is not None:
        return model.shipped_path
    if weights is None:
        files = ", ".join(part.file for part in chosen.models if not part.shipped)
        raise invalid(
            "weights", None, f"the folder that holds {files} (admfast fetch {chosen.name} --out models)"
        )
    folder = Path(weights)
    if not folder.is_dir():
        raise invalid("weights", str(weights), f"not a folder (admfast fetch {chosen.name} --out {folder})")
    for ending in ENDINGS:
        path = (folder / model.file).with_suffix(ending)
        if path.exists():
            return path
    raise CheckpointError(
        f"{folder / model.file}: no such file; {chosen.name} needs it "
        f"(admfast fetch {model.name} --out {folder})"
    )


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise invalid("device", device, "cpu, cuda, or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise invalid("device", device, "cpu, cuda, or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise Unavailable(f"device={str(device)!r}: this machine has {count} usable CUDA devices")
    return chosen


def _precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the networks' torso."""
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in PRECISIONS:
        raise invalid("precision", precision, nearest(str(precision), ["auto", *PRECISIONS]))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32":
        raise Unavailable("precision='tf32': only on a CUDA device")
    return PRECISIONS[precision]


def _in_precision(net: Network, dtype: torch.dtype) -> nn.Module:
    """The network with its torso in `dtype`; half precision runs channels-last."""
    if dtype == torch.float32:
        return net
    net.convert_torso(dtype)
    if net.config.dims == 2:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net
