"""List the image files in a folder or a zip: those that count as images, in the published order of names.

A file has one of the `ENDINGS`. Hidden files and folders are left out. The entries of each folder are sorted
by name, files and folders together.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from admfast.errors import AdmfastError, invalid

ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")  # the published loader's, and .bmp and .webp

# A name by `sample_name`; the groups are the number of the image and its class.
SAMPLE_NAME = re.compile(r"(\d{6,})(?:_class(\d+))?_seed\d+\.png")


def sample_name(i: int, label: int | None, seed: int) -> str:
    """Return the name of the PNG file of sample i of a run."""
    return f"{i:06d}{'' if label is None else f'_class{label}'}_seed{seed}.png"


def list_folder(
    folder: Path, argument: str, parts: tuple[str, ...] = (), ancestors: tuple[Path, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the path of every image in a folder and its subfolders, as a tuple of names. Links are followed.

    argument: argument that gave the folder, for errors. parts, ancestors: names and folders above `folder`.
    Raises: InvalidArgument for a link to a folder that it lies in; AdmfastError if a folder can't be read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise read_error(str(folder), error) from error
    ancestors = (*ancestors, folder.resolve())
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        path = (*parts, entry.name)
        try:
            is_folder = entry.is_dir()
        except OSError as error:  # a link to itself
            raise read_error(entry.path, error) from error
        if is_folder:
            if Path(entry.path).resolve() in ancestors:
                raise invalid(argument, entry.path, "a link to a folder that it lies in")
            yield from list_folder(Path(entry.path), argument, path, ancestors)
        # Reading a pipe would never end. A broken link is an error when it is read.
        elif _is_image(path) and (entry.is_file() or entry.is_symlink()):
            yield path


def list_zip(archive: zipfile.ZipFile) -> list[tuple[str, ...]]:
    """Return the path of every image in a zip, as a tuple of names, in the order of `list_folder`."""
    paths = (tuple(name.split("/")) for name in archive.namelist())
    return sorted(path for path in paths if _is_image(path) and not any(map(_is_hidden, path)))


def read_error(name: str, error: Exception) -> AdmfastError:
    """Return the error for a file or folder that the system can't read."""
    return AdmfastError(f"{name}: not readable: {getattr(error, 'strerror', None) or error}")


def _is_image(path: tuple[str, ...]) -> bool:
    return path[-1].lower().endswith(ENDINGS)


def _is_hidden(name: str) -> bool:
    # In zips made on a Mac, the folder __MACOSX holds attributes of the files, under the files' own names.
    return name.startswith(".") or name == "__MACOSX"
