"""Read sets of images: a published archive, a folder of image files, or a single image file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from admfast.errors import invalid
from admfast.files.images import read_image
from admfast.files.npz import Samples, read_samples
from admfast.files.paths import user_path

ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")  # the published loader's, and .bmp and .webp


def read_image_set(path: str | PathLike[str], channels: int | None = None) -> Samples:
    """Read images as uint8 [N, H, W, C]: an npz with its classes, or image files in the order of their names.

    A folder is read with its subfolders, as in the published loader, but without hidden files. channels:
    number of channels to convert image files to, see `read_image`; an archive must have this number.

    Raises:
        InvalidArgument: in one line, for a path without images, or images that differ in size or channels.
    """
    path_or_folder = user_path("path", path)
    if path_or_folder.suffix == ".npz":
        samples = read_samples(path_or_folder)
        if channels not in (None, samples.images.shape[3]):
            actual = f"arr_0 of {samples.images.shape[3]} channels"
            raise invalid("path", str(path), f"images of {channels} channels; this has {actual}")
        return samples
    files = _image_files(path_or_folder) if path_or_folder.is_dir() else [path_or_folder]
    images = [read_image(file, channels) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            first_shape = f"{files[0]} has {images[0].shape}"
            raise invalid("path", str(file), f"images of one size; this has {image.shape}, {first_shape}")
    return Samples(np.stack(images))


def _image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted by path."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not path.is_dir()]
    paths = [
        path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise invalid("path", str(folder), f"a folder with image files ({', '.join(ENDINGS)}), or an npz")
    return sorted(paths)
