"""Load a network from a weights file without a second copy of the weights in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checkpoints.differences import compare, fingerprint, nearest_preset, network_shapes, shapes_of
from admfast.checkpoints.infer import Identity, identify
from admfast.checkpoints.reading import Weights, read_weights
from admfast.errors import CheckpointError
from admfast.models import NetConfig, build
from admfast.models.description import DiffusionSettings


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded, and how that is known.

    Attributes:
        path: the weights file.
        config, diffusion: the network and its process (None: nothing says it).
        preset: name of the released model, where it is known which one.
        candidates: names of all released models with these keys and shapes.
        source: where the configuration comes from, in words.
        assumed: what was assumed because nothing says it.
        training: facts that the file carries about its training.
        dtypes: values on disk by dtype, such as {"float32": 295904454}.
        parameters: number of parameters.
        fingerprint: of keys and shapes.
    """

    path: Path
    config: NetConfig
    diffusion: DiffusionSettings | None
    preset: str | None
    candidates: tuple[str, ...]
    source: str
    assumed: tuple[str, ...]
    training: Mapping[str, Any]
    dtypes: Mapping[str, int]
    parameters: int
    fingerprint: str


def load_network(
    path: str | PathLike[str],
    *,
    config: NetConfig | None = None,
    preset: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    checksums: bool = True,
    process: bool = False,
    **options: Any,
) -> tuple[nn.Module, ModelInfo]:
    """Build the network of a weights file and give it the file's weights, every one of them.

    The network is built without memory and takes the file's tensors as they are mapped: of a float32 file on
    the CPU no copy is made at all. NaN and infinities are loaded as they are.

    Args:
        path: .pt, .pth or .safetensors.
        config: the configuration; None finds it (see `infer`).
        preset: name of the released model that the file is.
        dtype: of the parameters; a float16 file is widened to float32 unless asked otherwise. None keeps the
            dtypes of the file. (The published half-precision recipe is `convert_torso` on a float32 network.)
        device: where the parameters end up.
        checksums: see `read_weights`.
        process: the process must be known too; where nothing says it, it is asked for with the rest.
        options: fields of the configuration or of `DiffusionSettings` that win over every other source, such
            as `num_heads=4`.

    Returns:
        The network in evaluation mode, and what is known of it.

    Raises:
        CheckpointError: for a file that can't be read, isn't known well enough, or doesn't fit its
            configuration.
        InvalidArgument: for an unknown option or preset, or a value that is not allowed.
    """
    weights = read_weights(path, checksums=checksums)
    identity, info = identify_weights(weights, config=config, preset=preset, options=options, process=process)
    check_fit(weights, identity)
    with torch.device("meta"):
        net = build(identity.config)
    tensors = weights.tensors
    for key in list(tensors):
        # One at a time, so that a widened file never lies in memory twice.
        tensors[key] = tensors[key].to(dtype=dtype or tensors[key].dtype)
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.to(device).eval(), info


def identify_weights(
    weights: Weights,
    *,
    config: NetConfig | None = None,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    process: bool = False,
) -> tuple[Identity, ModelInfo]:
    """Find out what a file's weights are, without building the network. Raises as `load_network`."""
    shapes = shapes_of(weights.tensors)
    identity = identify(
        shapes,
        file=str(weights.path),
        options=options,
        config=config,
        preset_name=preset,
        carried=weights.description,
        process=process,
    )
    return identity, ModelInfo(
        path=weights.path,
        config=identity.config,
        diffusion=identity.diffusion,
        preset=identity.preset.name if identity.preset else None,
        candidates=tuple(model.name for model in identity.candidates),
        source=identity.source,
        assumed=identity.assumed,
        training=identity.training,
        dtypes=values_by_dtype(weights.tensors),
        parameters=sum(value.numel() for value in weights.tensors.values()),
        fingerprint=fingerprint(shapes),
    )


def values_by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of values of every dtype, most frequent first."""
    counted: Counter[str] = Counter()
    for value in tensors.values():
        counted[str(value.dtype).removeprefix("torch.")] += value.numel()
    return dict(counted.most_common())


def check_fit(weights: Weights, identity: Identity) -> None:
    """Refuse weights that aren't exactly those that the configuration needs, or aren't floating-point."""
    shapes = shapes_of(weights.tensors)
    differences = compare(shapes, network_shapes(identity.config))
    if differences:
        text = f"{weights.path}: does not fit {identity.source}: {differences.summary()}"
        near = nearest_preset(shapes)
        if identity.candidates:
            text += f"; it fits {' or '.join(model.name for model in identity.candidates)}"
        elif near is not None:
            text += f"; nearest released model: {near[0].name} ({near[1].summary(1)})"
        raise CheckpointError(text)
    for key, value in weights.tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{weights.path}: {key} is {value.dtype}, not a floating-point tensor")
