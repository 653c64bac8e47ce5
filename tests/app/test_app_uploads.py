"""Tests of uploads: what is changed is said, and what is no image, or too large, is one line."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from admfast.app.uploads import MOST_BYTES, convert_upload
from admfast.errors import InvalidArgument


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file that says it has these sides."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(min(height * (width + 1), 40_000_000)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_photograph_becomes_what_the_model_takes():
    wide = Image.new("RGB", (60, 40), (255, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 50, 40))
    made = convert_upload("photo.jpg", encoded(wide, "JPEG", quality=100), 32, 1)
    assert made.image.shape == (32, 32, 1) and (made.image > 200).all()
    assert made.note == "60x40 pixels, cut to the middle square, resized to 32x32, made grey"
    inverted = convert_upload("photo.jpg", encoded(wide), 32, 1, inverted=True)
    assert (inverted.image < 50).all() and inverted.note.endswith("inverted")


def test_an_image_that_fits_is_not_changed():
    array = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    made = convert_upload("a.png", encoded(Image.fromarray(array)), 32, 3)
    np.testing.assert_array_equal(made.image, array)
    assert made.note == "32x32 pixels"


def test_a_turned_photograph_is_turned_back():
    image = Image.new("L", (32, 32))
    image.paste(255, (0, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    made = convert_upload("a.png", encoded(image, exif=exif), 32, 1)
    assert made.image[-8:].min() == 255 and made.image[:24].max() == 0


def transparent(mode: str) -> bytes:
    """Return a PNG of this mode: black ink at the left; the right is transparent, and black or nearly."""
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (4, 0, 8, 8))
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode, (8, 8))
        picture.putalpha(alpha)
        return encoded(picture)
    picture = Image.new(mode, (8, 8), 0)
    if mode == "P":
        picture.putpalette([0, 0, 0, 0, 0, 0])
    picture.paste(1 if mode != "RGB" else (1, 1, 1), (4, 0, 8, 8))
    return encoded(picture, transparency=1 if mode != "RGB" else (1, 1, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_blended_on_white(mode):
    for channels in (1, 3):
        made = convert_upload("ink.png", transparent(mode), 8, channels)
        assert (made.image[:, :4] == 0).all() and (made.image[:, 4:] == 255).all()
        assert made.note == "8x8 pixels, blended on white" + ", made grey" * (channels == 1)
    kept = convert_upload("ink.png", transparent(mode), 8, 4)
    assert (kept.image[:, :4, 3] == 255).all() and (kept.image[:, 4:, 3] == 0).all()
    assert "white" not in kept.note


def test_half_transparent_is_half_white_and_what_is_opaque_keeps_its_colours():
    half = convert_upload("a.png", encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), 8, 3)
    assert (half.image == 127).all() and half.note == "8x8 pixels, blended on white"
    opaque = convert_upload("a.png", encoded(Image.new("RGBA", (8, 8), (9, 8, 7, 255))), 8, 3)
    assert (opaque.image == (9, 8, 7)).all() and opaque.note == "8x8 pixels"


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_does(orientation):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(pixels), exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(convert_upload("a.png", content, 8, 1).image[..., 0], wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbagegarbage", b"Exif\0\0II+\0", b"Exif\0\0II*\0\x08\0\0\0\xff"]
)
def test_exif_that_cant_be_read_says_nothing(exif):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    made = convert_upload("a.png", encoded(Image.fromarray(pixels), exif=exif), 8, 1)
    np.testing.assert_array_equal(made.image[..., 0], pixels)
    assert made.note == "8x8 pixels"


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", b"<svg onload='alert(1)'/>", b"\x89PNG\r\n\x1a\nxxxx", bytes(MOST_BYTES + 1),
     bomb(200_000, 200_000), bomb(20_000, 20_000), bomb(6000, 6000),
     encoded(Image.new("I;16", (8, 8))), encoded(Image.new("L", (64, 64)))[:60]],
    ids=["empty", "text", "svg", "damaged", "large", "huge bomb", "bomb", "small bomb", "16 bits", "half"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_what_is_no_image_is_one_line(content):
    name = "../../etc/<script>.png"
    with pytest.raises(InvalidArgument, match="^upload='../../etc/<script>.png': ") as raised:
        convert_upload(name, content, 32, 1)
    assert "\n" not in str(raised.value)


def test_a_long_name_is_cut():
    with pytest.raises(InvalidArgument) as raised:
        convert_upload("x" * 5000, b"", 32, 1)
    assert len(str(raised.value)) < 200
