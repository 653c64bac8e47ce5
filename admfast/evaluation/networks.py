"""Open the network of features that a name means: Inception, DINOv2, or a classifier of ADM."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

import torch

from admfast.errors import CheckpointError, invalid
from admfast.evaluation.classifier import ClassifierFeatures
from admfast.evaluation.dinov2 import DinoFeatures
from admfast.evaluation.features import FeatureNet
from admfast.evaluation.inception import InceptionFeatures
from admfast.evaluation.inception_weights import find_inception_weights, read_inception_weights
from admfast.files.paths import user_path
from admfast.models.presets import MODELS

DINO_FOLDER = "dinov2-large"


def open_features(
    name: str, weights: str | PathLike[str] = "models", device: torch.device | str = "cpu"
) -> FeatureNet:
    """Return the network of features called `name`.

    Args:
        name: "inception"; "dinov2"; or a classifier: its name ("digits32_classifier", "256x256_classifier"),
            its weights file, or the folder of its training run.
        weights: the file of Inception's weights, the folder of DINOv2, or a folder that holds them under the
            names that `admfast fetch` gives them. Nothing is downloaded.
        device: where to compute.

    Raises:
        InvalidArgument: for an unknown name. CheckpointError: if weights are missing or don't fit; the error
            says how to get them. Unavailable: for "dinov2" without transformers.
    """
    if name == "inception":
        return InceptionFeatures(read_inception_weights(find_inception_weights(weights)), device)
    if name == "dinov2":
        folder = user_path("weights", weights)
        return DinoFeatures(folder / DINO_FOLDER if (folder / DINO_FOLDER).is_dir() else folder, device)
    return ClassifierFeatures(_classifier_path(name, weights), device, name)


def _classifier_path(name: str, weights: str | PathLike[str]) -> Path:
    """Return the path of a classifier's weights, by its name or path."""
    if os.path.lexists(name):
        return user_path("features", name)
    model = MODELS.get(name) or MODELS.get(name.removesuffix(".pt"))
    if model is None or not name.removesuffix(".pt").endswith("classifier"):
        raise invalid("features", name, "inception, dinov2, or the name or path of a classifier")
    if model.shipped_path is not None:
        return model.shipped_path
    path = user_path("weights", weights) / model.file
    if not path.exists():
        raise CheckpointError(f"{path}: no such file (admfast fetch {model.name} --out {weights})")
    return path
