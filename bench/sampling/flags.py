"""Command-line flags of the benches that run guided steps."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

PUBLISHED_PATH = "GUIDED_DIFFUSION"
PUBLISHED_FOLDER = Path(".guided-diffusion")
PEERS = ("eager", "channels-last", "compiled", "openvino")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for presets, batches, precisions and peers, which `choice.choose` reads."""
    add = parser.add_argument
    add("--systems", metavar="NAME,...", help="presets (default: by device)")
    add("--batches", metavar="N,...", help="images per step (default: 8,1 on a GPU, 1,4 on a CPU)")
    add("--precisions", metavar="NAME,...", help="precisions of our steps (default: by device)")
    add("--all", action="store_true", help="every preset; batches 8,1,32 on a GPU, also batch 1 on a CPU")
    add_published(parser)
    add(
        "--peers",
        metavar="NAME,...",
        nargs="?",
        const=",".join(PEERS),
        help=f"some of {','.join(PEERS)}; without a value all, which takes minutes to compile "
        "(default: eager and channels-last, if the published code is found)",
    )


def add_published(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the path of the published code."""
    parser.add_argument(
        "--guided-diffusion",
        metavar="PATH",
        default=published_path(),
        help="a checkout of the published code, to compare with "
        f"(default: {PUBLISHED_PATH}, or {PUBLISHED_FOLDER} if it exists)",
    )


def published_path() -> str:
    """Return the default path of the published code, "" if there is none."""
    return os.environ.get(PUBLISHED_PATH) or (str(PUBLISHED_FOLDER) if PUBLISHED_FOLDER.is_dir() else "")
