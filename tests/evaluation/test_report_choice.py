"""Tests of what a report shows, and of the nearest rows of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admfast.evaluation import neighbours
from admfast.evaluation.features import SetFeatures
from admfast.evaluation.neighbours import nearest_rows
from admfast.evaluation.report_choice import (
    GridRow,
    choose_grid,
    count_classes,
    find_nearest,
    rank_by_certainty,
    spread_evenly,
)
from admfast.evaluation.statistics import statistics_of


@pytest.mark.parametrize(("n", "m", "d", "k"), [(7, 30, 4, 5), (1, 5, 3, 5), (20, 3, 8, 5), (33, 29, 1, 1)])
@pytest.mark.parametrize("block", [10_000, 8])
def test_nearest_rows_are_those_of_all_distances(monkeypatch, n, m, d, k, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    generator = torch.manual_seed(n)
    a, b = (torch.randn(size, d, generator=generator) + 100 for size in (n, m))
    distances, indices = nearest_rows(a, b, k)
    values, order = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    assert distances.dtype == torch.float64 and distances.shape == indices.shape == (n, min(k, m))
    torch.testing.assert_close(distances, values[:, :k])
    assert torch.equal(indices, order[:, :k])


def test_near_copies_of_large_features_are_told_apart():
    """|a|^2 - 2 a . b + |b|^2 in float32 can't: its rounding is larger than their distances."""
    a = torch.full((1, 64), 1000.0)
    b = a + torch.arange(5)[:, None].float() / 1000
    distances, indices = nearest_rows(a, b.flip(0), 5)
    assert indices.tolist() == [[4, 3, 2, 1, 0]]
    assert distances[0, 0] == 0 and bool((distances.diff() > 0).all())


def test_equal_rows_are_in_their_order():
    _, indices = nearest_rows(torch.zeros(2, 3), torch.zeros(4, 3), 3)
    assert indices.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("count", "most", "chosen"), [(5, 8, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (1, 3, [0]), (2, 2, [0, 1])]
)
def test_numbers_are_spread_evenly(count, most, chosen):
    assert spread_evenly(count, most) == chosen


def test_classes_have_rows_of_their_first_samples():
    labels = np.arange(1000) % 100
    rows = choose_grid(1000, labels)
    assert [row.label for row in rows] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert rows[1].indices == [11, 111, 211, 311, 411, 511, 611, 711]
    assert choose_grid(10, np.arange(10)) == [GridRow(label, [label]) for label in range(10)]


@pytest.mark.parametrize("labels", [None, np.arange(100)])
def test_without_rows_of_classes_the_first_samples_are_shown(labels):
    assert choose_grid(100, labels) == [GridRow(None, list(range(64)))]


def test_typical_distances_are_medians():
    a = torch.tensor([[0.0], [1.0], [5.0]])
    b = torch.tensor([[0.5], [2.5], [10.0]])
    found = find_nearest(SetFeatures(a, statistics_of(a)), SetFeatures(b, statistics_of(b)))
    assert found.typical == 0.5 and found.typical_reference == 2
    assert found.closest == [0, 1, 2] and found.distances[2] == [2.5, 4.5, 5.0]


def test_certainty_uses_labels_only_if_all_are_classes():
    probabilities = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.45, 0.55]])
    own = rank_by_certainty(probabilities, np.array([1, 1, 0]))
    assert own.of_own_class and own.values == pytest.approx([0.3, 0.8, 0.45])
    assert (own.least, own.most, own.likeliest) == ([0], [1], [0, 1, 1])
    for labels in (None, np.array([0, 1, 2]), np.array([-1, 0, 1])):
        largest = rank_by_certainty(probabilities, labels)
        assert not largest.of_own_class and largest.values == pytest.approx([0.7, 0.8, 0.55])
        assert (largest.least, largest.most) == ([2], [1])


def test_classes_are_counted_from_0():
    assert count_classes(np.array([2, 0, 2])) == {0: 1, 1: 0, 2: 2}
    assert count_classes(np.array([2, 0, 2]), known=5) == {0: 1, 1: 0, 2: 2, 3: 0, 4: 0}
    assert count_classes(np.array([-1, 4, 4])) == {-1: 1, 4: 2}
    assert count_classes(np.array([2**40])) == {2**40: 1}
