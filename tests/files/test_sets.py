"""Sets of images from archives, folders and single files."""

from __future__ import annotations

import numpy as np
import pytest

from admfast.errors import InvalidArgument
from admfast.files.images import write_png
from admfast.files.npz import write_streamed
from admfast.files.sets import read_set

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3)).astype(np.uint8)


def test_the_same_images_from_every_place(tmp_path):
    write_streamed(tmp_path / "a.npz", IMAGES.shape, IMAGES, [2, 1, 0])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for i, image in enumerate(IMAGES):
        write_png(folder / f"{i}.png", image)
    assert np.array_equal(read_set(tmp_path / "a.npz").images, IMAGES)
    assert read_set(tmp_path / "a.npz").labels.tolist() == [2, 1, 0]
    assert np.array_equal(read_set(folder).images, IMAGES) and read_set(folder).labels is None
    assert np.array_equal(read_set(folder / "1.png").images, IMAGES[1:2])


def test_what_is_no_set_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match="a folder with image files"):
        read_set(tmp_path)
    write_png(tmp_path / "a.png", IMAGES[0])
    write_png(tmp_path / "b.png", IMAGES[0, :2])
    with pytest.raises(InvalidArgument, match=r"b.png.*images of one size; this has \(2, 6, 3\), a.png has"):
        read_set(tmp_path)
    with pytest.raises(InvalidArgument, match="no such file"):
        read_set(tmp_path / "gone.png")
