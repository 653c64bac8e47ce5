"""Collect the images of a finished run: one npz, PNG files, or tar files as WebDataset reads them.

Nothing holds more than a piece of the images in memory. This module doesn't import torch.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from admfast.errors import invalid
from admfast.files.atomic import atomic_open, check_not_existing, make_folder
from admfast.files.image_files import SAMPLE_NAME, sample_name
from admfast.files.images import encode_png, read_image, write_png
from admfast.files.npz import write_streamed
from admfast.runs.manifest import Manifest, require_manifest
from admfast.runs.shards import LEASES, PARTS, SHARDS, ShardFiles, shard_name

UInt8 = NDArray[np.uint8]
Count = Callable[[int], object]
_TAR = re.compile(r"shard-\d{6,}\.tar")


class FinishedRun:
    """The images of a finished run, of both kinds of files.

    count: called with the number of images that were read, for a progress bar.
    Raises InvalidArgument if images are missing.
    """

    def __init__(self, folder: Path, count: Count = lambda images: None) -> None:
        self.folder, self._count = folder, count
        self.manifest: Manifest = require_manifest(folder)
        self.shards = ShardFiles(folder, self.manifest)
        if self.manifest.files == "npz":
            missing = self.manifest.shards - len(self.shards.finished_shards())
            if missing:
                allowed = f"a finished run; {missing} of {self.manifest.shards} shards are missing"
                raise invalid("run", str(folder), f"{allowed}: the command that began it goes on with it")
        else:
            for i in range(self.manifest.images):
                if not (path := self._png_path(i)).is_file():
                    allowed = f"a finished run; {path.name} is missing"
                    raise invalid("run", str(folder), f"{allowed}: the command that began it goes on with it")

    def pieces(self, shard: int) -> Iterator[tuple[range, UInt8]]:
        """Yield the images of a shard in pieces, each with its indices."""
        if self.manifest.files == "npz":
            pieces: Iterable[tuple[range, UInt8]] = self.shards.batches_of(shard)
        else:
            pieces = self._png_pieces()
        for indices, images in pieces:
            yield indices, images
            self._count(len(images))

    def images(self, shard: int) -> Iterator[tuple[int, int | None, int, UInt8]]:
        """Yield (index, class, seed, image) of the images of a shard."""
        for indices, images in self.pieces(shard):
            labels = self.manifest.labels_of(indices)
            seeds = self.manifest.seeds_of(indices).tolist()
            numbers = [None] * len(indices) if labels is None else labels.tolist()
            yield from zip(indices, numbers, seeds, images, strict=True)

    def _png_pieces(self) -> Iterator[tuple[range, UInt8]]:
        """Yield the images of a run of PNG files one by one."""
        for i in range(self.manifest.images):
            yield range(i, i + 1), self._png(i)[None]

    def between(self, first: int, stop: int) -> Iterator[UInt8]:
        """Yield the images first .. stop - 1; only the files that hold them are read."""
        if self.manifest.files == "png":
            yield from map(self._png, range(first, stop))
            return
        for shard in range(self.manifest.shards):
            images = self.manifest.shard_images(shard)
            if images.start < stop and images.stop > first:
                for indices, piece in self.pieces(shard):
                    yield from piece[max(0, first - indices.start) : max(0, stop - indices.start)]

    def _png(self, i: int) -> UInt8:
        """Return image i of a run of PNG files."""
        path = self._png_path(i)
        image = read_image(path)
        if image.shape != tuple(self.manifest.shape):
            allowed = f"an image of {self.manifest.shape}, as the manifest says; this is {image.shape}"
            raise invalid("run", str(path), allowed)
        return image

    def _png_path(self, i: int) -> Path:
        return self.folder / "images" / self.manifest.file_name(i)


def _check_place(run: FinishedRun, out: Path) -> None:
    """Reject the folder of the run and those in it that hold its files."""
    folder, target = run.folder.resolve(), out.resolve()
    inner = [folder / name for name in (SHARDS, PARTS, LEASES, "images")]
    if target == folder or any(path in (target, *target.parents) for path in inner):
        raise invalid("out", str(out), f"another place than that of the run's own files, {run.folder}")


def merge(run: FinishedRun, out: Path, overwrite: bool = False) -> None:
    """Write all images of a run as the published npz: `arr_0` uint8 [N, H, W, C] and `arr_1` int64 [N].

    Raises InvalidArgument for a run that is not finished or a damaged shard, OutputError.
    """
    _check_place(run, out)
    if not overwrite:
        check_not_existing("out", [out])
    manifest = run.manifest
    labels = None
    if manifest.num_classes is not None:
        labels = np.empty(manifest.images, dtype=np.int64)
        for shard in range(manifest.shards):
            indices = manifest.shard_images(shard)
            own = manifest.labels_of(indices)
            assert own is not None
            labels[indices.start : indices.stop] = own
    make_folder(out.parent)
    images = (image for shard in range(manifest.shards) for _, piece in run.pieces(shard) for image in piece)
    write_streamed(out, (manifest.images, *manifest.shape), images, labels)


def export_png(run: FinishedRun, out: Path, overwrite: bool = False) -> None:
    """Write a PNG file for each image into a folder. Raises as `merge`.

    With `overwrite`, files of images that the run hasn't are removed at the end, other files are not.
    """
    _check_place(run, out)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        check_not_existing("out", [out])
    make_folder(out)
    for shard in range(run.manifest.shards):
        for i, label, seed, image in run.images(shard):
            write_png(out / sample_name(i, label, seed), image)
    for path in out.iterdir():
        match = SAMPLE_NAME.fullmatch(path.name)
        if match and ((i := int(match[1])) >= run.manifest.images or path.name != run.manifest.file_name(i)):
            path.unlink()


def export_webdataset(run: FinishedRun, out: Path, overwrite: bool = False) -> None:
    """Write a tar file for each shard into a folder: for each image KEY.png, KEY.cls and KEY.json.

    The files have the same bytes wherever and whenever they are made. With `overwrite`, tar files of other
    shards are removed at the end; without it, a folder that holds any is refused. Raises as `merge`.
    """
    _check_place(run, out)
    paths = [out / f"{shard_name(shard)}.tar" for shard in range(run.manifest.shards)]
    older = [path for path in out.glob("*.tar") if _TAR.fullmatch(path.name)]
    if not overwrite:
        check_not_existing("out", older)
    make_folder(out)
    for shard, path in enumerate(paths):
        with atomic_open(path) as file:
            _write_tar(file, run.images(shard))
    for path in set(older) - set(paths):
        path.unlink()


def _write_tar(file: BinaryIO, images: Iterable[tuple[int, int | None, int, UInt8]]) -> None:
    """Write the images of a shard as the members of a tar file."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, label, seed, image in images:
            facts = {"seed": seed} if label is None else {"seed": seed, "class": label}
            members = {"png": encode_png(image), "json": json.dumps(facts).encode()}
            if label is not None:
                members["cls"] = str(label).encode()
            for ending, data in members.items():
                entry = tarfile.TarInfo(f"{i:09d}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


EXPORTS = {"png": export_png, "webdataset": export_webdataset}
