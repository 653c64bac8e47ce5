"""Compare a weights file's keys and shapes with a network's and with the released models'."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from admfast.models import NetConfig, build
from admfast.models.presets import MODELS, ModelPreset, preset

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Differences:
    """Differences between the keys and shapes of a file and of a network.

    missing: keys that the file lacks. unexpected: keys that the network doesn't have. misshapen: keys with
    different shapes, each with (the file's shape, the network's shape).
    """

    missing: dict[str, Shape]
    unexpected: dict[str, Shape]
    misshapen: dict[str, tuple[Shape, Shape]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    @property
    def count(self) -> int:
        """Number of keys that differ."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def summary(self, count: int = 3) -> str:
        """Return one line: for each kind of difference, the number of keys and the first `count`."""
        misshapen = self.misshapen.items()
        lines_of_kind = {
            "missing": [f"{key} {list(shape)}" for key, shape in self.missing.items()],
            "unexpected": [f"{key} {list(shape)}" for key, shape in self.unexpected.items()],
            "with another shape": [
                f"{key} {list(in_file)}, not {list(in_network)}" for key, (in_file, in_network) in misshapen
            ],
        }
        parts = [_summarize_keys(kind, lines, count) for kind, lines in lines_of_kind.items() if lines]
        return "; ".join(parts) or "no differences"


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shape of every tensor, in the order of the keys."""
    return {key: tuple(value.shape) for key, value in tensors.items()}


def network_shapes(config: NetConfig) -> dict[str, Shape]:
    """Return the keys and shapes of the network of `config`, in the published order; allocate nothing."""
    with torch.device("meta"):
        return shapes_of(build(config).state_dict())


def compare(file_shapes: Shapes, expected_shapes: Shapes) -> Differences:
    """Compare a file's keys and shapes with the expected ones, those of a network."""
    return Differences(
        missing={key: shape for key, shape in expected_shapes.items() if key not in file_shapes},
        unexpected={key: shape for key, shape in file_shapes.items() if key not in expected_shapes},
        misshapen={
            key: (file_shapes[key], shape)
            for key, shape in expected_shapes.items()
            if key in file_shapes and file_shapes[key] != shape
        },
    )


def fingerprint(shapes: Shapes) -> str:
    """Return the SHA-256 (hexadecimal) of the sorted lines `key [shape]`, joined by newlines.

    It doesn't depend on the order of the keys or on dtypes. So a copy in half precision, or in a safetensors
    file with sorted keys, has the fingerprint of the original.
    """
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def nearest_preset(shapes: Shapes, min_share: float = 0.8) -> tuple[ModelPreset, Differences] | None:
    """Return the released model whose keys and shapes agree best, and how the file differs from it.

    Return None if the share of keys that agree, of the larger of the two sets, is below `min_share`.
    """
    best: tuple[float, str] | None = None
    time_embed = shapes.get("time_embed.0.weight")
    for name in _released_of_width(time_embed):
        preset_shapes = _cached_network_shapes(preset(name).config)
        num_equal = sum(shapes.get(key) == shape for key, shape in preset_shapes.items())
        share = num_equal / max(len(shapes), len(preset_shapes))
        if share >= min_share and (best is None or share > best[0]):
            best = (share, name)
    if best is None:
        return None
    return preset(best[1]), compare(shapes, _cached_network_shapes(preset(best[1]).config))


@cache
def _cached_network_shapes(config: NetConfig) -> dict[str, Shape]:
    """Return `network_shapes`, cached: building a released model on the meta device takes 0.07 s."""
    return network_shapes(config)


def _released_of_width(shape: Shape | None) -> list[str]:
    """Return the names of released models with the base width of this time_embed.0.weight."""
    if shape is None:
        return []
    released = [model for model in MODELS.values() if not model.shipped]
    return [model.name for model in released if model.config.model_channels == shape[-1]]


def _summarize_keys(kind: str, lines: list[str], count: int) -> str:
    """Return `5 keys KIND (a, b, c, ...)`."""
    more = ", ..." if len(lines) > count else ""
    return f"{len(lines)} {'key' if len(lines) == 1 else 'keys'} {kind} ({', '.join(lines[:count])}{more})"
