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
        """Return one line: the number of keys of each sort, and the first `count` with their shapes."""
        misshapen = self.misshapen.items()
        sorts = {
            "missing": [f"{key} {list(shape)}" for key, shape in self.missing.items()],
            "unexpected": [f"{key} {list(shape)}" for key, shape in self.unexpected.items()],
            "with another shape": [
                f"{key} {list(has)}, not {list(needs)}" for key, (has, needs) in misshapen
            ],
        }
        found = [_listed(sort, lines, count) for sort, lines in sorts.items() if lines]
        return "; ".join(found) or "no differences"


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shape of every tensor, in the order of the keys."""
    return {key: tuple(value.shape) for key, value in tensors.items()}


def network_shapes(config: NetConfig) -> dict[str, Shape]:
    """Return the keys and shapes of the network of `config`, in the published order; allocate nothing."""
    with torch.device("meta"):
        return shapes_of(build(config).state_dict())


def compare(has: Shapes, needs: Shapes) -> Differences:
    """Compare a file's keys and shapes (`has`) with a network's (`needs`)."""
    return Differences(
        missing={key: shape for key, shape in needs.items() if key not in has},
        unexpected={key: shape for key, shape in has.items() if key not in needs},
        misshapen={key: (has[key], s) for key, s in needs.items() if key in has and has[key] != s},
    )


def fingerprint(shapes: Shapes) -> str:
    """Return the SHA-256 (hexadecimal) of the sorted lines `key [shape]`, joined by newlines.

    It doesn't depend on the order of the keys or on dtypes. So a copy in half precision, or in a safetensors
    file with sorted keys, has the fingerprint of the original.
    """
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def nearest_preset(shapes: Shapes, least: float = 0.8) -> tuple[ModelPreset, Differences] | None:
    """Return the released model whose keys and shapes agree best, and how the file differs from it.

    Return None if the share of keys that agree is below `least`; it is taken of the larger set of keys.
    """
    best: tuple[float, str] | None = None
    time_embed = shapes.get("time_embed.0.weight")
    for name in _with_time_embed(time_embed):
        wanted = _kept_shapes(preset(name).config)
        equal = sum(shapes.get(key) == shape for key, shape in wanted.items())
        share = equal / max(len(shapes), len(wanted))
        if share >= least and (best is None or share > best[0]):
            best = (share, name)
    if best is None:
        return None
    return preset(best[1]), compare(shapes, _kept_shapes(preset(best[1]).config))


@cache
def _kept_shapes(config: NetConfig) -> dict[str, Shape]:
    """Return `network_shapes` and keep it: building a released model on the meta device takes 0.07 s."""
    return network_shapes(config)


def _with_time_embed(shape: Shape | None) -> list[str]:
    """Return the names of released models with the base width of this time_embed.0.weight."""
    if shape is None:
        return []
    released = [model for model in MODELS.values() if not model.shipped]
    return [model.name for model in released if model.config.model_channels == shape[-1]]


def _listed(sort: str, lines: list[str], count: int) -> str:
    """Return `5 keys SORT (a, b, c, ...)`."""
    more = ", ..." if len(lines) > count else ""
    return f"{len(lines)} {'key' if len(lines) == 1 else 'keys'} {sort} ({', '.join(lines[:count])}{more})"
