"""Choose what a report shows: samples of some classes, nearest neighbours, extremes of certainty, counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from admfast.evaluation.features import SetFeatures
from admfast.evaluation.neighbours import nearest_rows

FIRST, CLASSES, COLUMNS = 64, 10, 8  # samples without classes; classes, and samples of each
EXAMPLES, NEAREST = 8, 5  # samples with neighbours, and neighbours of each
EXTREMES = 16
_FEW = 4  # samples of a class, below which a row of them would be mostly empty
_TYPICAL = 1000  # reference images behind the typical distance
_MOST_CLASSES = 2**20

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class GridRow:
    """Samples of a class by index, or of any class (None)."""

    label: int | None
    indices: list[int]


@dataclass(frozen=True, eq=False)
class NearestImages:
    """Nearest reference images of all samples, and the samples to show.

    Attributes:
        examples: samples chosen evenly from the set.
        closest: the samples whose nearest reference image is closest, closest first.
        indices, distances: [N, up to 5] of each sample's nearest reference images, nearest first.
        typical: median distance of a sample's nearest reference image.
        typical_reference: median distance of a reference image's nearest other one; None if it has none.
    """

    examples: list[int]
    closest: list[int]
    indices: list[list[int]]
    distances: list[list[float]]
    typical: float
    typical_reference: float | None


@dataclass(frozen=True, eq=False)
class Certainty:
    """Certainty of the classifier for each sample, with the samples to show.

    Attributes:
        classes: number K of the classifier's classes.
        of_own_class: whether the values are the probability of the sample's own class, else the largest one.
        values: [N] probabilities.
        likeliest: [N] the class with the largest probability.
        least, most: samples with the lowest values, lowest first, and with the highest, highest first.
    """

    classes: int
    of_own_class: bool
    values: list[float]
    likeliest: list[int]
    least: list[int]
    most: list[int]


def choose_grid(count: int, labels: Labels | None) -> list[GridRow]:
    """Return up to 8 samples of each of 10 classes, spread evenly; or the first 64 samples.

    These are shown without classes, or if classes are many and have fewer than 4 samples on average.
    """
    found = np.unique([] if labels is None else labels)
    if labels is None or len(found) > max(CLASSES, count / _FEW):
        return [GridRow(None, list(range(min(count, FIRST))))]
    chosen = found[spread_evenly(len(found), CLASSES)].tolist()
    return [GridRow(label, np.flatnonzero(labels == label)[:COLUMNS].tolist()) for label in chosen]


def spread_evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 .. count - 1, at equal distances, with the first and last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def find_nearest(samples: SetFeatures, reference: SetFeatures) -> NearestImages:
    """Return the nearest reference images of all samples by the Euclidean distance of their features."""
    a, b = samples.pooled, reference.pooled
    distances, indices = nearest_rows(a, b, NEAREST)
    nearest = distances[:, 0]
    typical_reference = None
    if len(b) > 1:
        some = b[torch.tensor(spread_evenly(len(b), _TYPICAL))]
        typical_reference = float(nearest_rows(some, b, 2)[0][:, 1].median())
    return NearestImages(
        spread_evenly(len(a), EXAMPLES),
        nearest.argsort(stable=True)[:EXAMPLES].tolist(),
        indices.tolist(),
        distances.tolist(),
        float(nearest.median()),
        typical_reference,
    )


def rank_by_certainty(probabilities: Tensor, labels: Labels | None) -> Certainty:
    """Rank samples by probabilities [N, K]: of their own class, or without usable labels the largest.

    labels: classes in the classifier's own numbers; with one outside of 0 .. K - 1, none is used.
    """
    largest, likeliest = probabilities.max(1)
    own = labels is not None and bool(((labels >= 0) & (labels < probabilities.shape[1])).all())
    values = probabilities.gather(1, torch.from_numpy(labels)[:, None])[:, 0] if own else largest
    order = values.argsort(stable=True).tolist()
    # In a small set, no sample is shown both among the least and among the most certain.
    shown = min(EXTREMES, max(1, len(order) // 2))
    return Certainty(
        probabilities.shape[1],
        own,
        values.tolist(),
        likeliest.tolist(),
        order[:shown],
        order[: -shown - 1 : -1],
    )


def count_classes(labels: Labels, known: int = 0) -> dict[int, int]:
    """Return the number of samples by class, for the classes 0 .. the largest.

    Negative or very large labels are no numbers from 0; then only classes that have samples are counted.
    known: number of classes that exist at least.
    """
    found = dict(zip(*(values.tolist() for values in np.unique(labels, return_counts=True)), strict=True))
    if min(found) < 0 or max(found) >= _MOST_CLASSES:
        return found
    return {label: found.get(label, 0) for label in range(max(known, max(found) + 1))}
