"""The published preprocessing: halve by box filter, bring the shorter side to size by bicubic filter, cut.

Source: `center_crop_arr` and `random_crop_arr` of the published image_datasets.py; all levels are equal.
Rounding is part of it: Pillow filters along rows, rounds to 8 bits, then along columns (tall images the other
way round from version 13 on, so that their levels depend on Pillow's version).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admfast.files.images import UInt8

Picture = UInt8 | Image.Image  # pixels [H, W, C] with C = 1 or 3, or Pillow's "L" or "RGB": no copy is made

SMALLEST, LARGEST = 0.8, 1.0  # shares of the shorter side that a random crop keeps, as published
_BLOCKS = 4  # pictures that are alive at once while one is read and halved
_BAND = 2**16  # pixels that are halved at once: 256 KiB of colours


def center_crop(image: Picture, size: int) -> UInt8:
    """Return the middle square of an image whose shorter side has been brought to `size`.

    Returns: uint8 [size, size, C].
    """
    fitted = _fitted(image, size)
    top, left = ((side - size) // 2 for side in fitted.shape[:2])
    return fitted[top : top + size, left : left + size]


def random_crop(
    image: Picture,
    size: int,
    draw: Callable[[int], int],
    smallest: float = SMALLEST,
    largest: float = LARGEST,
) -> UInt8:
    """Return a square of an image whose shorter side has been brought to a length that is drawn.

    Args:
        draw: maps a count n to a whole number in 0..n-1. Called three times: for the length of the shorter
            side (from size/largest to size/smallest, rounded up), for the square's top, for its left.

    Returns: uint8 [size, size, C].
    """
    least, most = math.ceil(size / largest), math.ceil(size / smallest)
    fitted = _fitted(image, least + draw(most - least + 1))
    top = draw(fitted.shape[0] - size + 1)
    left = draw(fitted.shape[1] - size + 1)
    return fitted[top : top + size, left : left + size]


def shared_part(image: Picture, size: int, random: bool) -> UInt8:
    """Return what all crops of an image to `size` have in common: they are cut from it as from the image.

    That is the centre crop itself, or for random crops the image after the halvings that each of them begins
    with.
    """
    if not random:
        return center_crop(image, size)
    return _array(_halved(_picture(image), math.ceil(size / SMALLEST)))


def reuse_memory() -> None:
    """Let Pillow keep the memory of four pictures (16 MiB each at most) for the next ones of this process.

    Otherwise that of every picture goes back to the system, and clearing new pages for the next one takes as
    long as decoding 512x512 pixels (1.9 in place of 3.9 ms a sample of 64x64).
    """
    Image.core.set_blocks_max(max(_BLOCKS, Image.core.get_blocks_max()))


def with_channels(image: Picture, channels: int) -> Picture:
    """Return an image with 1 or 3 channels: grey is repeated, colours become Pillow's luminance."""
    held = (1 if image.mode == "L" else 3) if isinstance(image, Image.Image) else image.shape[2]
    return image if held == channels else _picture(image).convert("L" if channels == 1 else "RGB")


def _fitted(image: Picture, shorter: int) -> UInt8:
    """The image with its shorter side at `shorter`: halved as long as that leaves enough, then bicubic."""
    if isinstance(image, np.ndarray) and min(image.shape[:2]) == shorter:
        return image
    picture = _halved(_picture(image), shorter)
    scale = shorter / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    if (width, height) != picture.size:  # else the filter changes nothing
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return _array(picture)


def _halved(picture: Image.Image, shorter: int) -> Image.Image:
    """The picture halved by box filter as long as its shorter side stays at least `shorter`."""
    while min(picture.size) >= 2 * shorter:
        width, height = picture.size
        # From version 13 on Pillow filters along the columns of tall images first, which rounds otherwise.
        if width % 2 or height % 2 or height > 2 * width:
            picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
        else:
            picture = _half(picture)
    return picture


def _half(picture: Image.Image) -> Image.Image:
    """Pillow's box filter on even sides, at half of its time: means of neighbours, halves rounded up."""
    width, height = picture.size
    raw, dtype = ("L", np.uint8) if picture.mode == "L" else ("RGBX", np.uint32)
    half = np.empty((height // 2, width // 2), dtype)
    # In bands that stay in a cache and in memory that is at hand: fresh pages cost as much as the filter.
    rows = max(2, _BAND // width // 2 * 2)
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        pixels = np.frombuffer(band.tobytes("raw", raw), dtype).reshape(band.height, width)
        columns = _mean(pixels[:, 0::2], pixels[:, 1::2])
        half[top // 2 : (top + rows) // 2] = _mean(columns[0::2], columns[1::2])
    return Image.frombytes(picture.mode, (width // 2, height // 2), half.tobytes(), "raw", raw)


def _mean(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """(a + b + 1) // 2 of every byte, one or four bytes an element."""
    low_bits = a.dtype.type(0x7F7F7F7F & np.iinfo(a.dtype).max)
    return (a | b) - (((a ^ b) >> 1) & low_bits)


def _picture(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _array(picture: Image.Image) -> UInt8:
    array = np.asarray(picture)
    return array[:, :, None] if array.ndim == 2 else array
