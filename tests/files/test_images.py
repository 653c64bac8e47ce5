"""Tests of PNG files and labelled grids."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from admfast.errors import InvalidArgument, OutputError
from admfast.files.images import labelled_grid, read_image, write_grid, write_png

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (1, 1, 3)], ids=str)
def test_png_keeps_every_level(tmp_path, shape):
    image = noise(*shape)
    write_png(tmp_path / "x.png", image)
    back = read_image(tmp_path / "x.png")
    assert back.dtype == np.uint8
    assert back.shape == (image if image.ndim == 3 else image[..., None]).shape
    assert np.array_equal(back.reshape(image.shape), image)
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_takes_strided_input(tmp_path):
    image = noise(6, 8, 3)[::2, ::-1]
    write_png(tmp_path / "x.png", image)
    assert np.array_equal(read_image(tmp_path / "x.png"), image)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (noise(4, 4, 2), "2"),
        (noise(4, 4, 6), "6"),
        (noise(4), "image.shape"),
        (noise(1, 4, 4, 3), "image.shape"),
        (noise(0, 4, 3), "image.shape"),
        (noise(4, 4, 3).astype(np.float32), "image.dtype='float32'"),
        (noise(4, 4, 3).astype(np.int64), "uint8"),
    ],
    ids=lambda value: str(getattr(value, "shape", "")),
)
def test_what_a_png_cant_hold_is_refused_by_name(tmp_path, image, said):
    with pytest.raises(InvalidArgument, match=said):
        write_png(tmp_path / "x.png", image)
    assert not (tmp_path / "x.png").exists()


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        write_png(tmp_path / "no" / "x.png", noise(4, 4))


def test_reading_other_modes(tmp_path):
    colours = noise(6, 6, 3)
    Image.fromarray(colours).quantize(8).save(tmp_path / "palette.png")
    expected = np.asarray(Image.open(tmp_path / "palette.png").convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "palette.png"), expected)
    Image.fromarray(colours[..., 0] > 100).save(tmp_path / "bits.png")
    assert np.array_equal(read_image(tmp_path / "bits.png")[..., 0], 255 * (colours[..., 0] > 100))
    Image.fromarray(colours[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(InvalidArgument, match="8 bits a channel; this one has Pillow's mode I;16"):
        read_image(tmp_path / "deep.png")


def test_files_that_are_no_images(tmp_path):
    write_png(tmp_path / "whole.png", noise(50, 50, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-3000])
    (tmp_path / "text.png").write_text("hello")
    for name, said in (("cut", "truncated"), ("text", "not an image"), ("missing", "no such file")):
        with pytest.raises(InvalidArgument, match=said) as caught:
            read_image(tmp_path / f"{name}.png")
        assert f"{name}.png" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbagegarbage", b"Exif\0\0II+\0"])
def test_exif_that_cant_be_read_says_nothing(tmp_path, exif):
    image = noise(6, 6, 3)
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    with pytest.raises((SyntaxError, struct.error)):
        Image.open(tmp_path / "x.png").getexif()
    assert np.array_equal(read_image(tmp_path / "x.png"), image)


def test_grid_without_labels_places_every_tile(tmp_path):
    images = noise(5, 70, 80, 3)
    grid = labelled_grid(images)  # 3 columns, 2 rows; sides of 64 pixels or more aren't enlarged
    assert grid.shape == (4 + 2 * (70 + 4), 4 + 3 * (80 + 4), 3)
    for index, image in enumerate(images):
        top, left = 4 + (index // 3) * 74, 4 + (index % 3) * 84
        assert np.array_equal(grid[top : top + 70, left : left + 80], image)
    assert (grid[4 + 74 :, 4 + 2 * 84 :] == 255).all()  # the sixth place stays empty


@pytest.mark.parametrize(("side", "factor"), [(8, 8), (28, 3), (32, 2), (63, 2), (64, 1), (256, 1)])
def test_small_images_are_repeated_to_64_pixels(side, factor):
    image = noise(1, side, side, 1)
    grid = labelled_grid(image)
    assert grid.shape == (side * factor + 8, side * factor + 8, 3)
    expected = np.kron(image[0, ..., 0], np.ones((factor, factor), np.uint8))
    assert np.array_equal(grid[4:-4, 4:-4, 0], expected)


def test_rows_are_classes_and_labels_are_drawn():
    images = np.zeros((5, 64, 64, 3), np.uint8)
    images[:, :, :, 0] = np.arange(10, 60, 10)[:, None, None]
    grid = labelled_grid(images, labels=[7, 2, 7, 2, 7], names={2: "two", 7: "a seven"})
    rows = [4 + 68 * row for row in range(2)]
    assert grid.shape[0] == 4 + 2 * 68
    left = grid.shape[1] - 3 * 68
    seen = [[int(grid[top + 9, left + 68 * column + 9, 0]) for column in range(3)] for top in rows]
    assert seen == [[20, 40, 255], [10, 30, 50]]
    ink = [(grid[top : top + 64, :left] < 128).any(axis=2) for top in rows]
    assert ink[0].sum() > 20 and ink[1].sum() > 20, "a row has no text"
    assert ink[1].any(axis=0).sum() > ink[0].any(axis=0).sum(), "'7 a seven' should be wider than '2 two'"
    assert not np.array_equal(ink[0], ink[1])
    middle = [np.flatnonzero(row.any(axis=1)).mean() for row in ink]
    assert all(24 < m < 40 for m in middle), "a label is not at the middle of its row"


def test_a_large_class_goes_on_in_further_rows():
    images = np.stack([np.full((64, 64), 10 * i, np.uint8) for i in range(5)])
    grid = labelled_grid(images, labels=[0, 0, 0, 1, 0], columns=2)
    left = grid.shape[1] - 2 * 68
    seen = [[int(grid[4 + 68 * r, left + 68 * c, 0]) for c in range(2)] for r in range(3)]
    assert seen == [[0, 10], [20, 40], [30, 255]]
    written = [bool((grid[4 + 68 * r : 68 + 68 * r, : left - 4] < 128).any()) for r in range(3)]
    assert written == [True, False, True], "the class label should be on its first row only"


def test_alpha_is_blended_on_white():
    images = np.zeros((1, 64, 64, 4), np.uint8)
    images[0, :, :32, 3] = 255
    grid = labelled_grid(images)[4:-4, 4:-4]
    assert (grid[:, :32] == 0).all() and (grid[:, 32:] == 255).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": [1]}, "labels"),
        ({"columns": 0}, "columns=0"),
        ({"images": noise(2, 8, 8, 2)}, "2"),
        ({"images": noise(0, 8, 8, 3)}, "images.shape"),
        ({"images": noise(2, 8, 8, 3) / 255}, "images.dtype"),
    ],
    ids=str,
)
def test_a_grid_refuses(arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        labelled_grid(**{"images": noise(2, 8, 8, 3), **arguments})


def test_names_as_a_list_and_long_names(tmp_path):
    images = noise(2, 32, 32, 3)
    short = labelled_grid(images, [0, 1], ["tench", "goldfish"])
    long = labelled_grid(images, [0, 1], ["tench", "x" * 500])
    assert short.shape[1] < long.shape[1] < 600
    write_grid(tmp_path / "g.png", images, [0, 1], ["tench", "goldfish"])
    assert np.array_equal(read_image(tmp_path / "g.png"), short)
