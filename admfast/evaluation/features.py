"""Compute the features of a set of images, by any network of features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from admfast import checks
from admfast.distributed import World
from admfast.engine.numerics import fixed_numerics
from admfast.errors import InvalidArgument, invalid
from admfast.evaluation.image_sets import ImageSet, UInt8
from admfast.evaluation.statistics import Statistics, StatisticsSum, merged

Count = Callable[[int], object]


class ImageFeatures(NamedTuple):
    """Features of a batch: pooled [n, D]; spatial [n, S] for sFID; class probabilities [n, K]."""

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


class Neighbours(NamedTuple):
    """Settings of precision, recall, density and coverage for a kind of features.

    k: neighbours. half: distances in float16. open_balls: without their surface (see `precision_recall`).
    most: largest number of images, drawn at random, as many from both sets; None takes all.
    """

    k: int = 3
    half: bool = False
    open_balls: bool = False
    most: int | None = None


class FeatureNet(ABC):
    """A network that computes features of images.

    Attributes:
        name: for tables and files.
        device: where it computes.
        frechet_name, kernel_name, score_name: what the Frechet distance and the kernel distance of its
            features, and the Inception Score by its classes, are called.
        neighbours: how precision and recall of its features are computed.
        statistics_widths: numbers of pooled and spatial features, if the `mu` and `mu_s` of a published
            reference batch are of them; None if they are of other features.
    """

    name: str
    device: torch.device
    frechet_name, kernel_name, score_name = "FD", "KD", "classifier score"
    neighbours = Neighbours()
    statistics_widths: tuple[int, int] | None = None

    @abstractmethod
    def __call__(self, images: Tensor) -> ImageFeatures:
        """Return the features of images, uint8 [n, H, W, C]. Raises InvalidArgument for other images."""


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """Features of a set of images, on the CPU.

    Attributes:
        pooled: float32 [N, D].
        statistics: mean and covariance of `pooled`.
        spatial: those of the spatial features; None if the network has none.
        probabilities: float32 [N, K]; None if the network has no classes.
    """

    pooled: Tensor
    statistics: Statistics
    spatial: Statistics | None = None
    probabilities: Tensor | None = None


def compute_features(
    net: FeatureNet,
    images: ImageSet,
    batch_size: int = 64,
    world: World | None = None,
    count: Count = lambda images: None,
) -> SetFeatures:
    """Return the features of all images, in their order.

    With several processes, each computes the features of a part, and all get the result. Memory: the pooled
    features and probabilities, and one batch.

    Args:
        count: called with the number of images that are done, for a progress bar.

    Raises:
        InvalidArgument: for fewer than 2 images, images that can't be read, or features that are not finite;
            the image is named.
    """
    world, batch_size = world or World(), checks.whole_number("batch_size", batch_size, 1)
    if len(images) < max(2, world.size):
        raise invalid(images.name, f"{len(images)} images", f"at least {max(2, world.size)}")
    first, stop = (len(images) * rank // world.size for rank in (world.rank, world.rank + 1))
    pooled_sum, spatial_sum = StatisticsSum(), StatisticsSum()
    pooled, probabilities, position = [], [], first
    with fixed_numerics(net.device):
        for batch in images.batches(first, stop, batch_size):
            found = _features_of(net, batch, images.name)
            _check_finite(found.pooled, images, position)
            pooled.append(found.pooled.float().cpu())
            pooled_sum.add(found.pooled)
            if found.spatial is not None:
                spatial_sum.add(found.spatial)
            if found.probabilities is not None:
                probabilities.append(found.probabilities.float().cpu())
            position += len(batch)
            count(len(batch))
        return SetFeatures(
            _gather_rows(torch.cat(pooled), len(images), world),
            _gather_statistics(pooled_sum, world),
            _gather_statistics(spatial_sum, world) if spatial_sum.count else None,
            _gather_rows(torch.cat(probabilities), len(images), world) if probabilities else None,
        )


def check_image(net: FeatureNet, images: ImageSet) -> None:
    """Raise InvalidArgument if a network doesn't take the first image of a set."""
    with fixed_numerics(net.device):
        _features_of(net, images.pick([0]), images.name)


def _features_of(net: FeatureNet, batch: UInt8, name: str) -> ImageFeatures:
    """Return the features of a batch. name: of the set, for errors."""
    try:
        return net(torch.from_numpy(np.array(batch)))  # a copy: an archive's array can't be written
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error}") from None


def _gather_rows(rows: Tensor, total: int, world: World) -> Tensor:
    """Return the rows of all processes, in the order of the images."""
    if world.size == 1:
        return rows
    longest = -(-total // world.size)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = world.all_gather(padded).split(longest)
    lengths = [total * (rank + 1) // world.size - total * rank // world.size for rank in range(world.size)]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _gather_statistics(total: StatisticsSum, world: World) -> Statistics:
    """Return the statistics of all processes' rows."""
    gathered = [world.all_gather(moment[None]) for moment in total.moments()]
    return merged([tuple(moment[rank] for moment in gathered) for rank in range(world.size)])  # type: ignore[misc]


def _check_finite(pooled: Tensor, images: ImageSet, first: int) -> None:
    """Raise InvalidArgument that names the first image whose features are not finite."""
    finite = pooled.isfinite().all(1)
    if not bool(finite.all()):
        index = first + int(finite.logical_not().nonzero()[0])
        raise invalid("features", f"NaN or infinity for {images.image_name(index)}", "finite numbers")
