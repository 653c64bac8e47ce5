"""The files of a run in shards.

    RUN/manifest.json
    RUN/shards/shard-000003.npz               a finished shard: arr_0 images, arr_1 classes, seeds
    RUN/parts/shard-000004/batch-000002.npy   images of a finished batch of an open shard
    RUN/leases/shard-000004.0                 the process that works on it (`admfast.runs.leases`)

Every file is written whole or not at all, and its name says which seeds it holds. So a process that is killed
loses only the batch at which it was, and no image is there twice. This module doesn't import torch.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admfast.errors import InvalidArgument, OutputError, first_line, invalid
from admfast.files.atomic import make_folder, write_bytes
from admfast.files.npz import iter_array, write_streamed
from admfast.runs.leases import remove_leases
from admfast.runs.manifest import Manifest

SHARDS, PARTS, LEASES = "shards", "parts", "leases"
_SHARD, _PART = re.compile(r"shard-(\d{6,})\.npz"), re.compile(r"batch-(\d{6,})\.npy")
_READ_BYTES = 2**24  # of images that are in memory at a time while shards are read


def shard_name(shard: int) -> str:
    """Return the name of a shard, without an ending."""
    return f"shard-{shard:06d}"


@dataclass(frozen=True)
class ShardFiles:
    """The files of a run in shards: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    def path(self, shard: int) -> Path:
        """Return the path of a finished shard."""
        return self.folder / SHARDS / f"{shard_name(shard)}.npz"

    def part(self, shard: int, batch: int) -> Path:
        """Return the path of a finished batch of an open shard."""
        return self.folder / PARTS / shard_name(shard) / f"batch-{batch:06d}.npy"

    def finished_shards(self) -> set[int]:
        """Return the shards that are finished."""
        found = _numbers(self.folder / SHARDS, _SHARD)
        return {shard for shard in found if shard < self.manifest.shards}

    def finished_batches(self, shard: int) -> set[int]:
        """Return the finished batches of an open shard."""
        return _numbers(self.folder / PARTS / shard_name(shard), _PART)

    def open_shards(self) -> dict[int, int]:
        """Return the number of finished images of every shard that is begun but not finished."""
        done, counts = self.finished_shards(), {}
        with contextlib.suppress(OSError):
            for folder in (self.folder / PARTS).iterdir():
                match = _SHARD.fullmatch(f"{folder.name}.npz")
                if match and (shard := int(match[1])) not in done and shard < self.manifest.shards:
                    batches = self.manifest.batches(shard)
                    counts[shard] = sum(len(batches[i]) for i in self.finished_batches(shard))
        return counts

    def finished_images(self) -> int:
        """Return the number of images in finished shards and in finished batches of open ones."""
        done = sum(len(self.manifest.shard_images(shard)) for shard in self.finished_shards())
        return done + sum(self.open_shards().values())

    def write_part(self, shard: int, batch: int, images: NDArray[np.uint8]) -> None:
        """Write the images of a batch, whole or not at all. Raises OutputError."""
        path = self.part(shard, batch)
        make_folder(path.parent)
        data = io.BytesIO()
        np.save(data, images, allow_pickle=False)
        write_bytes(path, data.getvalue())

    def finish(self, shard: int) -> bool:
        """Write a shard from its batches and remove these; False if one was damaged and has to be made again.

        Raises OutputError.
        """
        images = self.manifest.shard_images(shard)
        make_folder(self.path(shard).parent)
        self._remove_leftovers(shard)
        try:
            write_streamed(
                self.path(shard), (len(images), *self.manifest.shape), self._part_images(shard),
                self.manifest.labels_of(images), {"seeds": self.manifest.seeds_of(images)},
            )  # fmt: skip
        except _DamagedPart as damage:
            damage.path.unlink(missing_ok=True)
            return False
        self.remove_parts(shard)
        return True

    def _part_images(self, shard: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of a shard's batches, one batch in memory at a time."""
        for number, images in enumerate(self.manifest.batches(shard)):
            path = self.part(shard, number)
            try:
                part = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise _DamagedPart(path) from error
            if part.dtype != np.uint8 or part.shape != (len(images), *self.manifest.shape):
                raise _DamagedPart(path)
            yield from part

    def remove_parts(self, shard: int) -> None:
        """Remove the batches and leases of a finished shard."""
        shutil.rmtree(self.folder / PARTS / shard_name(shard), ignore_errors=True)
        remove_leases(self.folder / LEASES, shard_name(shard))

    def remove_empty_folders(self) -> None:
        """Remove what a complete run doesn't need: the folders of parts and leases."""
        for shard in self.finished_shards():
            if (self.folder / PARTS / shard_name(shard)).exists():
                self.remove_parts(shard)
        for name in (PARTS, LEASES):
            with contextlib.suppress(OSError):
                (self.folder / name).rmdir()

    def _remove_leftovers(self, shard: int) -> None:
        """Remove temporary files that a process left which was killed while it wrote this shard."""
        for path in self.path(shard).parent.glob(f".{shard_name(shard)}.npz.*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()

    def batches_of(self, shard: int) -> Iterator[tuple[range, NDArray[np.uint8]]]:
        """Yield the images of a finished shard in pieces of about 16 MB, each with its indices.

        Raises InvalidArgument for a shard that is damaged, or that holds other seeds than the manifest says.
        """
        path, images = self.path(shard), self.manifest.shard_images(shard)
        try:
            yield from self._read(path, images)
        except InvalidArgument as error:
            advice = "remove it, and the command that began the run makes it again"
            raise InvalidArgument(f"{error}; {advice}") from None

    def _read(self, path: Path, images: range) -> Iterator[tuple[range, NDArray[np.uint8]]]:
        """Yield the images of a shard's file in pieces."""
        size = max(1, _READ_BYTES // int(np.prod(self.manifest.shape)))
        seeds = np.concatenate(list(iter_array(path, 2**20, "seeds")))
        if not np.array_equal(seeds, self.manifest.seeds_of(images)):
            raise invalid("run", str(path), "a shard with the seeds that the manifest names")
        first = 0
        for piece in iter_array(path, size):
            yield images[first : first + len(piece)], piece
            first += len(piece)
        if first != len(images):
            raise invalid("run", str(path), f"a shard of {len(images)} images; this has {first}")


class _DamagedPart(Exception):
    """A batch's file is missing or can't be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def _numbers(folder: Path, pattern: re.Pattern[str]) -> set[int]:
    """Return the numbers in the names of a folder's files; none if there is no folder."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise OutputError(f"{folder}: not readable: {first_line(error)}") from None
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}
