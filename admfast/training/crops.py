"""Crop images as published: halve them by box filter, resize them by bicubic filter, cut out a square.

Source: `center_crop_arr` and `random_crop_arr` of the published image_datasets.py; all pixels are equal.
Pillow's rounding is part of the result: it filters along rows, rounds to 8 bits, then filters along columns.
From version 13 on it filters tall images along columns first, so their pixels depend on Pillow's version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admfast.files.images import Picture, UInt8

MIN_CROP_SHARE, MAX_CROP_SHARE = 0.8, 1.0  # shares of the shorter side that a random crop keeps, as published
_PILLOW_BLOCKS = 4  # pictures that are in memory at the same time while one is read and halved
_BAND_PIXELS = 2**16  # pixels that are halved at once: 256 KiB in colour


def center_crop(image: Picture, size: int) -> UInt8:
    """Return the middle square of an image after resizing its shorter side to `size`.

    Returns: uint8 [size, size, C].
    """
    resized = _resize_shorter_side(image, size)
    top, left = ((side - size) // 2 for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


def random_crop(
    image: Picture,
    size: int,
    draw: Callable[[int], int],
    min_share: float = MIN_CROP_SHARE,
    max_share: float = MAX_CROP_SHARE,
) -> UInt8:
    """Return a random square of an image after resizing its shorter side to a random length.

    Args:
        draw: maps a count n to a random whole number in 0..n-1. Called three times: for the length of the
            shorter side (from size/largest to size/smallest, rounded up), for the square's top, for its left.
        min_share, max_share: shares of the shorter side that the square may keep.

    Returns: uint8 [size, size, C].
    """
    min_side, max_side = math.ceil(size / max_share), math.ceil(size / min_share)
    resized = _resize_shorter_side(image, min_side + draw(max_side - min_side + 1))
    top = draw(resized.shape[0] - size + 1)
    left = draw(resized.shape[1] - size + 1)
    return resized[top : top + size, left : left + size]


def cacheable_part(image: Picture, size: int, random: bool) -> UInt8:
    """Return the part of an image that all its crops to `size` share: crops of it equal crops of the image.

    It is the centre crop itself or, for random crops, the image after the halvings that every crop begins
    with.
    """
    if not random:
        return center_crop(image, size)
    return _to_array(_halve_while_possible(_to_pillow(image), math.ceil(size / MIN_CROP_SHARE)))


def let_pillow_reuse_memory() -> None:
    """Let Pillow reuse the memory of four pictures (at most 16 MiB each) in this process.

    Otherwise the memory of every picture is returned to the system, and clearing new pages for the next one
    takes as long as decoding 512x512 pixels. With reuse, a sample of 64x64 takes 1.9 ms instead of 3.9 ms.
    """
    Image.core.set_blocks_max(max(_PILLOW_BLOCKS, Image.core.get_blocks_max()))


def convert_channels(image: Picture, channels: int) -> Picture:
    """Return an image with 1 or 3 channels: grey is repeated, colours become Pillow's luminance."""
    image_channels = (1 if image.mode == "L" else 3) if isinstance(image, Image.Image) else image.shape[2]
    return image if image_channels == channels else _to_pillow(image).convert("L" if channels == 1 else "RGB")


def _resize_shorter_side(image: Picture, shorter: int) -> UInt8:
    """Resize an image's shorter side to `shorter`: halve it while possible, then filter bicubically."""
    if isinstance(image, np.ndarray) and min(image.shape[:2]) == shorter:
        return image
    picture = _halve_while_possible(_to_pillow(image), shorter)
    ratio = shorter / min(picture.size)
    width, height = (round(side * ratio) for side in picture.size)
    if (width, height) != picture.size:  # else the filter changes nothing
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return _to_array(picture)


def _halve_while_possible(picture: Image.Image, shorter: int) -> Image.Image:
    """Halve a picture by box filter as long as its shorter side stays at least `shorter`."""
    while min(picture.size) >= 2 * shorter:
        width, height = picture.size
        # From version 13 on Pillow filters along the columns of tall images first, which rounds differently.
        if width % 2 or height % 2 or height > 2 * width:
            picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
        else:
            picture = _halve_even_sides(picture)
    return picture


def _halve_even_sides(picture: Image.Image) -> Image.Image:
    """Halve even sides as Pillow's box filter does, in half the time: means of neighbours, .5 rounded up."""
    width, height = picture.size
    raw_mode, dtype = ("L", np.uint8) if picture.mode == "L" else ("RGBX", np.uint32)
    half = np.empty((height // 2, width // 2), dtype)
    # Bands fit into the CPU's cache and reuse memory: clearing new pages costs as much as the filter.
    rows = max(2, _BAND_PIXELS // width // 2 * 2)
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        pixels = np.frombuffer(band.tobytes("raw", raw_mode), dtype).reshape(band.height, width)
        columns = _mean_rounded_up(pixels[:, 0::2], pixels[:, 1::2])
        half[top // 2 : (top + rows) // 2] = _mean_rounded_up(columns[0::2], columns[1::2])
    return Image.frombytes(picture.mode, (width // 2, height // 2), half.tobytes(), "raw", raw_mode)


def _mean_rounded_up(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Return (a + b + 1) // 2 of every byte; an element has one or four bytes."""
    low_bits = a.dtype.type(0x7F7F7F7F & np.iinfo(a.dtype).max)
    return (a | b) - (((a ^ b) >> 1) & low_bits)


def _to_pillow(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _to_array(picture: Image.Image) -> UInt8:
    array = np.asarray(picture)
    return array[:, :, None] if array.ndim == 2 else array
