"""`admfast inspect FILE`: what a weights file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from admfast.checkpoints import describe
from admfast.cli.options import options_of
from admfast.cli.sample_options import Preset
from admfast.errors import invalid, nearest
from admfast.files.tables import table

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run_inspect(
    path: Annotated[Path, typer.Argument(help="Weights file: .pt, .pth or .safetensors.")],
    preset: Preset = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Option of the network or its diffusion that the file doesn't show, such as num_heads=4; "
            "repeat it for more (default: none).",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size in images, for the memory (default: 1).")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Precision of the torso, for the memory: float32, float16 or bfloat16.")
    ] = "float32",
    values: Annotated[
        bool,
        typer.Option(
            "--values/--no-values", help="Read every value to count NaN and infinities (default: do)."
        ),
    ] = True,
) -> None:
    """Say what a weights file is: network, released model, size, work and memory of a forward pass."""
    if dtype not in _DTYPES:
        raise invalid("dtype", dtype, nearest(dtype, _DTYPES))
    if batch < 1:
        raise invalid("batch", batch, "1 image or more")
    options = options_of("--set", set_)
    rows = describe(
        path, preset=preset, batch=batch, dtype=_DTYPES[dtype], check_values=values, options=options
    )
    print(table(rows))
