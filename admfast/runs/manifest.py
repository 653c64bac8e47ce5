"""The manifest of a run: what its images depend on, in the file `manifest.json` of its folder.

The file names no path of a machine. A run goes on only if its manifest is that of the folder, so that all
images of a folder have the same settings. This module doesn't import torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admfast.errors import OutputError, first_line, invalid, show_value
from admfast.files.atomic import write_new
from admfast.files.image_files import sample_name

MANIFEST = "manifest.json"
FORMAT = 1
BALANCED, RANDOM = "balanced", "random"  # values of `Manifest.classes`
_SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class Manifest:
    """Settings of a run, and which seed and class each of its images has.

    Attributes:
        files: "npz" for a file for each shard, "png" for a file for each image, in a single shard.
        images: number of images.
        seeds: their seeds in order, as text: "0-49999", or "3,5,7-9".
        classes: "balanced" (seed modulo the number of classes), "random" (drawn by the seed), or a list that
            is repeated; None without classes.
        num_classes: number of classes that are sampled; None without classes.
        shape: [H, W, C] of an image.
        batch_size, shard_size: images of a batch and of a shard. Batches begin anew in each shard.
        model: name of the system or weights file. weights: fingerprint of each network.
        precision: in which the networks compute. process: diffusion process of each network.
        request: settings of the images, as `SampleRequest.to_json` writes them.
    """

    files: str
    images: int
    seeds: str
    classes: str | list[int] | None
    num_classes: int | None
    shape: list[int]
    batch_size: int
    shard_size: int
    model: str
    weights: dict[str, str]
    precision: str
    process: dict[str, Any]
    request: dict[str, Any]
    format: int = FORMAT
    _ranges: list[range] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ranges", parse_ranges(self.seeds))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)

    def shard_images(self, shard: int) -> range:
        """Return the indices of a shard's images among all images."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.images))

    def batches(self, shard: int) -> list[range]:
        """Return the indices of the images of each batch of a shard."""
        images, size = self.shard_images(shard), self.batch_size
        return [images[first : first + size] for first in range(0, len(images), size)]

    def seeds_of(self, images: range) -> NDArray[np.uint64]:
        """Return the seeds of images, uint64 [N]."""
        parts, before = [], 0
        for seeds in self._ranges:
            part = seeds[max(0, images.start - before) : max(0, images.stop - before)]
            if len(part):
                parts.append(np.arange(len(part), dtype=np.uint64) + np.uint64(part.start))
            before += len(seeds)
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

    def labels_of(self, images: range) -> NDArray[np.int64] | None:
        """Return the classes of images, int64 [N]; None without classes."""
        if self.num_classes is None or self.classes is None:
            return None
        if isinstance(self.classes, list):
            indices = np.arange(images.start, images.stop) % len(self.classes)
            return np.asarray(self.classes, dtype=np.int64)[indices]
        numbers = self.seeds_of(images)
        numbers = draw(numbers) if self.classes == RANDOM else numbers
        return (numbers % np.uint64(self.num_classes)).astype(np.int64)

    def file_name(self, i: int) -> str:
        """Return the name of the PNG file of image i."""
        labels, (seed,) = self.labels_of(range(i, i + 1)), self.seeds_of(range(i, i + 1)).tolist()
        return sample_name(i, None if labels is None else int(labels[0]), seed)

    def to_json(self) -> str:
        """Return the manifest as JSON."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.init}
        return json.dumps(fields, indent=1) + "\n"

    def differences(self, other: Manifest) -> list[str]:
        """Return the settings in which another manifest differs, as "steps=50, not 10": the other's last."""
        own, others = (_flatten(json.loads(manifest.to_json())) for manifest in (self, other))
        return [
            f"{name}={show_value(own.get(name))}, not {show_value(others.get(name))}"
            for name in dict.fromkeys([*own, *others])
            if own.get(name) != others.get(name)
        ]

    def check_same(self, other: Manifest, out: Path, advice: str) -> None:
        """Raise OutputError if `other`, a new request for the folder `out`, differs from this manifest."""
        differences = self.differences(other)
        if not differences:
            return
        more = len(differences) - _SHOWN_DIFFERENCES
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise OutputError(f"out={str(out)!r}: holds images of another request ({shown}); {advice}")


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings by short names: those of the request by their own, others as "weights.net"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "request":
            flat |= value
        elif isinstance(value, dict):
            flat |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[name] = value
    return flat


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it has none. Raises OutputError for a damaged one."""
    path = folder / MANIFEST
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: not a readable manifest: {first_line(error)}") from None
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise OutputError(f"{path}: a manifest of format {found}; this version of admfast reads {FORMAT}")
    try:
        manifest = Manifest(**settings)
        sizes = (manifest.images, manifest.batch_size, manifest.shard_size, *manifest.shape)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes of {sizes}")
        return manifest
    except (TypeError, ValueError) as error:
        raise OutputError(f"{path}: not a readable manifest: {first_line(error)}") from None


def require_manifest(folder: Path) -> Manifest:
    """Return the manifest of a run's folder. Raises InvalidArgument if it has none."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise invalid("run", str(folder), f"the folder of `admfast sample`, with {MANIFEST}")
    return manifest


def create_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest unless the folder has one; return that of the folder, of whichever process it is."""
    if write_new(folder / MANIFEST, manifest.to_json().encode()):
        return manifest
    return require_manifest(folder)


def format_ranges(numbers: Sequence[int]) -> str:
    """Return numbers in order as text, such as "0-3,7"."""
    if isinstance(numbers, range) and numbers.step == 1 and len(numbers) > 1:
        return f"{numbers.start}-{numbers.stop - 1}"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def parse_ranges(text: str) -> list[range]:
    """Return the ranges of a text that `format_ranges` made."""
    ends = [[int(number) for number in part.split("-")] for part in text.split(",")]
    return [range(pair[0], pair[-1] + 1) for pair in ends]


def draw(seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a random number for each seed: SplitMix64, a bijection (Steele et al. 2014)."""
    z = seeds + np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64, as numpy computes with arrays
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_labels(seeds: Iterable[int], num_classes: int) -> list[int]:
    """Return the class that "random" draws for each seed."""
    return (draw(np.array(list(seeds), dtype=np.uint64)) % np.uint64(num_classes)).tolist()
