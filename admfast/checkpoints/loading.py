"""Load a network from a weights file without a second copy of the weights in memory."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checkpoints.differences import compare, nearest_preset, network_shapes, shapes_of
from admfast.checkpoints.infer import ModelInfo, find_contradicted_flags, identify
from admfast.checkpoints.reading import Weights, WeightsSource, read_weights
from admfast.errors import CheckpointError, show_value
from admfast.models import NetConfig, build

LOG = logging.getLogger("admfast")


def load_network(
    source: WeightsSource,
    *,
    config: NetConfig | None = None,
    preset: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    checksums: bool = True,
    require_process: bool = False,
    entry: str | None = None,
    **options: Any,
) -> tuple[nn.Module, ModelInfo]:
    """Build the network that a weights file belongs to, and load all weights into it.

    The network is built on the meta device and takes over the tensors that were read, so that memory never
    holds a file's weights twice. Later changes of the file, or of a state dict given by the caller, have no
    effect on the network. NaN and infinities are loaded unchanged. The log "admfast" names the other contents
    of the file.

    Args:
        source: a path, an open file, a state dict or a module; see `read_weights`.
        config: the configuration; None infers it (see `infer`).
        preset: name of the released model that the file is.
        dtype: dtype of the parameters; the default converts a float16 file to float32. None keeps the dtypes
            of the file. (For the published half precision, call `convert_torso` on a float32 network.)
        device: device of the parameters.
        checksums, entry: see `read_weights`.
        require_process: report a missing noise schedule as an error too.
        options: fields of the configuration or of `DiffusionConfig`, which override every other source, such
            as `num_heads=4`.

    Returns:
        The network in evaluation mode, and its identity.

    Raises:
        CheckpointError: if the file can't be read, options are missing, or the weights don't fit the
            configuration.
        InvalidArgument: for an unknown option or preset, or a value that is not allowed.
    """
    weights = read_weights(source, checksums=checksums, entry=entry)
    info = identify_weights(
        weights, config=config, preset=preset, options=options, require_process=require_process
    )
    check_fit(weights, info, options)
    for note in weights.notes:
        LOG.warning("%s: %s", weights.path, note)
    with torch.device("meta"):
        net = build(info.config)
    tensors = weights.tensors
    shared = _find_overlapping_keys(tensors)
    for key in list(tensors):
        # One tensor at a time, so that memory never holds all of them in both dtypes.
        value = tensors[key]
        copy = key in shared or not weights.unshared
        tensors[key] = value.to(device, dtype or value.dtype, copy=copy).contiguous()
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.to(device).eval(), info


def _find_overlapping_keys(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of tensors that share memory with an earlier one: training would change both."""
    spans = []
    for key, value in tensors.items():
        first = int(value.storage_offset()) * value.element_size()
        last = sum((int(size) - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
        spans.append((value.untyped_storage()._cdata, first, first + last * value.element_size(), key))
    overlapping, previous_id, end = set(), None, -1
    for storage_id, first, last, key in sorted(spans):
        if storage_id == previous_id and first <= end:
            overlapping.add(key)
        end = max(end, last) if storage_id == previous_id else last
        previous_id = storage_id
    return overlapping


def identify_weights(
    weights: Weights,
    *,
    config: NetConfig | None = None,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    require_process: bool = False,
) -> ModelInfo:
    """Return the identity of a file's weights, without loading the network. Raises: see `load_network`."""
    info = identify(
        shapes_of(weights.tensors),
        file=str(weights.path),
        options=options,
        config=config,
        preset_name=preset,
        description=weights.description,
        require_process=require_process,
    )
    return dataclasses.replace(info, dtypes=count_values_by_dtype(weights.tensors))


def count_values_by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of values of every dtype, most frequent first."""
    counts: Counter[str] = Counter()
    for value in tensors.values():
        counts[str(value.dtype).removeprefix("torch.")] += value.numel()
    return dict(counts.most_common())


def check_fit(weights: Weights, info: ModelInfo, options: Mapping[str, Any]) -> None:
    """Reject weights whose keys or shapes differ from the configuration's, or that aren't floating-point.

    options: given by the caller; the error names those that the shapes contradict.
    """
    shapes = shapes_of(weights.tensors)
    differences = compare(shapes, network_shapes(info.config))
    if differences:
        contradicted = find_contradicted_flags(shapes, options).items()
        contradictions = ", ".join(
            f"{flag}={show_value(options[flag])} (it has {show_value(shown_value)})"
            for flag, shown_value in contradicted
        )
        text = f"{weights.path}: does not fit {contradictions or info.source}: {differences.summary()}"
        nearest = nearest_preset(shapes)
        if info.candidates:
            text += f"; it fits {' or '.join(model.name for model in info.candidates)}"
        elif nearest is not None:
            text += f"; nearest released model: {nearest[0].name} ({nearest[1].summary(1)})"
        raise CheckpointError(text)
    for key, value in weights.tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{weights.path}: {key} is {value.dtype}, not a floating-point tensor")
