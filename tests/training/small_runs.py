"""Small training runs: random 8x8 images of four classes in memory, and recipes for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admfast.checkpoints.snapshots import list_snapshots
from admfast.files.sources import ArraySource
from admfast.models import ClassifierConfig, UNetConfig, UpsamplerConfig
from admfast.training.learner import Learner
from admfast.training.loop import LoopOptions
from admfast.training.loss import Batch, make_batch
from admfast.training.network import build_network
from admfast.training.recipe import Recipe
from admfast.training.samples import Samples
from tests.small import CLASSES, CLASSIFIER, PROCESS, UNET, UPSAMPLER

NETWORKS = {
    "diffusion": UNetConfig(**{**UNET, "dropout": 0.3}),
    "classifier": ClassifierConfig(**{**CLASSIFIER, "dropout": 0.3}),
    "upsampler": UpsamplerConfig(**{**UPSAMPLER, "dropout": 0.3}),
}
OFTEN = LoopOptions(save_every=2, log_every=1)


def source(count: int = 10, side: int = 8) -> ArraySource:
    """Return random images. They fill few batches, so that runs pass the ends of epochs."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    return ArraySource(images, [i % CLASSES for i in range(count)], "random", "random")


def small_recipe(kind: str = "diffusion", **changes: Any) -> Recipe:
    """Return a recipe of six steps with four images each."""
    settings: dict[str, Any] = {
        "kind": kind,
        "network": NETWORKS[kind],
        "process": PROCESS,
        "steps": 6,
        "batch_size": 4,
        "lr": 1e-3,
        "ema": (0.9, 0.99),
        "precision": "fp32",
        "low_res_size": 8 if kind == "upsampler" else None,
    }
    return Recipe(**{**settings, **changes})


def learner_of(recipe: Recipe) -> Learner:
    """Return a learner without zero parameters, so that every layer affects the result."""
    net = build_network(recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Learner(recipe, net)


def batch(recipe: Recipe, sample_ids: Sequence[int], sampler: Any) -> Batch:
    """Return a batch of the samples `sample_ids` of the random images."""
    side = recipe.network.image_size
    samples = Samples(source(side=side), recipe.seed, side, 1, recipe.random_crop, recipe.random_flip)
    images, labels = zip(*(samples.at(k) for k in sample_ids), strict=True)
    return make_batch(recipe, sampler, sample_ids, torch.stack(images), torch.tensor(labels))


def same(a: Any, b: Any, where: str = "state") -> None:
    """Assert that two states are equal bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def last_state(run: Path) -> dict[str, Any]:
    """Return the state in the newest snapshot of a run."""
    return list_snapshots(run)[0].read()
