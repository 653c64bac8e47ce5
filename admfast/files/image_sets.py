"""Read sets of images: a published archive, a folder of image files, or a single image file."""

from __future__ import annotations

from os import PathLike

import numpy as np

from admfast.errors import invalid
from admfast.files.image_files import ENDINGS, list_folder
from admfast.files.images import read_image
from admfast.files.npz import Samples, read_samples
from admfast.files.paths import user_path


def read_image_set(path: str | PathLike[str], channels: int | None = None) -> Samples:
    """Read images as uint8 [N, H, W, C]: an npz with its classes, or image files in the order of their names.

    A folder is read with its subfolders, as in the published loader, but without hidden files. channels:
    number of channels to convert image files to, see `read_image`; an archive must have this number.

    Raises:
        AdmfastError: for a folder that can't be read.
        InvalidArgument: in one line, for a path without images, or images that differ in size or channels.
    """
    path_or_folder = user_path("path", path)
    if path_or_folder.suffix == ".npz":
        samples = read_samples(path_or_folder)
        if channels not in (None, samples.images.shape[3]):
            actual = f"arr_0 of {samples.images.shape[3]} channels"
            raise invalid("path", str(path), f"images of {channels} channels; this has {actual}")
        return samples
    files = [path_or_folder]
    if path_or_folder.is_dir():
        files = [path_or_folder.joinpath(*names) for names in list_folder(path_or_folder, "path")]
        if not files:
            allowed = f"a folder with image files ({', '.join(ENDINGS)}), or an npz"
            raise invalid("path", str(path_or_folder), allowed)
    images = [read_image(file, channels) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            first_shape = f"{files[0]} has {images[0].shape}"
            raise invalid("path", str(file), f"images of one size; this has {image.shape}, {first_shape}")
    return Samples(np.stack(images))
