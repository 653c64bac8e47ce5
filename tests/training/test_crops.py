"""Tests that crops equal Pillow's filters applied one after the other, exactly, for all sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from admfast.training.crops import cacheable_part, center_crop, convert_channels, random_crop

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels)).astype(np.uint8)


def filtered(image: np.ndarray, shorter: int) -> np.ndarray:
    """Halve by box filters while the shorter side is at least 2 `shorter`, then apply one bicubic filter."""
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    while min(picture.size) >= 2 * shorter:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    width, height = picture.size
    picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


SIDES = st.integers(1, 150)
SIZES = st.integers(1, 70)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIZES, st.sampled_from([1, 3]))
def test_the_centre(height, width, size, channels):
    image = noise(height, width, channels)
    before = image.copy()
    whole = filtered(image, size)
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    expected = whole[top : top + size, left : left + size]
    assert np.array_equal(center_crop(image, size), expected)
    assert np.array_equal(center_crop(cacheable_part(image, size, random=False), size), expected)
    assert np.array_equal(image, before)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIZES, st.sampled_from([1, 3]), st.lists(st.floats(0, 0.999), min_size=3, max_size=3))
def test_anywhere(height, width, size, channels, shares):
    image = noise(height, width, channels)
    counts, values = [], []

    def draw(count: int) -> int:
        counts.append(count)
        values.append(int(shares[len(values)] * count))
        return values[-1]

    crop = random_crop(image, size, draw)
    shorter, top, left = values
    assert counts[0] == -(-size * 5 // 4) - size + 1, "the crop should be 80 to 100 % of the shorter side"
    whole = filtered(image, size + shorter)
    assert counts[1:] == [whole.shape[0] - size + 1, whole.shape[1] - size + 1]
    assert np.array_equal(crop, whole[top : top + size, left : left + size])
    again = iter(values)
    shared = cacheable_part(image, size, random=True)
    assert np.array_equal(random_crop(shared, size, lambda count: next(again)), crop)


@pytest.mark.parametrize("sides", [(512, 512), (512, 768), (1024, 640)], ids=str)
def test_large_images(sides):
    image = noise(*sides, 3)
    assert np.array_equal(filtered(image, 64).shape[:2], np.array(sides) * 64 // min(sides))
    top, left = (np.array(filtered(image, 64).shape[:2]) - 64) // 2
    assert np.array_equal(center_crop(image, 64), filtered(image, 64)[top : top + 64, left : left + 64])


def test_channels():
    grey, colour = noise(5, 6, 1), noise(5, 6, 3)
    assert convert_channels(grey, 1) is grey and convert_channels(colour, 3) is colour
    assert np.array_equal(convert_channels(grey, 3), np.concatenate([grey] * 3, axis=2))
    luminance = Image.fromarray(colour).convert("L")
    assert np.array_equal(convert_channels(colour, 1), luminance)
    assert np.array_equal(convert_channels(convert_channels(grey, 3), 1), grey[:, :, 0])
    picture = Image.fromarray(colour)
    assert convert_channels(picture, 3) is picture


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_cut_like_their_pixels(channels):
    image = noise(70, 90, channels)
    picture = Image.fromarray(image.squeeze(2) if channels == 1 else image)
    for size in (8, 70, 90):
        assert np.array_equal(center_crop(picture, size), center_crop(image, size))
        assert np.array_equal(cacheable_part(picture, size, True), cacheable_part(image, size, True))
        crops = [random_crop(x, size, lambda count: count // 2) for x in (picture, image)]
        assert np.array_equal(*crops)
