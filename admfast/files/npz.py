"""The published npz archive of samples: `arr_0` uint8 [N, H, W, C] and, with classes, `arr_1` int64 [N].

Reading never unpickles.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from admfast.errors import InvalidArgument, first_line, invalid
from admfast.files.atomic import atomic_open


@dataclass(frozen=True)
class Samples:
    """Images uint8 [N, H, W, C], and their classes int64 [N] if the archive has them."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None


def write_streamed(
    path: str | PathLike[str],
    shape: tuple[int, ...],
    images: Iterable[NDArray[np.uint8]],
    labels: ArrayLike | None = None,
    others: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write the published archive, whole or not at all, holding one image at a time in memory.

    Args:
        path: file name, used as given (`np.savez` would append .npz).
        shape: (N, H, W, C) of all images.
        images: N arrays uint8 [H, W, C].
        labels: [N] integers, stored as int64; None writes no `arr_1`.
        others: further arrays by name, which readers of the published archive ignore.

    Raises:
        InvalidArgument: for images of another shape, dtype or number, or labels that don't fit.
        OutputError: if the file can't be written.
    """
    if labels is not None:
        labels = check_labels(np.asarray(labels), shape[0], "labels")
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
    count = 0
    with atomic_open(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for count, image in enumerate(images, 1):
                if image.dtype != np.uint8 or image.shape != tuple(shape[1:]):
                    actual = f"{image.dtype} {image.shape}"
                    raise invalid(f"images[{count - 1}]", actual, f"uint8 {tuple(shape[1:])}")
                entry.write(np.ascontiguousarray(image).data)
        if count != shape[0]:
            raise invalid("images", f"{count} images", f"{shape[0]}, as the shape says")
        arrays = {} if labels is None else {"arr_1": np.asarray(labels)}
        for name, array in (arrays | dict(others or {})).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def read_samples(path: str | PathLike[str]) -> Samples:
    """Read a published archive of samples; arrays other than `arr_0` and `arr_1` are ignored.

    Raises:
        InvalidArgument: in one line, for a file that is missing, truncated or no npz, has no `arr_0`, or has
            an `arr_0` or `arr_1` of another dtype or shape.
    """
    with _open_npz(path) as archive:
        if "arr_0" not in archive.files:
            raise invalid("path", str(path), f"has no array arr_0 (has {_comma_list(archive.files)})")
        images = _check_images(archive["arr_0"], f"{path}: arr_0")
        labels = None
        if "arr_1" in archive.files:
            labels = check_labels(archive["arr_1"], len(images), f"{path}: arr_1")
    return Samples(images, labels)


def read_array(path: str | PathLike[str], name: str) -> NDArray[Any] | None:
    """Return an array of an npz, None if it has none of that name. Raises InvalidArgument for a damaged
    file."""
    with _open_npz(path) as archive:
        return archive[name] if name in archive.files else None


def array_header(path: str | PathLike[str], name: str = "arr_0") -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of an array of an npz without reading its values. Raises as `iter_array`."""
    with _array_file(path, name) as file:
        shape, _, dtype = _read_header(file)
        return shape, dtype


def iter_array(
    path: str | PathLike[str], batch_size: int, name: str = "arr_0", first: int = 0
) -> Iterator[NDArray[Any]]:
    """Yield an array of an npz in batches along its first axis, holding one batch at a time in memory.

    The batches begin at the row `first`; the last may be shorter. An array in Fortran order has no contiguous
    batches and is read whole.

    Raises:
        InvalidArgument: in one line, during iteration, for a file that is missing, is no npz, lacks the
            array, or ends early.
    """
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "1 or more")
    with _array_file(path, name) as file:
        yield from _batches(file, batch_size, first)


def read_rows(path: str | PathLike[str], indices: Sequence[int], name: str = "arr_0") -> NDArray[Any]:
    """Return the rows of an array of an npz with these indices (from 0; at least one), in their order.

    One pass over the file holds only these rows in memory. An array in Fortran order is read whole.

    Raises:
        InvalidArgument: as `iter_array`, and for an index that no row has.
    """
    with _array_file(path, name) as file:
        return _rows(file, indices)


