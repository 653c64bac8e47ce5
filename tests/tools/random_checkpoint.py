"""Write a released model's file with random weights, in the published format and at full size.

`python -m tests.tools.random_checkpoint 256x256_diffusion 256x256_classifier --out models/` makes 2.4 GB that
load, sample and inspect like the released files (the images are noise).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from admfast.checkpoints import write_weights
from admfast.models.presets import preset
from bench.sampling.weights import random_state

__all__ = ["random_state"]


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
