"""Floor 3: read, identify, compare, describe, write and download weights files."""

from admfast.checkpoints.describe import ForwardWork, count_forward_work, describe
from admfast.checkpoints.differences import (
    Differences,
    compare,
    fingerprint,
    nearest_preset,
    network_shapes,
    shapes_of,
)
from admfast.checkpoints.fetch import fetch
from admfast.checkpoints.infer import AmbiguousCheckpoint, ModelInfo, identify
from admfast.checkpoints.loading import identify_weights, load_network
from admfast.checkpoints.reading import Weights, read_weights
from admfast.checkpoints.writing import write_weights

__all__ = [
    "Differences",
    "ForwardWork",
    "ModelInfo",
    "AmbiguousCheckpoint",
    "Weights",
    "compare",
    "describe",
    "fetch",
    "fingerprint",
    "count_forward_work",
    "identify",
    "identify_weights",
    "load_network",
    "nearest_preset",
    "network_shapes",
    "read_weights",
    "shapes_of",
    "write_weights",
]
