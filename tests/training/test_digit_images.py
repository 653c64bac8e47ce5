"""Tests of the digit images: their source and their enlargement."""

from __future__ import annotations

import pytest
import torch

from admfast.errors import AdmfastError
from admfast.training import digit_images
from admfast.training.digit_images import block_means, digits_source, enlarge, load_digits

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return load_digits()


@pytest.fixture(scope="module")
def enlarged(data) -> torch.Tensor:
    return enlarge(data[0])


def test_digits_are_those_of_scikit_learn(data):
    images, labels = data
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 16) and torch.equal(images, images.round())
    assert labels.dtype == torch.int64 and labels[:10].tolist() == list(range(10))
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_enlarged_digits_stay_in_range_and_their_block_means_give_the_digits_back(data, enlarged):
    assert enlarged.shape == (1797, 1, 32, 32) and enlarged.dtype == torch.float32
    assert (enlarged.min(), enlarged.max()) == (0, 16)
    error = (block_means(enlarged) - data[0]).abs()
    # Measured on all 1,797 images: errors of at most 0.6325 of 16 levels, 0.0832 in rms, and 40 of 115,008
    # block means that round to another level. They come from the limits 0 and 16 of the pixels of strokes.
    assert error.max() < 0.64
    assert error.square().mean().sqrt() < 0.084
    assert (error > 0.5).sum() <= 44


def test_more_rounds_bring_the_means_nearer(data):
    some = data[0][:100]
    errors = [float((block_means(enlarge(some, rounds)) - some).square().mean()) for rounds in (0, 1, 5, 20)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 50 * errors[-1]


def test_enlarging_is_smooth_and_keeps_flat_images():
    flat = torch.full((1, 1, 8, 8), 5.0)
    torch.testing.assert_close(enlarge(flat), torch.full((1, 1, 32, 32), 5.0))
    assert torch.equal(enlarge(flat.to(torch.uint8)), enlarge(flat))


def test_block_means():
    blocks = torch.arange(16.0).view(1, 1, 4, 4)
    assert block_means(blocks).tolist() == [[[[7.5]]]]


def test_the_source_has_every_digit_with_its_class(data, enlarged):
    source = digits_source()
    assert len(source) == 1797 and source.labels == tuple(data[1].tolist())
    image = torch.from_numpy(source.decode(5).copy()).permute(2, 0, 1).float()
    assert image.shape == (1, 32, 32)
    # Rounding to 255 levels may change a value by half a level.
    assert (image * (16 / 255) - enlarged[5]).abs().max() <= 0.5 * 16 / 255 + 1e-6


def test_without_scikit_learn_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(AdmfastError, match="pip install scikit-learn"):
        digit_images.load_digits()
