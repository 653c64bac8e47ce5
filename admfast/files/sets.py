"""Sets of images: a published archive, a folder of image files, or a single one."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from admfast.errors import invalid
from admfast.files.images import read_image
from admfast.files.npz import Samples, read_samples

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_set(path: str | PathLike[str]) -> Samples:
    """Read images as uint8 [N, H, W, C]: an npz with its classes, or image files in the order of their names.

    Raises:
        InvalidArgument: in one line, for a path without images, or images that differ in size or channels.
    """
    place = Path(path)
    if place.suffix == ".npz":
        return read_samples(place)
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in ENDINGS)
        if not files:
            raise invalid("path", str(path), f"a folder with image files ({', '.join(ENDINGS)}), or an npz")
    images = [read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            first = f"{files[0].name} has {images[0].shape}"
            raise invalid("path", str(file), f"images of one size; this has {image.shape}, {first}")
    return Samples(np.stack(images))
