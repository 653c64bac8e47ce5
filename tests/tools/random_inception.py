"""Weights of the FID Inception by a formula, in place of the real ones."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from admfast.evaluation.inception_layers import BLOCKS, CLASSES, FEATURES, STEM
from tests.parity.nets import procedural_state


def random_inception(seed: int = 5) -> dict[str, Tensor]:
    """Return a state dict with the keys and shapes of the FID port."""
    return procedural_state(inception_shapes(), seed, gain=np.sqrt(2))


def inception_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the FID port's parameters."""
    shapes, channels = {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}, 3

    def add(name, conv, inputs):
        shapes[f"{name}.conv.weight"] = (conv.channels, inputs, *conv.kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (conv.channels,)
        return conv.channels

    for conv in STEM:
        channels = channels if conv is None else add(conv.name, conv, channels)
    for block, branches in BLOCKS.items():
        total = 0
        for branch in branches:
            width = channels
            for i, conv in enumerate(branch.convs):
                second = branch.split and i == len(branch.convs) - 1
                width = add(f"{block}.{conv.name}", conv, branch.convs[-3].channels if second else width)
            total += width * (1 + branch.split)
        channels = total
    return shapes
