"""Tests of the images that a network is trained on: the digits, and classes that must be the network's."""

from __future__ import annotations

import numpy as np
import pytest

from admfast.errors import InvalidArgument
from admfast.files.npz import write_streamed
from admfast.files.sources import ArraySource, FolderSource
from admfast.training.images import check_classes, training_source
from tests.training.small_runs import source


def test_digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    digits = training_source("digits")
    assert (len(digits), digits.class_names) == (1797, tuple("0123456789"))
    assert digits.labels is not None and digits.labels[:10] == tuple(range(10))
    images = np.stack([digits.decode(i) for i in range(20)])
    assert images.shape == (20, 32, 32, 1) and (images.min(), images.max()) == (0, 255)


def test_other_words_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a_1.png").write_bytes(b"")
    photos = training_source("photos", "prefixes")
    assert isinstance(photos, FolderSource) and photos.class_names == ("a",)
    with pytest.raises(InvalidArgument, match=r"""data='digit': .*\(or the word "digits"\)$"""):
        training_source("digit")
    with pytest.raises(InvalidArgument, match="classes="):
        training_source("digits", "foldres")


def test_the_classes_must_be_the_networks(tmp_path):
    images = np.zeros((3, 4, 4, 1), np.uint8)
    write_streamed(tmp_path / "x.npz", images.shape, images, [1, 0, 1])
    two = training_source(tmp_path / "x.npz")
    check_classes(two, 2)
    check_classes(two, None)
    for count in (1, 3, 1000):
        with pytest.raises(InvalidArgument, match=f"data=.*2 classes.*{count}"):
            check_classes(two, count)
    with pytest.raises(InvalidArgument, match="data=.*without classes"):
        check_classes(ArraySource(images, None, "x", "x"), 2)
    check_classes(source(), len(source().class_names))
