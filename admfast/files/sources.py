"""Sources of images: a folder of image files, a zip of them, an npz archive, an array in memory.

A source numbers its images in an order that depends only on their names, and decodes them one at a time. It
has no state that a worker process or a resumed run would have to restore.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admfast.checks import one_of
from admfast.errors import AdmfastError, InvalidArgument, invalid
from admfast.files.image_files import ENDINGS, list_folder, list_zip, read_error
from admfast.files.images import Picture, UInt8, open_image
from admfast.files.npz import read_samples
from admfast.files.paths import user_path

CLASS_RULES = ("auto", "folders", "prefixes", "none")
# Largest ratio of the sides. A strip of 1 x 1000, enlarged to 512 px, has 2^28 pixels before it is cropped.
MAX_ASPECT_RATIO = 1000
MAX_CLASSES = 2**20  # each costs a name, and a row of a network's class embedding


class BrokenImage(AdmfastError):
    """One image of a set can't be used; the message names it and says why."""


class Source(Protocol):
    """Images by index, each with a class, or all without classes."""

    @property
    def labels(self) -> tuple[int, ...] | None:
        """Class of every image, 0..len(class_names) - 1; None without classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class; empty without classes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of an image for errors and logs."""

    def identity(self) -> str:
        """Return a text that changes if images are added, removed or changed."""

    def decode(self, index: int) -> Picture:
        """Return one image: uint8 [H, W, C] with C = 1 or 3, or Pillow's picture (np.asarray of a grey one
        has no axis C). Raises BrokenImage if it can't be decoded.
        """


def open_source(
    data: str | PathLike[str],
    classes: str = "auto",
    argument: str = "data",
    named_sources: Mapping[str, Callable[[], Source]] | None = None,
) -> Source:
    """Return the source for a folder, a .zip or a .npz.

    Args:
        data: path, or a name in `named_sources`.
        classes: where the classes of a folder or zip come from: "folders" (the first-level folder of an
            image), "prefixes" (the file name before its first underscore, as published), "none", or "auto":
            folders if all images lie in folders, else prefixes if all file names have one, else none. An npz
            holds its classes in `arr_1`.
        argument: the caller's name for `data`, for errors.
        named_sources: further sources by name, as functions that open them.

    Raises:
        InvalidArgument: if there are no images, or they don't have such classes.
        AdmfastError: if the data can't be read.
    """
    one_of("classes", classes, CLASS_RULES)
    named_sources = named_sources or {}
    path = user_path(argument, data)
    if str(data) in named_sources:
        return named_sources[str(data)]()
    if path.is_dir():
        return FolderSource(path, classes, argument)
    if not path.exists():
        words = "".join(f' (or the word "{name}")' for name in named_sources)
        raise invalid(argument, str(data), f"no such folder or file{words}")
    if path.suffix.lower() == ".npz":
        return npz_source(path, argument)
    if zipfile.is_zipfile(path):
        return ZipSource(path, classes, argument)
    raise invalid(argument, str(data), "a folder with images, a zip of images, or an npz")


class FolderSource:
    """Image files in a folder and its subfolders, without hidden ones, in the published order of names.

    classes, argument: see `open_source`.
    """

    def __init__(self, path: str | PathLike[str], classes: str = "auto", argument: str = "data") -> None:
        self._root = Path(path)
        paths = list(list_folder(self._root, argument))
        self.labels, self.class_names = _find_classes(paths, classes, argument, self._root)
        # Worker processes share the memory of an array. Counting references would copy a list's.
        self._paths = np.array([os.fsencode("/".join(path)) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self._path(index))

    def identity(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self)):
            try:
                stat = self._path(index).stat()
            except OSError as error:
                raise read_error(self.name(index), error) from error
            digest.update(self._paths[index] + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return f"folder {self._root.resolve()} {digest.hexdigest()}"

    def decode(self, index: int) -> Image.Image:
        path = self._path(index)
        try:
            content = path.read_bytes()
        except OSError as error:
            # A fault of the disk, not of the image: skipping the image would change the run.
            raise read_error(str(path), error) from error
        return _decode_image(str(path), content)

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(self._paths[index])


class ZipSource:
    """Image files in a zip, chosen by the same rules as those of a `FolderSource`.

    classes, argument: see `open_source`.
    """

    def __init__(self, path: str | PathLike[str], classes: str = "auto", argument: str = "data") -> None:
        self._root = Path(path)
        self._local = threading.local()
        paths = list_zip(self._archive())
        self._names = ["/".join(path) for path in paths]
        self.labels, self.class_names = _find_classes(paths, classes, argument, self._root)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=threading.local())

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._root}/{self._names[index]}"

    def identity(self) -> str:
        return _file_identity(self._root)

    def decode(self, index: int) -> Image.Image:
        name = self.name(index)
        try:
            content = self._archive().read(self._names[index])
        except OSError as error:
            raise read_error(name, error) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            # RuntimeError means an encrypted file, NotImplementedError an unknown compression.
            raise BrokenImage(f"{name}: not readable from the zip: {error}") from error
        return _decode_image(name, content)

    def _archive(self) -> zipfile.ZipFile:
        """Return an archive that this thread and process opened: reads of a shared one would collide."""
        if getattr(self._local, "process", None) != os.getpid():
            try:
                self._local.archive = zipfile.ZipFile(self._root)
            except (OSError, zipfile.BadZipFile) as error:
                raise read_error(str(self._root), error) from error
            self._local.process = os.getpid()
        return self._local.archive