@contextlib.contextmanager
def _array_file(path: str | PathLike[str], name: str) -> Iterator[IO[bytes]]:
    """Open the .npy file of an array in an npz; raise InvalidArgument in one line for any damage."""
    with _errors_that_name(path), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            raise invalid("path", str(path), f"has no array {name} (has {_comma_list(names)})")
        with archive.open(f"{name}.npy") as file:
            yield file


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether in Fortran order, dtype) of the .npy array that `file` holds."""
    major, _ = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are not read")
    return shape, fortran, dtype


def _batches(file: IO[bytes], batch_size: int, first: int) -> Iterator[NDArray[Any]]:
    """Yield batches of the .npy array that `file` holds."""
    shape, fortran, dtype = _read_header(file)
    if not shape:
        raise ValueError("holds a single number, not an array")
    if fortran:
        values = np.frombuffer(file.read(), dtype).reshape(shape[::-1]).transpose()
        yield from (values[start : start + batch_size] for start in range(first, shape[0], batch_size))
        return
    row = math.prod(shape[1:])
    file.seek(first * row * dtype.itemsize, os.SEEK_CUR)
    for start in range(first, shape[0], batch_size):
        count = min(batch_size, shape[0] - start)
        data = file.read(count * row * dtype.itemsize)
        if len(data) < count * row * dtype.itemsize:
            raise EOFError("the array ends early")
        yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _rows(file: IO[bytes], indices: Sequence[int]) -> NDArray[Any]:
    """Return rows of the .npy array that `file` holds, read forward: to seek back would unpack again."""
    shape, fortran, dtype = _read_header(file)
    if not shape:
        raise ValueError("holds a single number, not an array")
    if min(indices) < 0 or max(indices) >= shape[0]:
        raise ValueError(f"has the rows 0 to {shape[0] - 1}, not {min(indices)} to {max(indices)}")
    if fortran:
        return np.frombuffer(file.read(), dtype).reshape(shape[::-1]).transpose()[list(indices)]
    size, position, rows = math.prod(shape[1:]) * dtype.itemsize, 0, {}
    for index in sorted(set(indices)):
        file.seek((index - position) * size, os.SEEK_CUR)
        data, position = file.read(size), index + 1
        if len(data) < size:
            raise EOFError("the array ends early")
        rows[index] = np.frombuffer(data, dtype).reshape(shape[1:])
    return np.stack([rows[index] for index in indices])


@contextlib.contextmanager
def _open_npz(path: str | PathLike[str]) -> Iterator[Any]:
    """Open an npz; raise InvalidArgument in one line for any damage."""
    with _errors_that_name(path):
        archive = np.load(path, allow_pickle=False)
        if not hasattr(archive, "files"):
            raise invalid("path", str(path), "a single .npy array, not an .npz archive")
        with archive:
            yield archive


@contextlib.contextmanager
def _errors_that_name(path: str | PathLike[str]) -> Iterator[None]:
    """Turn exceptions of numpy and zipfile into InvalidArgument in one line that names the file."""
    try:
        yield
    except InvalidArgument:
        raise
    except FileNotFoundError:
        raise invalid("path", str(path), "no such file") from None
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise invalid("path", str(path), _reason(path, error)) from error


def _reason(path: str | PathLike[str], error: BaseException) -> str:
    """Return why an npz can't be read."""
    text = first_line(error)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        magic = file.read(4)
        if not magic:
            return "the file is empty"
        if "pickle" in text and magic[:2] == b"PK":
            return "holds pickled objects, which are not read"
        if magic[:2] != b"PK":
            return "not an npz archive"
        return f"truncated or damaged: {text}"
    return getattr(error, "strerror", None) or text


def _comma_list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _check_images(images: NDArray[Any], argument: str) -> NDArray[np.uint8]:
    """Reject an array that isn't uint8 [N, H, W, C]."""
    if images.dtype != np.uint8:
        raise invalid(f"{argument}.dtype", str(images.dtype), "uint8 (levels 0..255)")
    if images.ndim != 4:
        raise invalid(f"{argument}.shape", images.shape, "[N, H, W, C]")
    return images


def check_labels(labels: NDArray[Any], count: int, argument: str) -> NDArray[np.int64]:
    """Reject labels that aren't one integer for every image; return them as int64."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise invalid(f"{argument}.dtype", str(labels.dtype), "integers")
    if labels.shape != (count,):
        raise invalid(f"{argument}.shape", labels.shape, f"one class for each of the {count} images")
    if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
        raise invalid(argument, int(labels.max()), "classes below 2^63")
    return labels.astype(np.int64)
