"""`admfast inspect FILE`: describe a weights file; with `--train`, the memory that training it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admfast import checks
from admfast.checkpoints import describe
from admfast.cli import train_options as option
from admfast.cli.options import DTYPES, parse_settings
from admfast.cli.sample_options import Preset
from admfast.errors import invalid
from admfast.files.tables import table
from admfast.models.presets import MODELS, SYSTEMS


def run_inspect(
    path: Annotated[
        Path, typer.Argument(help="Weights file (.pt, .pth, .safetensors); with --train also a preset.")
    ],
    preset: Preset = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Option of the network or its diffusion that the file doesn't show, such as num_heads=4; "
            "with --train any setting of `admfast train`; repeat it for more (default: none).",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size in images, for the memory (default: 1).")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Precision of the torso, for the memory: float32, float16 or bfloat16.")
    ] = "float32",
    values: Annotated[
        bool,
        typer.Option(
            "--values/--no-values", help="Read every value to count NaN and infinities (default: yes)."
        ),
    ] = True,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Print the memory of a training step instead.")
    ] = False,
    batch_size: option.BatchSize = None,
    microbatch: option.Microbatch = None,
    precision: option.Precision = None,
    checkpointing: option.Checkpointing = None,
) -> None:
    """Describe a weights file: network, released model, size, work and memory of a forward pass."""
    training_options = {
        "batch_size": batch_size, "microbatch": microbatch, "precision": precision,
        "checkpointing": checkpointing,
    }  # fmt: skip
    training_options = {name: value for name, value in training_options.items() if value is not None}
    if train:
        _reject_forward_options(preset, batch, dtype, values)
        from admfast.cli.train_memory import print_memory

        return print_memory(path, set_, training_options)
    for name, value in training_options.items():
        raise invalid(name, value, "allowed only together with --train: it sets a training step")
    checks.one_of("dtype", dtype, DTYPES)
    if batch < 1:
        raise invalid("batch", batch, "a whole number of at least 1")
    if (name := str(path)) in {*SYSTEMS, *MODELS} and not path.exists():
        raise invalid("path", name, f"a weights file; `admfast models {name}` describes what has this name")
    options = parse_settings("--set", set_)
    rows = describe(
        path, preset=preset, batch=batch, dtype=DTYPES[dtype], check_values=values, options=options
    )
    print(table(rows))


def _reject_forward_options(preset: str | None, batch: int, dtype: str, values: bool) -> None:
    """Reject the options that describe a forward pass: `--train` describes a training step."""
    options = (
        ("preset", preset, None, "give the name of the preset in place of the file"),
        ("batch", batch, 1, "use --batch-size for the images of a training step"),
        ("dtype", dtype, "float32", "use --precision for the precision of a training step"),
        ("values", values, True, "leave it out, because no values of the file are read"),
    )
    for name, value, default, advice in options:
        if value != default:
            raise invalid(name, value, f"not allowed together with --train; {advice}")
