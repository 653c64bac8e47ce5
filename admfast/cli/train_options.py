"""The options of `admfast train`, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[
    str | None,
    typer.Option(
        help="Preset whose network and settings are the defaults "
        "(default: those of the run in the folder; digits32 for a new run)."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="Images: a folder, a zip, an npz, or digits (default: digits for digits32)."),
]
Labels = Annotated[
    str,
    typer.Option(help="Where the classes of a folder or zip come from: auto, folders, prefixes or none."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the run; a run in it is continued (no default; --dry-run needs none)."),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Optimiser steps of the whole run (default: its own; the preset's for a new run)."),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Images per step, over all processes (default: the preset's).")
]
Microbatch = Annotated[
    int | None,
    typer.Option(
        help="Images that a process computes at once (default: the run's own; its whole share for a new run)."
    ),
]
Rate = Annotated[
    float | None, typer.Option("--lr", help="Highest learning rate of the schedule (default: the preset's).")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the initial weights and every draw (default: the preset's).")
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Precision of the network's torso: fp32, tf32, bf16 or fp16; auto is bf16 on a GPU, fp32 on a "
        "CPU (default: the run's own; auto for a new run)."
    ),
]
Checkpointing = Annotated[
    str | None,
    typer.Option(
        help="Parts that the backward pass recomputes, to save memory: none, norms, attention (its blocks), "
        "all (all blocks), or a number k for every k-th block (default: the run's own; none for a new run)."
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Weights file or run to begin from; its network and process replace the preset's "
        "(default: none).",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of the recipe, the network or the process, such as num_classes=5, "
        "dropout=0.1, ema=0.999,0.9999 or diffusion_steps=4000; repeat it for more (default: none).",
    ),
]
SaveEvery = Annotated[int, typer.Option(help="Steps between two snapshots.")]
LogEvery = Annotated[int, typer.Option(help="Steps between two rows of the log.")]
GridEvery = Annotated[int, typer.Option(help="Steps between two grids of samples; 0 for none.")]
EvaluateEvery = Annotated[
    int,
    typer.Option(
        help="Steps between two evaluations, which compare samples of the average with the training images; "
        "0 for none."
    ),
]
EvaluateImages = Annotated[int, typer.Option(min=6, help="Samples of an evaluation.")]
EvaluateFeatures = Annotated[
    str,
    typer.Option(
        help="Network whose features are compared: inception, dinov2, or the name or file of a classifier."
    ),
]
EvaluateWeights = Annotated[
    Path, typer.Option(help="Folder or file with the weights of --evaluate-features; see `admfast fetch`.")
]
Keep = Annotated[int, typer.Option(help="Number of newest snapshots to keep.")]
Workers = Annotated[
    int,
    typer.Option(
        help="Processes that decode images, for each process of the run; 0 decodes in the run itself."
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(help="Where to keep decoded images: memory, or a folder (default: nowhere)."),
]
AsyncSave = Annotated[
    bool | None,
    typer.Option(
        "--async-save/--no-async-save",
        help="Write snapshots during the next steps, from a copy in host memory (default: on a GPU).",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run/--no-dry-run", help="Make two steps, print the time and memory of the run, write nothing."
    ),
]
