"""Evaluate a set of samples: all measures that the features and the reference allow, with warnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from admfast.distributed import World
from admfast.errors import invalid
from admfast.evaluation.features import Count, FeatureNet, Neighbours, SetFeatures, compute_features
from admfast.evaluation.frechet import frechet_distance
from admfast.evaluation.image_sets import ImageSet
from admfast.evaluation.inception import InceptionFeatures
from admfast.evaluation.inception_score import SPLIT_SIZE, inception_score
from admfast.evaluation.intervals import Interval, bootstrap_interval
from admfast.evaluation.kernel_distance import SUBSET_SIZE, SUBSETS, kernel_distance
from admfast.evaluation.precision_recall import coverage_of_alike_sets, neighbourhoods
from admfast.evaluation.reference import IMAGES, ReferenceStatistics, read_reference_statistics
from admfast.models.published import Metric

PUBLISHED_COUNT = 50_000  # samples behind published values
DENSITY_NEIGHBOURS = 5  # of density and coverage, as in Naeem et al. 2020
# The measures with published values, and their fields in `Metric`.
PUBLISHED_MEASURES = {
    "FID": "fid",
    "sFID": "sfid",
    "Inception Score": "inception_score",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class Measure:
    """A measure: its name, its value, its 95 % interval or None, and how it was computed."""

    name: str
    value: float
    interval: Interval | None = None
    how: str = ""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        features: name of the network whose features were compared.
        samples, reference: name and number of images of the sets; reference is None without one.
        measures: in the order of the published evaluator.
        warnings: what makes the comparison with published values unfair, a line each.
        sample_features, reference_features: the features of the sets.
    """

    features: str
    samples: dict[str, Any]
    reference: dict[str, Any] | None
    measures: tuple[Measure, ...]
    warnings: tuple[str, ...]
    sample_features: SetFeatures
    reference_features: SetFeatures | None = None

    def value(self, name: str) -> float:
        """Return the value of a measure, such as "FID". Raises KeyError."""
        return {measure.name: measure.value for measure in self.measures}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the features, as JSON can hold it."""
        fields = {name: getattr(self, name) for name in ("features", "samples", "reference", "warnings")}
        return fields | {"measures": [asdict(measure) for measure in self.measures]}


def evaluate(
    samples: ImageSet,
    reference: ImageSet | None,
    net: FeatureNet,
    *,
    batch_size: int = 64,
    world: World | None = None,
    seed: int = 0,
    count: Count = lambda images: None,
) -> Evaluation:
    """Compare samples with a reference by the features of `net`; return the measures in the published order.

    With Inception: Inception Score, FID, sFID, precision and recall as the published evaluator computes them,
    density, coverage and KID. A reference with `mu, sigma, mu_s, sigma_s` gives FID and sFID by these. Those
    of the samples' own file are not read. With several processes, all get the result.

    Args:
        samples: the images to measure.
        net: computes their features.
        reference: None computes only the measures that need none.
        batch_size: images that the network gets at a time.
        world: the processes that share the images; None for one.
        seed: of random subsets and resamples.
        count: called with the number of images that are done, for a progress bar.

    Raises:
        InvalidArgument: for fewer than 2 images, images that can't be read, features that are not finite, or
            too few images for the neighbours.
    """
    for name, images in (("samples", samples), ("reference", reference)):
        least = 2 if reference is None else max(net.neighbours.k, DENSITY_NEIGHBOURS) + 1
        if images is not None and len(images) < least:
            raise invalid(name, f"{len(images)} images", f"at least {least}")
    stored = None if reference is None else _stored_statistics(net, reference)
    found = compute_features(net, samples, batch_size, world, count)
    if reference is None:
        measures = tuple(_scores(net, found))
        warnings = tuple(_sample_warnings(samples))
        return Evaluation(net.name, _describe(samples), None, measures, warnings, found)
    other = compute_features(net, reference, batch_size, world, count)
    measures = tuple(_measures(net, found, other, stored, seed))
    warnings = (*_sample_warnings(samples), *_comparison_warnings(samples, reference, found, stored))
    sets = _describe(samples), _describe(reference)
    return Evaluation(net.name, *sets, measures, warnings, found, other)


def _stored_statistics(net: FeatureNet, reference: ImageSet) -> ReferenceStatistics | None:
    """Return the statistics that a reference batch holds of these features; None without them."""
    path, widths = reference.path, net.statistics_widths
    if widths is None or path is None or path.is_dir() or path.suffix.lower() != ".npz":
        return None
    return read_reference_statistics(path, widths)


def published_values(metric: Metric) -> list[float | None]:
    """Return a published result in the order of `PUBLISHED_MEASURES`."""
    return [getattr(metric, field) for field in PUBLISHED_MEASURES.values()]


def comparable_values(evaluation: Evaluation) -> list[float | None] | None:
    """Return the measures in the order of `PUBLISHED_MEASURES`; None if they are not of Inception's
    features."""
    if evaluation.features != InceptionFeatures.name:
        return None
    values = {measure.name: measure.value for measure in evaluation.measures}
    return [values.get(name) for name in PUBLISHED_MEASURES]


def compare_features(
    net: FeatureNet, samples: SetFeatures, reference: SetFeatures, seed: int = 0
) -> tuple[Measure, ...]:
    """Return the measures of features that were computed before. Arguments and errors: see `evaluate`."""
    return tuple(_measures(net, samples, reference, None, seed))


def _measures(
    net: FeatureNet,
    samples: SetFeatures,
    reference: SetFeatures,
    stored: ReferenceStatistics | None,
    seed: int,
) -> Iterator[Measure]:
    """Yield all measures of samples against a reference, computed on the network's device."""
    yield from _scores(net, samples)
    pooled = reference.statistics if stored is None else stored.pooled
    of = "" if stored is None else "against the reference's own mu and sigma"
    yield Measure(net.frechet_name, frechet_distance(samples.statistics, pooled), how=of)
    if samples.spatial is not None and reference.spatial is not None:
        spatial = stored.spatial if stored is not None else None
        of = of if spatial is not None or stored is None else "against the reference's images"
        yield Measure("sFID", frechet_distance(samples.spatial, spatial or reference.spatial), how=of)
    a, b = (features.pooled.to(net.device) for features in (samples, reference))
    yield from _neighbour_measures(net.neighbours, a, b, seed)
    kernel = kernel_distance(a, b, SUBSETS, seed=seed)
    how = f"standard deviation {kernel.std:.2g} over {SUBSETS} subsets"
    if len(a) == len(b) <= SUBSET_SIZE:
        how = "of all images: there are too few for subsets"
    yield Measure(net.kernel_name, kernel.mean, how=how)


