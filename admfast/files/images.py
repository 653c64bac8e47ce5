"""Read and write image files as uint8 arrays, and draw grids of samples with a row for every class."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from admfast.errors import InvalidArgument, first_line, invalid
from admfast.files.atomic import atomic_open

UInt8 = NDArray[np.uint8]
Picture = UInt8 | Image.Image  # pixels [H, W, C] with C = 1 or 3, or Pillow's "L" or "RGB" image

TILE = 64  # pixels: smaller images are enlarged in a grid until their longer side has at least this many
PADDING = 4  # pixels between tiles and around the grid
_FONT_SIZE = 14  # pixels; fits beside a tile of 64
_LABEL_LENGTH = 28  # characters of a label that are shown
_BACKGROUND, _INK = (255, 255, 255), (0, 0, 0)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode for a number of channels
# Pillow's mode of an image file -> the mode it is converted to. 16-bit and float modes are refused.
_CONVERTED_MODES = dict.fromkeys(("1", "L"), "L")
_CONVERTED_MODES |= dict.fromkeys(("P", "RGB", "CMYK", "YCbCr"), "RGB")
_CONVERTED_MODES |= dict.fromkeys(("LA", "PA", "RGBA"), "RGBA")
# EXIF orientation -> what makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises for damaged files, including errors of the modules that it uses.
_DAMAGE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def write_png(path: str | PathLike[str], image: UInt8) -> None:
    """Write one image as PNG, whole or not at all.

    Args:
        path: file name, used as given.
        image: uint8, [H, W] or [H, W, C] with C = 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        InvalidArgument: for another dtype, shape or number of channels.
        OutputError: if the file can't be written.
    """
    picture = _to_pillow(image, "image")
    with atomic_open(path) as file:
        picture.save(file, format="PNG")


def encode_png(image: UInt8) -> bytes:
    """Return the content of a PNG file; image, raises: as for `write_png`."""
    data = io.BytesIO()
    _to_pillow(image, "image").save(data, format="PNG")
    return data.getvalue()


def read_image(path: str | PathLike[str], channels: int | None = None) -> UInt8:
    """Return the content of an image file as uint8 [H, W, C] with C = 1, 3 or 4.

    channels: number of channels to convert to: 1 is grey (ITU-R 601 luma), 3 RGB, 4 RGB and alpha. As in the
    published loader, alpha is dropped, not blended, and grey is repeated. None keeps those of `open_image`.

    Raises:
        InvalidArgument: as `open_image`, and for a file whose EXIF orientation says that it must be turned
            (the published loader ignores that).
    """
    picture = open_image(path)
    if (orientation := exif_orientation(picture)) != 1:
        allowed = f"an image that is stored upright; this one has EXIF orientation {orientation}"
        raise invalid("path", str(path), allowed)
    array = np.asarray(picture if channels is None else picture.convert(MODES[channels]))
    return array[:, :, None] if array.ndim == 2 else array


def open_image(
    path: str | PathLike[str], content: bytes | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Return the decoded picture of an image file: grey ("L"), "RGB" or "RGBA", as the file has it.

    Palettes become RGB (RGBA if they have transparency); CMYK and YCbCr become RGB; bilevel becomes grey. If
    a file holds several pictures, the first is read.

    Args:
        path: file name.
        content: the bytes of the file, if they were read already; `path` then only names it in errors.
        most_pixels: a larger image is refused before it is decoded; None refuses what Pillow refuses.

    Raises:
        InvalidArgument: for a file that is missing, damaged, not an image, or grey of over 8 bits (which
            Pillow would clip; of colours with 16 bits it reads the upper 8).
    """
    name = str(path)
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as picture:
            mode = picture.mode
            if most_pixels is not None and picture.width * picture.height > most_pixels:
                sides = f"{picture.width}x{picture.height}"
                raise invalid("path", name, f"an image of at most {most_pixels:,} pixels; this has {sides}")
            if mode not in _CONVERTED_MODES:
                raise invalid(
                    "path", name, f"an image of 8 bits a channel; this one has Pillow's mode {mode}"
                )
            target_mode = "RGBA" if mode == "P" and "transparency" in picture.info else _CONVERTED_MODES[mode]
            picture.load()  # which closes the file
            return picture if mode == target_mode else picture.convert(target_mode)
    except InvalidArgument:
        raise
    except FileNotFoundError:
        raise invalid("path", name, "no such file") from None
    except UnidentifiedImageError:
        raise invalid("path", name, "not an image in a format that Pillow reads") from None
    except _DAMAGE_ERRORS as error:
        raise invalid("path", name, f"not readable as an image: {first_line(error)}") from error


def exif_orientation(picture: Image.Image) -> int:
    """Return how an image must be turned, 2 to 8 as EXIF numbers it; 1 if it is upright or doesn't say.

    EXIF that can't be read says nothing.
    """
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE_ERRORS:
        return 1
    return orientation if orientation in _TURNS else 1


