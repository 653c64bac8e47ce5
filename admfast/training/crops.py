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

SMALLEST, LARGEST = 0.8, 1.0  # shares of the shorter side that a random crop keeps, as published


def center_crop(image: UInt8, size: int) -> UInt8:
    """Return the middle square of an image whose shorter side has been brought to `size`.

    Args:
        image: [H, W, C], C = 1 or 3.

    Returns:
        [size, size, C].
    """
    fitted = _fitted(image, size)
    top, left = ((side - size) // 2 for side in fitted.shape[:2])
    return fitted[top : top + size, left : left + size]


def random_crop(
    image: UInt8,
    size: int,
    draw: Callable[[int], int],
    smallest: float = SMALLEST,
    largest: float = LARGEST,
) -> UInt8:
    """Return a square of an image whose shorter side has been brought to a length that is drawn.

    Args:
        image: [H, W, C], C = 1 or 3.
        draw: maps a count n to a whole number in 0..n-1. Called three times: for the length of the shorter
            side (from size/largest to size/smallest, rounded up), for the square's top, for its left.

    Returns:
        [size, size, C].
    """
    least, most = math.ceil(size / largest), math.ceil(size / smallest)
    fitted = _fitted(image, least + draw(most - least + 1))
    top = draw(fitted.shape[0] - size + 1)
    left = draw(fitted.shape[1] - size + 1)
    return fitted[top : top + size, left : left + size]


def shared_part(image: UInt8, size: int, random: bool) -> UInt8:
    """Return what all crops of an image to `size` have in common: they are cut from it as from the image.

    That is the centre crop itself, or for random crops the image after the halvings that each of them begins
    with.
    """
    if not random:
        return center_crop(image, size)
    return _array(_halved(_picture(image), math.ceil(size / SMALLEST)))


def with_channels(image: UInt8, channels: int) -> UInt8:
    """Return an image [H, W, C] with 1 or 3 channels: grey is repeated, colours become Pillow's luminance."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return _array(Image.fromarray(image).convert("L"))


def _fitted(image: UInt8, shorter: int) -> UInt8:
    """The image with its shorter side at `shorter`: halved as long as that leaves enough, then bicubic."""
    if min(image.shape[:2]) == shorter:
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
    """Pillow's box filter on even sides, at a third of its time: means of neighbours, halves rounded up."""
    grey = picture.mode == "L"
    raw, dtype = ("L", np.uint8) if grey else ("RGBX", np.uint32)
    pixels = np.frombuffer(picture.tobytes("raw", raw), dtype).reshape(picture.height, picture.width)
    columns = _mean(pixels[:, 0::2], pixels[:, 1::2])
    half = _mean(columns[0::2], columns[1::2])
    size = (half.shape[1], half.shape[0])
    return Image.frombytes(picture.mode, size, half.tobytes(), "raw", raw)


def _mean(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """(a + b + 1) // 2 of every byte, one or four bytes an element."""
    low_bits = a.dtype.type(0x7F7F7F7F & np.iinfo(a.dtype).max)
    return (a | b) - (((a ^ b) >> 1) & low_bits)


def _picture(image: UInt8) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _array(picture: Image.Image) -> UInt8:
    array = np.asarray(picture)
    return array[:, :, None] if array.ndim == 2 else array