def _scores(net: FeatureNet, samples: SetFeatures) -> Iterator[Measure]:
    """Yield the measures that need no reference."""
    if samples.probabilities is not None:
        yield Measure(net.score_name, inception_score(samples.probabilities), how=f"splits of {SPLIT_SIZE:,}")


def _neighbour_measures(rule: Neighbours, a: Tensor, b: Tensor, seed: int) -> Iterator[Measure]:
    """Yield precision, recall, density and coverage with their intervals."""
    if rule.most is not None:
        size, rng = min(rule.most, len(a), len(b)), np.random.default_rng(seed)
        a, b = (x[np.sort(rng.choice(len(x), size, replace=False))] for x in (a, b))
    balls = neighbourhoods(a, b, rule.k, rule.half, rule.open_balls)
    how = f"k = {rule.k}" + (", float16 distances" if rule.half else "")
    yield _mean("precision", balls.precision, how, seed)
    yield _mean("recall", balls.recall, how, seed)
    open_balls = balls
    if (rule.k, rule.half, rule.open_balls) != (DENSITY_NEIGHBOURS, False, True):
        open_balls = neighbourhoods(a, b, DENSITY_NEIGHBOURS, half=False, open_balls=True)
        how = f"k = {DENSITY_NEIGHBOURS}"
    yield _mean("density", open_balls.density, how, seed)
    alike = coverage_of_alike_sets(len(a), len(b), DENSITY_NEIGHBOURS)
    how += f"; {alike:.4g} for as many from the reference's own source"
    yield _mean("coverage", open_balls.coverage, how, seed)


def _mean(name: str, contributions: Tensor, how: str, seed: int) -> Measure:
    values = contributions.double()
    return Measure(name, float(values.mean()), bootstrap_interval(values, seed), how)


def _describe(images: ImageSet) -> dict[str, Any]:
    height, width, channels = images.shape
    return {"name": images.name, "images": len(images), "size": f"{height}x{width}", "channels": channels}


def _sample_warnings(samples: ImageSet) -> Iterator[str]:
    if samples.is_jpeg:
        yield "the samples are JPEG files, whose artefacts change the measures"
    if samples.shape[2] == 1:
        yield "the samples are grey"
    labels = samples.labels
    if labels is not None and len(labels) > SPLIT_SIZE and labels[0] < labels[-1] and _is_sorted(labels):
        few = f"each split of {SPLIT_SIZE:,} has only a few classes"
        yield f"the samples are sorted by class: {few}, so the Inception Score is too low"


def _is_sorted(labels: NDArray[np.int64]) -> bool:
    return bool((np.diff(labels) >= 0).all())


def _comparison_warnings(
    samples: ImageSet, reference: ImageSet, features: SetFeatures, stored: ReferenceStatistics | None
) -> Iterator[str]:
    """Yield what makes the comparison unfair, or incomparable with published values."""
    if samples.path is not None and reference.path is not None and samples.path.samefile(reference.path):
        yield "the samples are the reference"
    if samples.shape[2] != reference.shape[2]:
        yield "only one of the two sets is grey"
    if samples.shape[:2] != reference.shape[:2]:
        sizes = [f"{s[0]}x{s[1]}" for s in (samples.shape, reference.shape)]
        yield f"the samples are {sizes[0]} and the reference {sizes[1]}: resizing changes the measures"
    if len(samples) < PUBLISHED_COUNT:
        yield (
            f"{len(samples):,} samples: Frechet distances grow as samples get fewer; published ones are of "
            f"{PUBLISHED_COUNT:,}"
        )
    if len(samples) <= features.pooled.shape[1]:
        yield f"fewer samples than the {features.pooled.shape[1]} features: the covariance is singular"
    if len(reference) < IMAGES:
        yield f"{len(reference):,} reference images: published precision and recall are of {IMAGES:,}"
    if stored is None and len(reference) < PUBLISHED_COUNT:
        yield "the reference has no statistics (mu, sigma) of these features: they are those of its images"
    if reference.is_jpeg != samples.is_jpeg:
        yield "only one of the two sets is JPEG files"
