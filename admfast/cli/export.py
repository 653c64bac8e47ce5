"""`admfast export SOURCE --to FORMAT --out PATH`: write a network for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admfast import checks
from admfast.cli.options import DTYPES, parse_settings
from admfast.cli.sample_options import Preset, Set, Weights
from admfast.files.tables import table
from admfast.sampling.export import export
from admfast.sampling.load import LOW_RES_SIZE


def run_export(
    source: Annotated[
        str, typer.Argument(help="A system (its diffusion model), a weights file, or a run's folder.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="diffusers: a folder for DDIMPipeline.from_pretrained; safetensors: a file with its "
            "description; published: the .pt and the flags of the published scripts."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder (diffusers), or the .safetensors or .pt file.")],
    weights: Weights = None,
    preset: Preset = None,
    scheduler: Annotated[
        str,
        typer.Option(
            help="With diffusers: ddim, without the variance channels, or ddpm, with them (DDPMPipeline)."
        ),
    ] = "ddim",
    dtype: Annotated[str, typer.Option(help="On disk: float32, float16 or bfloat16.")] = "float32",
    set_: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files (default: refuse).")
    ] = False,
) -> None:
    """Write a network for another program: diffusers, the published code, or safetensors."""
    checks.one_of("dtype", dtype, DTYPES)
    exported = export(
        source, out, to=to, weights=weights, preset=preset, scheduler=scheduler, dtype=DTYPES[dtype],
        overwrite=overwrite, **parse_settings("--set", set_, extra_names=[LOW_RES_SIZE]),
    )  # fmt: skip
    rows = [(name, str(value)) for name, value in exported.description.network.to_dict().items()]
    process = exported.description.diffusion
    rows += [] if process is None else [(name, str(value)) for name, value in process.to_dict().items()]
    print(table(rows))
    for note in exported.notes:
        print(note)
    if exported.flags is not None:
        print(exported.flags)
    print(exported.path.resolve())
