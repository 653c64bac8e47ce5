"""Derive faster forms of a network's parameters, and update them when the parameters change."""

from admfast.models.fold.net import (
    FOLDING,
    TORSO,
    FoldableNet,
    check_ordinary,
    projecting_by_layer,
)
from admfast.models.fold.options import PARTS, FoldOptions
from admfast.models.fold.projections import Projected

__all__ = [
    "FOLDING",
    "PARTS",
    "TORSO",
    "FoldOptions",
    "FoldableNet",
    "Projected",
    "check_ordinary",
    "projecting_by_layer",
]
