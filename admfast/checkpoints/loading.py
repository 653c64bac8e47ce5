"""Load a network from a weights file without a second copy of the weights in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checkpoints.differences import compare, nearest_preset, network_shapes, shapes_of
from admfast.checkpoints.infer import ModelInfo, identify
from admfast.checkpoints.reading import Weights, read_weights
from admfast.errors import CheckpointError
from admfast.models import NetConfig, build


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
        options: fields of the configuration or of `DiffusionConfig` that win over every other source, such
            as `num_heads=4`.

    Returns:
        The network in evaluation mode, and what is known of it.

    Raises:
        CheckpointError: for a file that can't be read, isn't known well enough, or doesn't fit its
            configuration.
        InvalidArgument: for an unknown option or preset, or a value that is not allowed.
    """
    weights = read_weights(path, checksums=checksums)
    info = identify_weights(weights, config=config, preset=preset, options=options, process=process)
    check_fit(weights, info)
    with torch.device("meta"):
        net = build(info.config)
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
) -> ModelInfo:
    """Find out what a file's weights are, without building the network. Raises as `load_network`."""
    info = identify(
        shapes_of(weights.tensors),
        file=str(weights.path),
        options=options,
        config=config,
        preset_name=preset,
        carried=weights.description,
        process=process,
    )
    return dataclasses.replace(info, dtypes=values_by_dtype(weights.tensors))


def values_by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of values of every dtype, most frequent first."""
    counted: Counter[str] = Counter()
    for value in tensors.values():
        counted[str(value.dtype).removeprefix("torch.")] += value.numel()
    return dict(counted.most_common())


def check_fit(weights: Weights, info: ModelInfo) -> None:
    """Refuse weights that aren't exactly those that the configuration needs, or aren't floating-point."""
    shapes = shapes_of(weights.tensors)
    differences = compare(shapes, network_shapes(info.config))
    if differences:
        text = f"{weights.path}: does not fit {info.source}: {differences.summary()}"
        near = nearest_preset(shapes)
        if info.candidates:
            text += f"; it fits {' or '.join(model.name for model in info.candidates)}"
        elif near is not None:
            text += f"; nearest released model: {near[0].name} ({near[1].summary(1)})"
        raise CheckpointError(text)
    for key, value in weights.tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{weights.path}: {key} is {value.dtype}, not a floating-point tensor")