class ArraySource:
    """Images in memory, uint8 [N, H, W, C] with C = 1, 3 or 4 (the fourth channel is dropped).

    labels: class of every image [N]; None without classes. name, identity: see `Source`. argument: argument
    that errors name.
    """

    def __init__(
        self,
        images: UInt8,
        labels: Sequence[int] | NDArray[np.int64] | None,
        name: str,
        identity: str,
        argument: str = "data",
    ) -> None:
        if images.ndim != 4 or 0 in images.shape or images.shape[3] not in (1, 3, 4):
            raise invalid(
                argument, f"{name}: {images.shape}", "images [N, H, W, C], C of 1, 3 or 4, none empty"
            )
        self._images, self._name, self._identity = images[..., :3], name, identity
        self.labels = None if labels is None else tuple(map(int, labels))
        if self.labels is not None and len(self.labels) != len(images):
            raise invalid(
                argument, f"{name}: {len(self.labels)} labels", f"one for each of {len(images)} images"
            )
        for label in () if self.labels is None else (min(self.labels), max(self.labels)):
            if not 0 <= label < MAX_CLASSES:
                raise invalid(argument, f"{name}: class {label}", f"classes of 0 to {MAX_CLASSES - 1}")
        classes = 0 if self.labels is None else max(self.labels) + 1
        self.class_names = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def identity(self) -> str:
        return self._identity

    def decode(self, index: int) -> UInt8:
        return self._images[index]


def npz_source(path: str | PathLike[str], argument: str = "data") -> ArraySource:
    """Return the source for a published archive: `arr_0` uint8 [N, H, W, C] and, with classes, `arr_1` [N].

    argument: see `open_source`.
    Raises InvalidArgument if the file isn't such an archive or has no images.
    """
    archive = read_samples(path)
    return ArraySource(archive.images, archive.labels, str(path), _file_identity(Path(path)), argument)


def _find_classes(
    paths: Sequence[tuple[str, ...]], rule: str, argument: str, data: Path
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the label of every image and the name of every class; classes are sorted by name."""
    if not paths:
        raise invalid(argument, str(data), f"holds no images ({', '.join(ENDINGS)})")
    not_in_folder = next((path for path in paths if len(path) == 1), None)
    without_prefix = next((path for path in paths if "_" not in path[-1]), None)
    if rule == "folders" and not_in_folder is not None:
        raise invalid("classes", rule, f"{not_in_folder[0]} lies in no folder of {data}")
    if rule == "prefixes" and without_prefix is not None:
        raise invalid("classes", rule, f"{'/'.join(without_prefix)} has no underscore in its name")
    if rule == "auto":
        rule = "folders" if not_in_folder is None else "prefixes" if without_prefix is None else "none"
    if rule == "none":
        return None, ()
    names = [path[0] if rule == "folders" else path[-1].split("_")[0] for path in paths]
    label_of = {name: label for label, name in enumerate(sorted(set(names)))}
    return tuple(label_of[name] for name in names), tuple(label_of)


def _decode_image(name: str, content: bytes) -> Image.Image:
    """Decode an image file to grey or RGB. As published, drop alpha and ignore EXIF's rotation."""
    if not content:
        raise BrokenImage(f"{name}: the file is empty")
    try:
        picture = open_image(name, content)
    except InvalidArgument as error:
        raise BrokenImage(str(error)) from error
    if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
        sides = f"{picture.width}x{picture.height} pixels"
        raise BrokenImage(f"{name}: {sides}, a strip longer than 1:{MAX_ASPECT_RATIO}")
    return picture.convert("RGB") if picture.mode == "RGBA" else picture


def _file_identity(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise read_error(str(path), error) from error
    return f"file {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
