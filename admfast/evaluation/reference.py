"""Reference batches in the published format: images for precision and recall, statistics for FID and sFID."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from admfast.errors import InvalidArgument, invalid
from admfast.evaluation.features import SetFeatures
from admfast.evaluation.image_sets import ImageSet, UInt8
from admfast.evaluation.statistics import Statistics
from admfast.files.npz import read_array, write_streamed

IMAGES = 10_000  # in a published reference batch
_READ = 64


class ReferenceStatistics(NamedTuple):
    """Statistics that a reference batch holds: of the pooled and of the spatial features of Inception."""

    pooled: Statistics
    spatial: Statistics | None


def read_reference_statistics(path: Path, widths: tuple[int, int]) -> ReferenceStatistics | None:
    """Return the statistics `mu, sigma` and `mu_s, sigma_s` of an npz; None if it has none.

    widths: number of pooled and of spatial features.
    Raises InvalidArgument if only one of a pair is there, or one is no mean or covariance of such features.
    """
    pooled = _read_pair(path, "mu", "sigma", widths[0])
    if pooled is None:
        return None
    return ReferenceStatistics(pooled, _read_pair(path, "mu_s", "sigma_s", widths[1]))


def _read_pair(path: Path, mean: str, covariance: str, width: int) -> Statistics | None:
    mu, sigma = read_array(path, mean), read_array(path, covariance)
    if mu is None and sigma is None:
        return None
    if mu is None or sigma is None:
        raise invalid("reference", str(path), f"both {mean} and {covariance}, or neither")
    try:
        statistics = Statistics(mu, sigma)
    except InvalidArgument as error:
        raise InvalidArgument(f"reference={str(path)!r}: {mean}, {covariance}: {error}") from None
    if len(statistics.mu) != width:
        raise invalid("reference", str(path), f"{mean} of {width} features; this has {len(statistics.mu)}")
    return statistics


def write_reference(
    path: str | PathLike[str], images: ImageSet, features: SetFeatures, seed: int = 0
) -> None:
    """Write a reference batch: statistics of all images, and at most 10,000 of them, as published.

    The arrays are `arr_0` uint8 [n, H, W, C], `arr_1` int64 [n] with classes, `mu`, `sigma`, `mu_s`,
    `sigma_s` in float64.

    Args:
        images: the whole data set.
        features: of `images`, by Inception.
        seed: of the draw of the images that are stored, if there are more than 10,000.

    Raises:
        OutputError: if the file can't be written.
    """
    chosen = np.arange(len(images))
    if len(images) > IMAGES:
        chosen = np.sort(np.random.default_rng(seed).choice(len(images), IMAGES, replace=False))
    arrays = {"mu": features.statistics.mu, "sigma": features.statistics.sigma}
    if features.spatial is not None:
        arrays |= {"mu_s": features.spatial.mu, "sigma_s": features.spatial.sigma}
    labels = None if images.labels is None else images.labels[chosen]
    write_streamed(
        path, (len(chosen), *images.shape), _chosen_images(images, set(chosen.tolist())), labels, arrays
    )


def _chosen_images(images: ImageSet, chosen: set[int]) -> Iterator[UInt8]:
    """Yield the images with these indices, in order."""
    index = 0
    for batch in images.batches(0, len(images), _READ):
        for image in batch:
            if index in chosen:
                yield image
            index += 1
