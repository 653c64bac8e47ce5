"""Tests that sample k is a function of (seed, k), for any process, order of samples or broken images."""

from __future__ import annotations

import collections
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from admfast.errors import AdmfastError, InvalidArgument
from admfast.files.images import write_png
from admfast.files.sources import ArraySource, BrokenImage, open_source
from admfast.training.samples import ImageBatch, Samples, epoch_order, iterate_batches

IMAGES = np.random.default_rng(0).integers(0, 256, (13, 20, 27, 3)).astype(np.uint8)
SEED = 2**64 - 3


def source(images: np.ndarray = IMAGES) -> ArraySource:
    return ArraySource(images, [i % 3 for i in range(len(images))], "array", "array")


def made(samples: Samples, sample_ids: Iterable[int]) -> list[tuple[torch.Tensor, int | None]]:
    return [samples.at(k) for k in sample_ids]


def assert_same(a: Iterable, b: Iterable) -> None:
    for (x, label), (y, other) in zip(a, b, strict=True):
        assert torch.equal(x, y) and label == other


ALL = {"random_crop": True, "random_flip": True}


@pytest.fixture
def samples() -> Samples:
    return Samples(source(), SEED, 16, **ALL)


# Values


def test_a_sample(samples):
    image, label = samples.at(5)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and image.is_contiguous()
    assert label == int(epoch_order(13, SEED, 0)[5]) % 3
    assert Samples(ArraySource(IMAGES, None, "a", "a"), 0, 16).at(0)[1] is None


def test_samples_are_the_stored_ones():
    """If these numbers changed, a run that an older version began would resume with other samples."""
    assert epoch_order(8, 1, 0).tolist() == [6, 0, 7, 5, 2, 1, 3, 4]
    ramp = np.arange(8 * 24 * 24 * 1).reshape(8, 24, 24, 1).astype(np.uint8)
    samples = Samples(ArraySource(ramp, None, "ramp", "ramp"), 1, 16, channels=1, **ALL)
    assert [int(samples.at(k)[0].long().sum()) for k in range(4)] == [32765, 31488, 31790, 32710]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    plain = Samples(source(), SEED, 20, random_flip=False)
    whole = [torch.from_numpy(image[:, 3:23].copy()).movedim(2, 0) for image in IMAGES]
    orders = []
    for epoch in range(4):
        images = [x for x, _ in made(plain, range(13 * epoch, 13 * epoch + 13))]
        order = [next(i for i in range(13) if torch.equal(whole[i], x)) for x in images]
        assert sorted(order) == list(range(13)) and order == epoch_order(13, SEED, epoch).tolist()
        orders.append(tuple(order))
    assert len(set(orders)) == 4
    assert epoch_order(13, 0, 0).tolist() != epoch_order(13, 1, 0).tolist()
    # The high word of a seed matters too.
    assert epoch_order(13, 0, 0).tolist() != epoch_order(13, 2**32, 0).tolist()


def test_every_place_of_an_epoch_is_as_likely():
    places = torch.stack([epoch_order(5, seed, 0) for seed in range(2000)])
    counts = torch.stack([(places == image).sum(0) for image in range(5)])
    # 400 expected. The deviation of a binomial count with p = 1/5 is 17.9; all 25 counts are within 4 of it.
    assert (counts - 400).abs().max() < 72


def test_lengths_places_and_flips_are_as_likely():
    """A 4x4 crop of a 5x5 image has one place if the image is resized to 4, else four; half are mirrored."""
    image = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1) * 10
    samples = Samples(ArraySource(image, None, "array", "array"), SEED, 4, channels=1, random_crop=True)
    count = 4000
    seen = collections.Counter(samples.at(k)[0].numpy().tobytes() for k in range(count))
    assert len(seen) == 10
    places = [image[0, top : top + 4, left : left + 4, 0] for top in (0, 1) for left in (0, 1)]
    cut = [seen.pop(part.tobytes()) for place in places for part in (place, place[:, ::-1])]
    for share, numbers in ((1 / 16, cut), (1 / 4, seen.values())):
        # The limit is four deviations of a binomial count.
        assert all(abs(n - share * count) < 4 * (share * (1 - share) * count) ** 0.5 for n in numbers)


