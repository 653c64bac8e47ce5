"""Derive faster forms of a network's parameters, and update them when the parameters change."""

from admfast.models.fold.net import (
    FOLD_LOCK,
    TORSO,
    FoldableNet,
    check_not_inference_mode,
    project_layer_by_layer,
)
from admfast.models.fold.options import PARTS, FoldOptions
from admfast.models.fold.projections import ProjectedEmbedding

__all__ = [
    "FOLD_LOCK",
    "PARTS",
    "TORSO",
    "FoldOptions",
    "FoldableNet",
    "ProjectedEmbedding",
    "check_not_inference_mode",
    "project_layer_by_layer",
]
