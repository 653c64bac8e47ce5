"""Cache decoded images in memory or in a file: of each image, the part that all its crops share.

The file holds these parts one after the other (uint8, [H, W, C]), then an npz with their offsets, their
shapes and the errors of broken images, and then the length of the npz and a magic number. It is written
atomically. Its name is a digest of everything that its content depends on.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from admfast import checks, host
from admfast.errors import AdmfastError
from admfast.files.atomic import atomic_open, check_folder
from admfast.files.images import UInt8
from admfast.files.sources import BrokenImage, Source
from admfast.training.crops import cacheable_part, convert_channels, let_pillow_reuse_memory
from admfast.training.samples import Samples

_MAGIC = b"admimgs1"
_FOOTER = struct.Struct("<Q8s")  # length of the npz before it, magic number
_IMAGES_AHEAD_PER_THREAD = 16  # images per thread that are decoded ahead of the one that is being written


def cache_samples(
    samples: Samples, folder: str | PathLike[str] | None = None, threads: int | None = None
) -> Samples:
    """Return equal samples that come from a cache. Each image is decoded once, during this call.

    The cache holds centre crops as they are. For random crops, it holds each image after the halvings that
    every crop begins with; its shorter side is then at most 2.5 times `size`.

    Args:
        folder: folder of the cache file, which is mapped into memory; it is created if it is missing. A file
            from an earlier call with the same images and settings is used again. None keeps the cache in
            memory, which worker processes share.
        threads: number of decoding threads; None takes one for each CPU that this process may use.

    Raises:
        BrokenImage: if more images are broken than `samples` allows.
        AdmfastError: for a damaged cache file, or if the images would take more than half of the memory.
        OutputError: if the file can't be written.
    """
    threads = host.usable_cpus() if threads is None else checks.whole_number("threads", threads, 1)
    if folder is None:
        memory = io.BytesIO()
        _write_cache(memory, samples, threads, limit=host.memory_limit() // 2)
        source = CachedSource(samples.source, np.frombuffer(memory.getbuffer(), np.uint8))
    else:
        path = Path(folder) / f"{_cache_digest(samples)}.images"
        if not path.exists():
            check_folder(folder)
            with atomic_open(path) as file:
                _write_cache(file, samples, threads)
        source = CachedSource(samples.source, path)
    result = copy.copy(samples)
    result.source = source
    return result


class CachedSource:
    """A source whose decoded images are in memory (an array) or in a file (its path)."""

    def __init__(self, source: Source, location: Path | NDArray[np.uint8]) -> None:
        self._source, self._location = source, location
        self.labels, self.class_names = source.labels, source.class_names
        self._open_cache()

    def __getstate__(self) -> dict[str, Any]:
        read_again = (
            "_data",
            "_starts",
            "_shapes",
            "_broken",
        )  # a mapped file would be pickled as its content
        return {name: value for name, value in vars(self).items() if name not in read_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_cache()

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def identity(self) -> str:
        return self._source.identity()

    def decode(self, index: int) -> UInt8:
        if str(index) in self._broken:
            raise BrokenImage(self._broken[str(index)])
        start, shape = int(self._starts[index]), self._shapes[index]
        return self._data[start : start + int(shape.prod())].reshape(shape)

    def _open_cache(self) -> None:
        data = self._location
        try:
            if isinstance(data, Path):
                data = np.memmap(data, np.uint8, mode="r")
            length, magic = _FOOTER.unpack(data[-_FOOTER.size :].tobytes())
            if magic != _MAGIC:
                raise ValueError("the magic number at its end is wrong")
            index = io.BytesIO(data[-_FOOTER.size - length : -_FOOTER.size].tobytes())
            with np.load(index, allow_pickle=False) as tables:
                self._starts, self._shapes = tables["starts"], tables["shapes"]
                self._broken: dict[str, str] = json.loads(str(tables["broken"]))
        except (OSError, ValueError, KeyError, EOFError, struct.error, zipfile.BadZipFile) as error:
            raise AdmfastError(f"{self._location}: damaged, remove it: {error}") from error
        self._data = np.asarray(data)  # slicing a memmap takes several times as long


def _write_cache(file: BinaryIO, samples: Samples, threads: int, limit: int | None = None) -> None:
    """Write the cache of all images. limit: largest size of the decoded images in bytes."""
    starts, shapes, broken = [], [], {}
    start = 0
    checked = copy.copy(samples)
    checked.broken = dict(samples.broken)
    parts = _decode_cacheable_parts(samples, threads)
    parts = tqdm(parts, "decoding", len(samples.source), unit=" images", disable=None)
    for index, part in enumerate(parts):
        if isinstance(part, BrokenImage):
            broken[index] = str(part)
            checked.add_broken({index: str(part)})
            part = np.empty((0, 0, samples.channels), np.uint8)
        if limit is not None and start + part.nbytes > limit:
            problem = f"the decoded images would take more than {limit / 1e9:.1f} GB, half of the memory"
            raise AdmfastError(f"{problem}: keep them in a folder")
        file.write(np.ascontiguousarray(part).data)
        starts.append(start)
        shapes.append(part.shape)
        start += part.nbytes
    tables = io.BytesIO()
    np.savez(tables, starts=np.array(starts), shapes=np.array(shapes), broken=np.array(json.dumps(broken)))
    file.write(tables.getvalue() + _FOOTER.pack(len(tables.getvalue()), _MAGIC))


def _decode_cacheable_parts(samples: Samples, threads: int) -> Iterator[UInt8 | BrokenImage]:
    """Yield the shared part of every image, or its error, in order. Pillow decodes without the GIL."""

    def decode(index: int) -> UInt8 | BrokenImage:
        try:
            image = convert_channels(samples.source.decode(index), samples.channels)
        except BrokenImage as error:
            return error
        return cacheable_part(image, samples.size, samples.random_crop)

    let_pillow_reuse_memory()
    with ThreadPoolExecutor(threads) as pool:
        indices, chunk = range(len(samples.source)), threads * _IMAGES_AHEAD_PER_THREAD
        for first in indices[::chunk]:
            yield from pool.map(decode, indices[first : first + chunk])


def _cache_digest(samples: Samples) -> str:
    """Return a digest of everything that the content of the cache depends on."""
    settings = (samples.source.identity(), samples.size, samples.channels, samples.random_crop)
    return hashlib.sha256(repr((_MAGIC, PIL.__version__, *settings)).encode()).hexdigest()[:32]
