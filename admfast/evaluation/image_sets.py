"""Sets of images to evaluate, read in batches: an npz, a folder or zip of image files, or arrays in
memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admfast.checks import whole_numbers
from admfast.errors import InvalidArgument, invalid
from admfast.files.image_files import SAMPLE_NAME
from admfast.files.npz import array_header, check_labels, iter_array, read_array, read_rows
from admfast.files.paths import user_path
from admfast.files.sources import Source, open_source

UInt8 = NDArray[np.uint8]
_DIGITS = 18  # of a number that int64 holds
_DECODERS = 4  # threads that decode image files


class ImageSet(ABC):
    """Images of one size, in a fixed order.

    Attributes: name: for messages. shape: (H, W, C). labels: class of each image, None without classes.
    labels_are_numbers: whether a label is the number of the class, and not the rank of its name.
    path: of a file or folder, None for images in memory.
    """

    name: str
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None = None
    labels_are_numbers = True
    path: Path | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        """Yield the images first .. stop - 1 in batches of `size`, uint8 [n, H, W, C]; the last may be
        shorter.

        Raises InvalidArgument for an image that can't be read or has another size, naming it.
        """

    def pick(self, indices: Iterable[int]) -> UInt8:
        """Return the images with these indices in this order, uint8 [n, H, W, C]; an index may repeat.

        Memory: these images. Raises InvalidArgument as `batches`, and for an index that no image has.
        """
        chosen = whole_numbers("indices", indices, 0, len(self) - 1)
        return self._pick(chosen) if chosen else np.empty((0, *self.shape), np.uint8)

    def _pick(self, indices: Sequence[int]) -> UInt8:
        """Return the images with these indices, which were checked; at least one."""
        images = {index: next(self.batches(index, index + 1, 1))[0] for index in sorted(set(indices))}
        return np.stack([images[index] for index in indices])

    def image_name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return f"{self.name}[{index}]"

    @property
    def is_jpeg(self) -> bool:
        """Tell whether the images come from JPEG files, whose artefacts change the measures."""
        return False


class ArrayImages(ImageSet):
    """Images in memory: uint8 [N, H, W, C]."""

    def __init__(self, images: Any, labels: Any = None, name: str = "images") -> None:
        self._images = np.asarray(images)
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or 0 in self._images.shape:
            actual = f"{self._images.dtype} {self._images.shape}"
            raise invalid(name, actual, "uint8 [N, H, W, C], none empty")
        self.name, self.shape = name, self._images.shape[1:]
        if labels is not None:
            self.labels = check_labels(np.asarray(labels), len(self._images), f"{name}: labels")

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        for start in range(first, stop, size):
            yield self._images[start : min(start + size, stop)]

    def _pick(self, indices: Sequence[int]) -> UInt8:
        return self._images[indices]


class NpzImages(ImageSet):
    """The images `arr_0` of a published archive, a batch in memory at a time, with the classes `arr_1`."""

    path: Path

    def __init__(self, path: Path, name: str) -> None:
        shape, dtype = array_header(path, "arr_0")
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape:
            raise invalid(name, f"{path}: arr_0 {dtype} {shape}", "uint8 [N, H, W, C], none empty")
        self.path, self.name = path, str(path)
        self._count, self.shape = shape[0], (shape[1], shape[2], shape[3])
        labels = read_array(path, "arr_1")
        self.labels = None if labels is None else check_labels(labels, self._count, f"{name}: arr_1")

    def __len__(self) -> int:
        return self._count

    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        position = first
        for batch in iter_array(self.path, size, first=first):
            yield batch[: stop - position]
            position += len(batch)
            if position >= stop:
                return

    def _pick(self, indices: Sequence[int]) -> UInt8:
        return read_rows(self.path, indices)


class FileImages(ImageSet):
    """Image files in a folder or zip, in the order of their names, decoded in threads."""

    def __init__(self, source: Source, path: Path, name: str) -> None:
        self._source, self.path, self.name, self._argument = source, path, str(path), name
        self._channels = 1
        self.shape = self._read(0).shape
        self._channels = self.shape[2]
        self.labels, self.labels_are_numbers = _file_labels(source)

    def __len__(self) -> int:
        return len(self._source)

    def image_name(self, index: int) -> str:
        return self._source.name(index)

    @property
    def is_jpeg(self) -> bool:
        return any(self._source.name(i).lower().endswith((".jpg", ".jpeg")) for i in range(len(self._source)))

    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(first, stop, size):
                yield self._decode(pool, range(start, min(start + size, stop)))

    def _pick(self, indices: Sequence[int]) -> UInt8:
        with ThreadPoolExecutor(_DECODERS) as pool:
            return self._decode(pool, indices)

    def _decode(self, pool: ThreadPoolExecutor, indices: Sequence[int]) -> UInt8:
        images = list(pool.map(self._read, indices))
        for index, image in zip(indices, images, strict=True):
            if image.shape != self.shape:
                found = f"{self.image_name(index)} has {image.shape}"
                kind = ", all grey" if self._channels == 1 else ""
                raise invalid(self._argument, found, f"images of one size{kind}: the first has {self.shape}")
        return np.stack(images)

    def _read(self, index: int) -> UInt8:
        image = np.asarray(self._source.decode(index))
        if image.ndim == 2:
            image = image[..., None]
        # A grey picture among coloured ones is shown in colour, as every program does.
        return image.repeat(3, axis=2) if (image.shape[2], self._channels) == (1, 3) else image


def _file_labels(source: Source) -> tuple[NDArray[np.int64] | None, bool]:
    """Return the classes of image files, None without, and whether they are numbers and not ranks of names.

    They are the numbers in the names of `admfast sample`, or names of folders or prefixes. A prefix that
    every file has, or each its own, is no class.
    """
    matches = (SAMPLE_NAME.fullmatch(PurePath(source.name(i)).name) for i in range(len(source)))
    sampled = [None if match is None else match[2] for match in matches]
    if None not in sampled:
        return np.array(sampled).astype(np.int64), True
    names = source.class_names
    if source.labels is None or any(sampled) or len(names) == len(source) > 1:
        return None, True
    are_numbers = all(name.isdecimal() and len(name) < _DIGITS for name in names)
    if len(names) == 1 and not are_numbers:
        return None, True
    ranks = np.array(source.labels, dtype=np.int64)
    return (np.array(list(map(int, names)), dtype=np.int64)[ranks], True) if are_numbers else (ranks, False)


def open_images(path: str | PathLike[str], name: str = "samples", labels: str = "auto") -> ImageSet:
    """Return the images of an npz, a folder with its subfolders, or a zip.

    Args:
        path: the file or folder; of an npz, `arr_0` uint8 [N, H, W, C] and, if present, the classes `arr_1`.
        name: the argument that errors name.
        labels: where the classes of files come from, see `admfast.files.sources.open_source`.

    Raises:
        InvalidArgument: for a path without images, or with other contents.
    """
    found = user_path(name, path)
    if found.suffix.lower() == ".npz" and not found.is_dir():
        try:
            return NpzImages(found, name)
        except InvalidArgument as error:
            raise InvalidArgument(str(error).replace("path=", f"{name}=", 1)) from None
    return FileImages(open_source(found, labels, argument=name), found, name)
