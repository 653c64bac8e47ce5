"""Measures of sets of images, equal to the published evaluator's: FID, sFID, Inception Score and others.

Measures on feature arrays need no network: `frechet_distance`, `precision_recall`, `density_coverage`,
`kernel_distance`, `inception_score`. Features of images come from `InceptionFeatures`, `DinoFeatures`,
`ClassifierFeatures`, or `open_features` by name; `evaluate` puts them together.
"""

from admfast.evaluation.classifier import ClassifierFeatures
from admfast.evaluation.dinov2 import DinoFeatures
from admfast.evaluation.evaluate import Evaluation, Measure, compare_features, evaluate
from admfast.evaluation.features import FeatureNet, ImageFeatures, SetFeatures, compute_features
from admfast.evaluation.frechet import frechet_distance
from admfast.evaluation.image_sets import ArrayImages, ImageSet, open_images
from admfast.evaluation.inception import InceptionFeatures
from admfast.evaluation.inception_score import inception_score
from admfast.evaluation.kernel_distance import kernel_distance
from admfast.evaluation.networks import open_features
from admfast.evaluation.precision_recall import density_coverage, precision_recall
from admfast.evaluation.statistics import Statistics, statistics_of

__all__ = [
    "ArrayImages",
    "ClassifierFeatures",
    "DinoFeatures",
    "Evaluation",
    "FeatureNet",
    "ImageFeatures",
    "ImageSet",
    "InceptionFeatures",
    "Measure",
    "SetFeatures",
    "Statistics",
    "compare_features",
    "compute_features",
    "density_coverage",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "open_features",
    "open_images",
    "precision_recall",
    "statistics_of",
]
