"""The options of `admfast sample`, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admfast.diffusion import SPACINGS
from admfast.solvers import list_solvers

Name = Annotated[str, typer.Argument(help="A system (see `admfast models`) or a weights file.")]
Weights = Annotated[Path | None, typer.Option(help="Folder with the released files (default: none).")]
ClassifierFile = Annotated[
    Path | None, typer.Option("--classifier", help="Classifier for a model given as a file (default: none).")
]
UpsamplerFile = Annotated[
    Path | None,
    typer.Option("--upsampler", help="Upsampler for a model given as a file (default: none)."),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Released model that the file holds (default: recognized from the file)."),
]
LowRes = Annotated[
    Path | None,
    typer.Option(
        help="For an upsampler's file, the images to enlarge: an npz, a folder or an image (default: none)."
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="balanced (seed modulo the number of classes), random (drawn by the seed), or class indices "
        "such as 0-9 or 207,360 (default: balanced)."
    ),
]
PerClass = Annotated[int | None, typer.Option(help="Images of each class (default: 1, or by --seeds).")]
Seeds = Annotated[
    str | None,
    typer.Option(
        help="Seeds, 0-15 or 3,5: one image each; with --num only the first (default: 0, 1, 2, ...)."
    ),
]
Num = Annotated[
    int | None,
    typer.Option(
        "--num",
        "--num-images",
        help="Make so many images in shards, by any number of processes that share the folder (default: by "
        "one process, a PNG for each image).",
    ),
]
Shard = Annotated[
    int | None,
    typer.Option(
        help="With --num, images of a shard, a multiple of the batch (default: a 200th of all, or "
        "1000 if that is less, in whole batches)."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HxW",
        help="Image size in pixels, 64x96 or 64; in a cascade the base model's (default: the model's).",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Network evaluations per image (default: the system's).")]
SOLVER_HELP = f"A solver, with its options if not these defaults: {'; '.join(list_solvers('noise'))}"
Solver = Annotated[
    str | None,
    typer.Option(
        help=f"{SOLVER_HELP} (default: auto, the best known for the number of steps; with --respacing ddpm)."
    ),
]
Quality = Annotated[
    str | None,
    typer.Option(
        help="draft: 10 steps; good: 25; best: the system's own number. Instead of --steps (default: best)."
    ),
]
Eta = Annotated[
    float | None, typer.Option(help="The solver's option eta, as in ddim:eta=0.5 (default: its own).")
]
Spacing = Annotated[
    str | None,
    typer.Option(help=f"How --steps are spaced: {', '.join(SPACINGS)} (default: as the solver does)."),
]
DynamicThreshold = Annotated[
    float | None,
    typer.Option(
        help="Limit x_0 of each image by this quantile of its absolute value, such as 0.995 "
        "(default: x_0 is clipped to -1..1)."
    ),
]
Respaced = Annotated[
    str | None,
    typer.Option(
        "--respacing",
        help="Timesteps instead of --steps: 250, ddim25 or 10,10,10 as published, karras18, or a list "
        "[999,850,500] (default: from --steps).",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the step with torch.compile, which takes minutes at first (default: no)."
    ),
]
CompileCache = Annotated[
    Path | None,
    typer.Option(
        help="With --compile: folder in which torch keeps compiled code for the next process "
        "(default: torch's own)."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", help="Print the precision of every part, and how steps run (default: no)."),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Print at the end how the steps ran, the seconds of each part, the share of the machine's rate "
        "(of a matrix product measured then), and advice (default: no).",
    ),
]
UpsamplerSteps = Annotated[
    int | None, typer.Option(help="Evaluations of the upsampler per image (default: the system's).")
]
Batch = Annotated[int | None, typer.Option(help="Images at a time (default: by image size and device).")]
Precision = Annotated[
    str,
    typer.Option(
        help="auto, fp32, tf32, bf16, fp16 or int8; auto is bf16 on a GPU and on a CPU with AMX, else fp32."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU if there is one).")]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of a step on a CPU (default: by its size, or OMP_NUM_THREADS)."),
]
Out = Annotated[Path, typer.Option(help="Folder for images/, grid.png and the npz, or for the shards.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace older samples once the new set is complete (default: refuse)."),
]
Intermediates = Annotated[int, typer.Option(help="Also write x_0 after every so many steps; 0 for none.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Option that a weights file doesn't show, such as num_heads=4; can be repeated (default: none).",
    ),
]
SetClassifier = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="The same for the file of --classifier (default: none)."),
]
SetWeak = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="The same for the file of --weak (default: none)."),
]
SetUpsampler = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="The same for the file of --upsampler, and low_res_size, the image side that it enlarges "
        "(default: none).",
    ),
]