def test_a_flip_is_a_mirror_and_off_where_it_is_off():
    still, moving = (Samples(source(), SEED, 20, random_flip=flip) for flip in (False, True))
    flipped = 0
    for k in range(40):
        a, b = still.at(k)[0], moving.at(k)[0]
        flipped += not torch.equal(a, b)
        assert torch.equal(a, b) or torch.equal(a.flip(2), b)
    assert 10 < flipped < 30


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("of_source", [1, 3])
def test_grey_and_colour_networks_take_colour_and_grey_images(channels, of_source):
    samples = Samples(source(IMAGES[..., :of_source]), 0, 16, channels, **ALL)
    image, _ = samples.at(0)
    assert image.shape == (channels, 16, 16)
    if of_source == 1 and channels == 3:
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("size", [16, 64])
def test_images_smaller_than_the_crop_are_enlarged(size):
    assert Samples(source(IMAGES[:, :3, :2]), 0, size, **ALL).at(0)[0].shape == (3, size, size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1), ("seed", 2**64), ("size", 0), ("size", 1.5), ("channels", 2), ("channels", 4),
        ("random_crop", "no"), ("random_flip", 1), ("max_broken", -1),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_name(name, value):
    with pytest.raises(InvalidArgument, match=name):
        Samples(**{"source": source(), "seed": 0, "size": 16, name: value})


@pytest.mark.parametrize("k", [-1, 2**32, 1.0])
def test_numbers_of_samples_are_checked(samples, k):
    with pytest.raises(InvalidArgument, match="k="):
        samples.at(k)
    samples.at(2**32 - 1)


# Processes and workers


def test_any_order_and_any_process_makes_the_same(samples):
    sample_ids = list(range(30))
    forward = made(samples, sample_ids)
    assert_same(reversed(made(samples, reversed(sample_ids))), forward)
    assert_same(made(pickle.loads(pickle.dumps(samples)), sample_ids), forward)
    assert_same(made(Samples(source(), SEED, 16, **ALL), sample_ids[17:]), forward[17:])


