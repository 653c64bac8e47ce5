"""Tests of npz archives of samples in the published format."""

from __future__ import annotations

import numpy as np
import pytest

from admfast.errors import InvalidArgument, OutputError
from admfast.files.npz import (
    iter_array,
    read_samples,
    write_streamed,
)
from tests.parity.golden import cases, load_json

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 3)).astype(np.uint8)
LABELS = np.arange(11)


def write_samples(path, images, labels=None):
    write_streamed(path, images.shape, images, labels)


def test_what_is_written_is_the_published_format(tmp_path):
    write_samples(tmp_path / "samples", IMAGES, LABELS.astype(np.int32))
    with np.load(tmp_path / "samples") as archive:  # .npz must not be appended to the name
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"], IMAGES)
        assert archive["arr_1"].dtype == np.int64 and np.array_equal(archive["arr_1"], LABELS)
    write_samples(tmp_path / "unlabelled.npz", IMAGES)
    with np.load(tmp_path / "unlabelled.npz") as archive:
        assert archive.files == ["arr_0"]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES[:3], "images='3 images': 11, as the shape says"),
        ([*IMAGES[:2], IMAGES[2, :2]], r"images\[2\]='uint8 \(2, 4, 3\)': uint8 \(4, 4, 3\)"),
        (IMAGES.astype(np.int64), r"images\[0\]='int64 \(4, 4, 3\)'"),
    ],
)
def test_images_one_by_one_must_be_what_was_promised(tmp_path, images, said):
    with pytest.raises(InvalidArgument, match=said):
        write_streamed(tmp_path / "a.npz", IMAGES.shape, images)
    assert not list(tmp_path.iterdir())


def test_round_trip(tmp_path):
    write_samples(tmp_path / "a.npz", IMAGES, LABELS)
    back = read_samples(tmp_path / "a.npz")
    assert np.array_equal(back.images, IMAGES) and np.array_equal(back.labels, LABELS)
    write_samples(tmp_path / "b.npz", IMAGES)
    assert read_samples(tmp_path / "b.npz").labels is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((IMAGES.astype(np.float32), None), r"images\[0\]='float32"),
        ((IMAGES, LABELS[:3]), "labels.shape"),
        ((IMAGES, LABELS + 0.5), "labels.dtype"),
    ],
    ids=["float", "too few labels", "float labels"],
)
def test_writing_refuses(tmp_path, arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        write_samples(tmp_path / "a.npz", *arguments)
    assert not (tmp_path / "a.npz").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_samples(tmp_path / "a.npz", IMAGES)
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(OutputError):
        write_samples(tmp_path / "a.npz" / "below", IMAGES)
    with pytest.raises(InvalidArgument):
        write_samples(tmp_path / "a.npz", IMAGES.astype(object))
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def damaged(folder):
    write_samples(folder / "whole.npz", IMAGES, LABELS)
    data = (folder / "whole.npz").read_bytes()
    np.save(folder / "single.npy", IMAGES)
    np.savez(folder / "object.npz", arr_0=np.array([{}, None], dtype=object))
    np.savez(folder / "named.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    np.savez(folder / "float.npz", IMAGES / 255.0)
    np.savez(folder / "flat.npz", IMAGES[0])
    np.savez(folder / "labels.npz", IMAGES, LABELS[:4])
    (folder / "cut.npz").write_bytes(data[:-200])
    (folder / "spoiled.npz").write_bytes(data[:200] + bytes(40) + data[240:])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.npz").write_text("<html>not found</html>")
    (folder / "folder.npz").mkdir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.npz", "no such file"),
        ("cut.npz", "truncated or damaged"),
        ("spoiled.npz", "truncated or damaged: Bad CRC-32"),
        ("empty.npz", "the file is empty"),
        ("text.npz", "not an npz archive"),
        ("single.npy", "a single .npy array"),
        ("object.npz", "pickled objects, which are not read"),
        ("named.npz", "no array arr_0 .has mu, sigma."),
        ("float.npz", "arr_0.dtype='float64': uint8"),
        ("flat.npz", r"arr_0.shape=\(4, 4, 3\): \[N, H, W, C\]"),
        ("labels.npz", "arr_1.shape"),
        ("folder.npz", "Is a directory"),
    ],
)
def test_damage_is_said_in_one_line(tmp_path, name, said):
    damaged(tmp_path)
    with pytest.raises(InvalidArgument, match=said) as caught:
        read_samples(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_batches(tmp_path, order, batch_size):
    np.savez_compressed(tmp_path / "a.npz", np.asarray(IMAGES, order=order))
    batches = list(iter_array(tmp_path / "a.npz", batch_size))
    assert [len(batch) for batch in batches] == [
        len(IMAGES[i : i + batch_size]) for i in range(0, 11, batch_size)
    ]
    assert np.array_equal(np.concatenate(batches), IMAGES)


def test_batches_of_a_damaged_file(tmp_path):
    damaged(tmp_path)
    for name in ("cut.npz", "empty.npz", "missing.npz", "object.npz", "named.npz", "spoiled.npz"):
        with pytest.raises(InvalidArgument) as caught:
            list(iter_array(tmp_path / name, 4))
        assert name in str(caught.value)


@pytest.mark.parametrize("path", cases("evaluator", "npz_reader", pattern="*.npz"))
def test_the_golden_archives_are_read_in_the_published_batches(path):
    facts = load_json(path.with_name("expected.json"))[path.stem]
    batches = list(iter_array(path, 4))
    assert [len(batch) for batch in batches] == facts["batch_sizes"]
    assert [int(batch.sum()) for batch in batches] == facts["sums"]
    assert np.array_equal(np.concatenate(batches), read_samples(path).images)
