"""Evaluate a training run with the measures of `admfast.evaluation`, which training itself doesn't know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from admfast.distributed import World
from admfast.errors import invalid
from admfast.evaluation import ImageSet, compare_features, compute_features, open_features
from admfast.evaluation.image_sets import UInt8
from admfast.files.sources import Source
from admfast.sampling.pipeline import Pipeline
from admfast.training.progress import small_images
from admfast.training.recipe import Recipe
from admfast.training.samples import Samples

STEPS, BATCH = 20, 50
MOST_REFERENCE_IMAGES = 50_000


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of the evaluations of a run: network of features, its weights, number of samples."""

    features: str
    weights: Path
    images: int


class TrainingEvaluation:
    """Evaluation that `train` calls: sample, and compare the features with those of training images.

    The reference is the training images, centre-cropped, at most 50,000 of them; their features are computed
    once, at the start. Samples have the seeds 0, 1, ..., classes in turn, and 20 steps of the solver "auto".
    """

    def __init__(self, recipe: Recipe, source: Source, options: EvaluationOptions, world: World) -> None:
        """Compute the features of the reference.

        Raises: InvalidArgument for a classifier's run, or features that don't take such images; the errors of
        `open_features`.
        """
        if recipe.kind == "classifier":
            raise invalid("evaluate_every", "a classifier's run", "for diffusion models and upsamplers")
        self._recipe, self._images, self._world = recipe, options.images, world
        network = recipe.network
        self._samples = Samples(
            source, recipe.seed, network.image_size, network.in_channels, random_flip=False
        )
        self._net = open_features(options.features, options.weights, world.device)
        self._reference = compute_features(self._net, _TrainingImages(self._samples), BATCH, world)

    def __call__(self, pipe: Pipeline) -> dict[str, float]:
        """Return the measures of samples of a pipeline by name, such as "FD"."""
        images = _SampledImages(pipe, self._recipe, self._samples, self._images)
        found = compute_features(self._net, images, BATCH, self._world)
        measures = compare_features(self._net, found, self._reference)
        return {measure.name: measure.value for measure in measures}


class _TrainingImages(ImageSet):
    """The images of a run as it crops them, without random flips, each once."""

    name = "training images"

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.shape = (samples.size, samples.size, samples.channels)

    def __len__(self) -> int:
        return min(len(self._samples.source), MOST_REFERENCE_IMAGES)

    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        for start in range(first, stop, size):
            images = [self._samples.at(k)[0] for k in range(start, min(start + size, stop))]
            yield torch.stack(images).movedim(1, -1).numpy()


class _SampledImages(ImageSet):
    """Images that a pipeline samples when they are read."""

    name = "samples"

    def __init__(self, pipe: Pipeline, recipe: Recipe, samples: Samples, count: int) -> None:
        self._pipe, self._recipe, self._samples, self._count = pipe, recipe, samples, count
        self.shape = (samples.size, samples.size, samples.channels)

    def __len__(self) -> int:
        return self._count

    def batches(self, first: int, stop: int, size: int) -> Iterator[UInt8]:
        recipe, low_res = self._recipe, None
        for start in range(first, stop, size):
            seeds = range(start, min(start + size, stop))
            classes = None
            if recipe.num_image_classes is not None:
                classes = [seed % recipe.num_image_classes for seed in seeds]
            if recipe.low_res_size is not None:
                low_res = small_images(self._samples, seeds, recipe.low_res_size).to(self._pipe.device)
                if classes is not None:
                    classes = [self._samples.at(k)[1] or 0 for k in seeds]
            images = self._pipe.sample(
                classes=classes, seeds=seeds, steps=STEPS, solver="auto", low_res=low_res, guidance=0.0
            )
            yield np.asarray(images.cpu())
