"""Write a released model's file with random weights, in the published format and at full size.

`python -m tests.tools.random_checkpoint 256x256_diffusion 256x256_classifier --out models/` makes 2.4 GB that
load, sample and inspect like the released files (the images are noise).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from admfast.checkpoints import network_shapes, write_weights
from admfast.models.config import NetConfig
from admfast.models.presets import preset


def random_state(config: NetConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations of order one: norms near 1, the rest by fan-in, nothing left at zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in network_shapes(config).items():
        z = torch.randn(tuple(shape), generator=generator)
        if key.endswith(".bias"):
            z *= 0.1
        elif len(shape) == 1:
            z = 1 + 0.1 * z
        elif not key.endswith(("label_emb.weight", "positional_embedding")):
            z /= math.sqrt(math.prod(shape[1:]))
        state[key] = z
    return state


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names such as 256x256_diffusion")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = preset(name)
        path = args.out / model.file
        write_weights(path, random_state(model.config))
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
