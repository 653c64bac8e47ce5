"""Tests of picking images of a set by their indices."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from admfast.errors import InvalidArgument
from admfast.evaluation.image_sets import ArrayImages, ImageSet, open_images
from admfast.files.images import write_png
from admfast.files.npz import read_rows

CHOSEN = [5, 0, 11, 5, 6]


class BatchesOnly(ImageSet):
    """A set that defines only what it must."""

    def __init__(self, images):
        self._images, self.shape, self.name = images, images.shape[1:], "batches"

    def __len__(self):
        return len(self._images)

    def batches(self, first, stop, size):
        for start in range(first, stop, size):
            yield self._images[start : min(start + size, stop)]


def make(kind, images, folder):
    """Return images as a set of a kind."""
    if kind == "array":
        return ArrayImages(images)
    if kind == "batches":
        return BatchesOnly(images)
    if kind == "files":
        for index, image in enumerate(images):
            write_png(folder / f"{index:02}.png", image)
        return open_images(folder)
    path = folder / "images.npz"
    if kind == "fortran":
        np.savez(path, arr_0=np.asfortranarray(images))
    else:
        (np.savez_compressed if kind == "compressed" else np.savez)(path, arr_0=images)
    return open_images(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["array", "batches", "files", "npz", "compressed", "fortran"])
def test_images_are_picked_in_the_given_order(tmp_path, kind, channels):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 7, channels), dtype=np.uint8)
    found = make(kind, images, tmp_path)
    picked = found.pick(CHOSEN)
    assert picked.dtype == np.uint8 and np.array_equal(picked, images[CHOSEN])
    assert found.pick([]).shape == (0, 5, 7, channels)
    for wrong in ([12], [0, -1], [0.5]):
        with pytest.raises(InvalidArgument, match="indices"):
            found.pick(wrong)


def test_a_picked_file_of_another_size_is_named(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_png(tmp_path / "b.png", np.zeros((4, 5, 3), np.uint8))
    images = open_images(tmp_path)
    assert len(images.pick([0])) == 1
    with pytest.raises(InvalidArgument, match=r"samples=.*b\.png"):
        images.pick([0, 1])


def test_rows_are_read_in_one_pass(tmp_path, monkeypatch):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, arr_0=np.arange(100).reshape(50, 2))
    seeks = []
    seek = zipfile.ZipExtFile.seek

    def record(self, offset, whence=0):
        seeks.append((offset, whence))
        return seek(self, offset, whence)

    monkeypatch.setattr(zipfile.ZipExtFile, "seek", record)
    assert read_rows(path, [40, 3, 4, 40]).tolist() == [[80, 81], [6, 7], [8, 9], [80, 81]]
    assert seeks and all(offset >= 0 and whence == 1 for offset, whence in seeks)


@pytest.mark.parametrize("indices", [[-1], [0, 50]])
def test_a_row_that_is_not_there_is_refused(tmp_path, indices):
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=np.zeros((50, 2)))
    with pytest.raises(InvalidArgument, match="rows 0 to 49"):
        read_rows(path, indices)


def test_an_array_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=np.zeros((50, 2), np.uint8))
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content[:-1])
    assert read_rows(path, [48]).shape == (1, 2)
    with pytest.raises(InvalidArgument, match="ends early"):
        read_rows(path, [49])
