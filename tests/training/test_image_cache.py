"""Tests that a cache of decoded images changes no sample, decodes each image once, and is reused."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.errors import AdmfastError, InvalidArgument, OutputError
from admfast.files.images import UInt8, write_png
from admfast.files.sources import ArraySource, BrokenImage, open_source
from admfast.training.cache import cache_samples
from admfast.training.samples import Samples, iterate_batches

RNG = np.random.default_rng(0)
SIDES = [(40, 60), (64, 40), (17, 90), (90, 17), (33, 33), (8, 200)]


class Counted:
    """A source of images with different sides that counts decoded images."""

    labels, class_names = (1, 0, 1, 0, 0, 0), ("a", "b")
    images = [RNG.integers(0, 256, (*sides, 3)).astype(np.uint8) for sides in SIDES]

    def __init__(self) -> None:
        self.decoded = 0

    def __len__(self) -> int:
        return len(SIDES)

    def name(self, index: int) -> str:
        return f"image {index}"

    def identity(self) -> str:
        return "counted"

    def decode(self, index: int) -> UInt8:
        self.decoded += 1
        return self.images[index]


def assert_same(a: Samples, b: Samples, count: int = 18) -> None:
    for k in range(count):
        (x, label), (y, other) = a.at(k), b.at(k)
        assert torch.equal(x, y) and label == other


@pytest.mark.parametrize("kept", ["memory", "folder"])
@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_samples_are_the_same_and_nothing_is_decoded_again(tmp_path, kept, random_crop, channels):
    plain = Samples(Counted(), 7, 8, channels, random_crop)
    source = Counted()
    samples = Samples(source, 7, 8, channels, random_crop)
    folder = tmp_path / "cache" if kept == "folder" else None
    fast = cache_samples(samples, folder, threads=3)
    assert source.decoded == len(SIDES)
    assert_same(fast, plain)
    assert_same(pickle.loads(pickle.dumps(fast)), plain)
    for batch in iterate_batches(fast, [[4, 5], [17]], workers=1):
        for k, image in zip(batch.sample_ids, batch.images, strict=True):
            assert torch.equal(image, plain.at(k)[0])
    assert source.decoded == len(SIDES) and samples.source is source
    if folder is not None:
        assert_same(cache_samples(samples, folder), plain)
        assert source.decoded == len(SIDES) and len(list(folder.iterdir())) == 1


def test_what_all_crops_share_is_small(tmp_path):
    large = ArraySource(np.zeros((4, 512, 512, 3), np.uint8), None, "a", "a")
    cache_samples(Samples(large, 0, 16, random_crop=False), tmp_path)
    cache_samples(Samples(large, 0, 16, random_crop=True), tmp_path)
    sizes = sorted(path.stat().st_size for path in tmp_path.iterdir())
    assert 4 * 3 * 16**2 < sizes[0] < 4 * 3 * 16**2 + 2000
    assert 4 * 3 * 32**2 < sizes[1] < 4 * 3 * 32**2 + 2000


def test_other_images_and_settings_have_a_cache_of_their_own(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "x.png", Counted.images[0])
    settings = {"seed": 0, "size": 8}
    made = [cache_samples(Samples(open_source(images), **settings), tmp_path / "cache")]
    for more in ({"channels": 1}, {"random_crop": True}, {"size": 9}):
        made.append(cache_samples(Samples(open_source(images), **{**settings, **more}), tmp_path / "cache"))
    write_png(images / "x.png", Counted.images[1])
    last = cache_samples(Samples(open_source(images), **settings), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert_same(last, Samples(open_source(images), **settings), 2)
    # Another seed and no flips still use the same cache.
    other = {**settings, "seed": 5, "random_flip": False}
    assert_same(
        cache_samples(Samples(open_source(images), **other), tmp_path / "cache"),
        Samples(open_source(images), **other),
        2,
    )
    assert len(list((tmp_path / "cache").iterdir())) == 5


@pytest.fixture
def broken(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(Counted.images):
        write_png(folder / f"{i}.png", image)
    (folder / "2.png").write_bytes(b"text")
    return folder


@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_broken_images_stay_broken(tmp_path, broken, kept):
    plain = Samples(open_source(broken), 3, 8, random_crop=True)
    for _ in range(2):
        fast = cache_samples(
            Samples(open_source(broken), 3, 8, random_crop=True), tmp_path if kept == "folder" else None
        )
        with pytest.warns(UserWarning, match="2.png"):
            images = [fast.at(k)[0] for k in range(6)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert all(torch.equal(image, plain.at(k)[0]) for k, image in enumerate(images))


def test_too_many_broken_images_are_an_error_and_no_cache(tmp_path, broken):
    with pytest.raises(BrokenImage, match="2.png"):
        cache_samples(Samples(open_source(broken), 3, 8, max_broken=0), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: b"", lambda data: data[:-16] + bytes(16)]
)
def test_a_damaged_cache_is_named(tmp_path, damage):
    samples = Samples(Counted(), 0, 8)
    cache_samples(samples, tmp_path)
    (place,) = tmp_path.iterdir()
    place.write_bytes(damage(place.read_bytes()))
    with pytest.raises(AdmfastError, match=place.name):
        cache_samples(samples, tmp_path)


def test_a_cache_in_memory_has_a_limit(monkeypatch):
    monkeypatch.setattr("admfast.host.memory_limit", lambda: 2 * 6 * 8 * 8 * 3)
    cache_samples(Samples(Counted(), 0, 8))
    monkeypatch.setattr("admfast.host.memory_limit", lambda: 2 * 6 * 8 * 8 * 3 - 2)
    with pytest.raises(AdmfastError, match="memory"):
        cache_samples(Samples(Counted(), 0, 8))


def test_mistakes(tmp_path):
    samples = Samples(Counted(), 0, 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        cache_samples(samples, tmp_path / "file")
    with pytest.raises(InvalidArgument, match="threads"):
        cache_samples(samples, threads=0)