def turn_upright(picture: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says.

    Pillow's `exif_transpose` also writes the tags anew, which fails for damaged ones.
    """
    orientation = exif_orientation(picture)
    return picture if orientation == 1 else picture.transpose(_TURNS[orientation])


def labelled_grid(
    images: UInt8,
    labels: Sequence[int] | NDArray[np.integer] | None = None,
    names: Mapping[int, str] | Sequence[str] | None = None,
    columns: int | None = None,
) -> UInt8:
    """Arrange samples in a grid with a row for every class; its label and name are at the left.

    Images whose longer side is below 64 pixels are repeated by the smallest whole factor that brings it to 64
    or more (nearest neighbour: no pixel is blended). A class with more samples than `columns` continues in
    further rows. Text is drawn in Pillow's own font, which has only Latin letters.

    Args:
        images: uint8, [N, H, W] or [N, H, W, C] with C = 1, 3 or 4 (alpha is blended on white).
        labels: [N] class of every image; rows are in ascending order of class, samples in the order given.
            None: one grid without labels.
        names: name to write next to each label, by label.
        columns: samples per row; None takes the size of the largest class, or without labels ceil(sqrt(N)).

    Returns:
        uint8 [grid height, grid width, 3].

    Raises:
        InvalidArgument: for images, labels or columns that don't fit.
    """
    images = _as_batch(images)
    if labels is not None and len(labels) != len(images):
        raise invalid("labels", f"{len(labels)} labels", f"one for each of the {len(images)} images")
    if columns is not None and columns < 1:
        raise invalid("columns", columns, "1 or more")
    if labels is None:
        columns = columns or math.ceil(math.sqrt(len(images)))
        groups = [("", list(range(len(images))))]
    else:
        indices_by_class = {
            int(c): np.flatnonzero(np.asarray(labels) == c).tolist() for c in np.unique(labels)
        }
        columns = columns or max(map(len, indices_by_class.values()))
        groups = [(_label_text(label, names), members) for label, members in indices_by_class.items()]
    rows = []
    for text, members in groups:
        for start in range(0, len(members), columns):
            rows.append((text if start == 0 else "", members[start : start + columns]))
    return _draw(images, rows, columns)


def write_grid(
    path: str | PathLike[str],
    images: UInt8,
    labels: Sequence[int] | NDArray[np.integer] | None = None,
    names: Mapping[int, str] | Sequence[str] | None = None,
    columns: int | None = None,
) -> None:
    """Write `labelled_grid` of the same arguments as PNG. Raises InvalidArgument and OutputError."""
    write_png(path, labelled_grid(images, labels, names, columns))


def _draw(images: UInt8, rows: list[tuple[str, list[int]]], columns: int) -> UInt8:
    """Draw the rows of (text, indices of images)."""
    height, width = images.shape[1:3]
    factor = max(1, math.ceil(TILE / max(height, width)))
    tile_h, tile_w = height * factor, width * factor
    font = ImageFont.load_default(_FONT_SIZE)
    text_w = max((math.ceil(font.getlength(text)) for text, _ in rows), default=0)
    left = PADDING + (text_w + PADDING if text_w else 0)
    # A row of tiles lower than the text is as high as the text.
    row_h = max(tile_h, _FONT_SIZE if text_w else 0)
    size = (left + columns * (tile_w + PADDING), PADDING + len(rows) * (row_h + PADDING))
    canvas = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for row, (text, members) in enumerate(rows):
        top = PADDING + row * (row_h + PADDING)
        if text:
            pen.text((PADDING, top + row_h / 2), text, fill=_INK, font=font, anchor="lm")
        for column, index in enumerate(members):
            enlarged = images[index].repeat(factor, axis=0).repeat(factor, axis=1)
            tile = _to_pillow(enlarged, "images").convert("RGBA")
            canvas.paste(tile, (left + column * (tile_w + PADDING), top), mask=tile)
    return np.asarray(canvas)


def _label_text(label: int, names: Mapping[int, str] | Sequence[str] | None) -> str:
    """Return the label and its name, if it has one, cut to `_LABEL_LENGTH` characters."""
    if isinstance(names, Mapping):
        name = names.get(label, "")
    else:
        name = names[label] if names is not None and 0 <= label < len(names) else ""
    text = f"{label} {name}".strip() if name != str(label) else name
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 2] + ".."


def _as_batch(images: UInt8) -> UInt8:
    """Return images as [N, H, W, C] with at least one image; dtype and channels of the first are checked."""
    images = np.asarray(images)
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise invalid("images.shape", images.shape, "[N, H, W] or [N, H, W, C], N of 1 or more")
    _to_pillow(images[0], "images")
    return images if images.ndim == 4 else images[..., None]


def _to_pillow(image: UInt8, argument: str) -> Image.Image:
    """Return a uint8 image as a Pillow image; reject any other with an error that names `argument`."""
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise invalid(f"{argument}.dtype", str(image.dtype), "uint8 (levels 0..255)")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise invalid(f"{argument}.shape", image.shape, "[H, W] or [H, W, C], no side empty")
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        raise invalid(f"{argument}.shape", image.shape, f"a PNG has 1, 3 or 4 channels, not {image.shape[2]}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(image))