def flat(batches: Iterable[ImageBatch]) -> dict[int, tuple[torch.Tensor, int | None]]:
    return {
        k: (image, None if batch.labels is None else int(batch.labels[i]))
        for batch in batches
        for i, (k, image) in enumerate(zip(batch.sample_ids, batch.images, strict=True))
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (2, 1), (4, 0), (4, 2)])
def test_any_number_of_processes_and_workers_sees_the_same_samples(samples, world, workers):
    """Batches of 8 from sample 20 on, in microbatches of 2, pass the end of an epoch."""
    seen: dict[int, tuple[torch.Tensor, int | None]] = {}
    for rank in range(world):
        part = 8 // world
        sample_ids = [
            range(start + micro, start + micro + 2)
            for step in range(3)
            for start in [20 + 8 * step + part * rank]
            for micro in range(0, part, 2)
        ]
        batches = list(iterate_batches(samples, sample_ids, workers))
        assert [batch.sample_ids for batch in batches] == [tuple(numbers) for numbers in sample_ids], (
            "wrong order"
        )
        seen |= flat(batches)
    assert_same((seen[k] for k in range(20, 44)), made(samples, range(20, 44)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_no_end_where_the_numbers_have_none(samples, workers):
    def numbers():
        k = 0
        while True:
            yield [k, k + 1, k + 2]
            k += 3

    batches = iterate_batches(samples, numbers(), workers)
    taken = [next(batches) for _ in range(7)]
    batches.close()
    assert [batch.sample_ids[0] for batch in taken] == list(range(0, 21, 3))
    assert taken[0].images.shape == (3, 3, 16, 16) and taken[0].labels.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(samples, workers):
    torch.manual_seed(0)
    list(iterate_batches(samples, [[0], [1]], workers))
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)


def test_without_classes_a_batch_has_no_labels():
    (batch,) = iterate_batches(Samples(ArraySource(IMAGES, None, "a", "a"), 0, 16), [[0, 1]])
    assert batch.labels is None and batch.images.shape == (2, 3, 16, 16)


def test_the_number_of_workers_is_checked(samples):
    with pytest.raises(InvalidArgument, match="workers"):
        list(iterate_batches(samples, [[0]], -1))


# Broken images


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, image in enumerate(IMAGES):
        write_png(tmp_path / f"{i:02}.png", image)
    (tmp_path / "04.png").write_bytes(b"broken")
    (tmp_path / "11.png").write_bytes(b"")
    return tmp_path


def quiet(samples: Samples, sample_ids: Iterable[int]) -> list[tuple[torch.Tensor, int | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(samples, sample_ids)


def test_broken_images_are_named_once_and_others_take_their_place(folder):
    samples = Samples(open_source(folder), SEED, 16, max_broken=2, **ALL)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        first = made(samples, range(39))
    named = sorted(str(warning.message) for warning in caught_warnings)
    assert len(named) == 2 and "04.png" in named[1] + named[0] and "11.png" in named[0] + named[1]
    assert set(samples.broken) == {4, 11}
    # The samples are the same from any k on, and whether or not the broken images are known already.
    assert_same(made(samples, range(39)), first)
    assert_same(quiet(Samples(open_source(folder), SEED, 16, max_broken=2, **ALL), range(20, 39)), first[20:])
    # Broken images don't change other samples. The replacement of a broken image brings its own class.
    whole = Samples(source(), SEED, 16, **ALL)
    differ = [k for k in range(39) if not torch.equal(whole.at(k)[0], first[k][0])]
    order = torch.cat([epoch_order(13, SEED, epoch) for epoch in range(3)]).tolist()
    assert differ == [k for k in range(39) if order[k] in (4, 11)] and len(differ) == 6
    shown = Samples(open_source(folder), SEED, 20, random_flip=False, max_broken=2)
    images = [image.movedim(0, 2).numpy() for image, _ in quiet(shown, differ)]
    instead = [i for image in images for i in range(13) if np.array_equal(image, IMAGES[i][:, 3:23])]
    assert len(instead) == 6 and len(set(instead)) > 2 and not {4, 11} & set(instead)


class Half(ArraySource):
    """A source whose odd images are broken. It counts the calls of `decode`."""

    decoded: ClassVar[collections.Counter[int]] = collections.Counter()

    def decode(self, index: int) -> np.ndarray:
        self.decoded[index] += 1
        if index % 2:
            raise BrokenImage(self.name(index))
        return super().decode(index)


def test_what_is_known_to_be_broken_is_not_decoded_again():
    quiet(Samples(Half(IMAGES, None, "a", "a"), 0, 16, max_broken=6), range(60))
    assert [Half.decoded[index] for index in range(1, 13, 2)] == [1] * 6


def test_what_takes_a_place_brings_its_class(tmp_path):
    for i, image in enumerate(IMAGES):
        (tmp_path / str(i)).mkdir()
        write_png(tmp_path / str(i) / "x.png", image)
    (tmp_path / "4" / "x.png").write_bytes(b"broken")
    images = open_source(tmp_path)
    assert images.labels is not None
    samples = Samples(images, SEED, 20, random_flip=False)
    for image, label in quiet(samples, range(26)):
        named = int(images.class_names[label])
        assert named != 4 and np.array_equal(image.movedim(0, 2).numpy(), IMAGES[named][:, 3:23])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_names_broken_images_and_stops_at_the_bound(folder, workers):
    sample_ids = [range(k, k + 3) for k in range(0, 39, 3)]
    samples = Samples(open_source(folder), SEED, 16, max_broken=2, **ALL)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        batches = list(iterate_batches(samples, sample_ids, workers))
    assert sorted("04.png" in str(w.message) for w in caught_warnings if "skipped" in str(w.message)) == [
        False,
        True,
    ]
    assert_same(flat(batches).values(), made(samples, range(39)))
    few = Samples(open_source(folder), SEED, 16, max_broken=1, **ALL)
    with pytest.warns(UserWarning), pytest.raises(BrokenImage, match="2 of 13 .*png") as caught:
        list(iterate_batches(few, sample_ids, workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "bound"), [(1, 0), (2, 1), (150, 1), (1000, 10)])
def test_how_many_may_be_broken(count, bound):
    assert Samples(source(np.zeros((count, 2, 2, 3), np.uint8)), 0, 2).max_broken == bound


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_all_are_broken_it_ends(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.png").write_bytes(b"text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BrokenImage, match=f"of {count} "):
            Samples(open_source(tmp_path), 0, 8, max_broken=100).at(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_ends_the_run(folder, workers):
    samples = Samples(open_source(folder), SEED, 16, max_broken=5)
    (folder / "00.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdmfastError, match="00.png") as caught:
            list(iterate_batches(samples, [[k] for k in range(13)], workers))
    assert not isinstance(caught.value, BrokenImage) and "\n" not in str(caught.value)


class Deadly(ArraySource):
    def decode(self, index: int) -> np.ndarray:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_is_one_line():
    samples = Samples(Deadly(IMAGES, None, "array", "array"), 0, 16)
    with pytest.raises(AdmfastError, match="worker") as caught:
        list(iterate_batches(samples, [[0], [1]], 1))
    assert "\n" not in str(caught.value)
