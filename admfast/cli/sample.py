"""`admfast sample NAME`: images into a folder."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from admfast.cli.options import options_of
from admfast.cli.tables import table
from admfast.errors import AdmfastError, invalid
from admfast.pipeline import Pipeline
from admfast.runs.sampling import SampleRun
from admfast.solvers import SOLVERS
from admfast.systems import load

# What one call makes at most: a slip such as 0-99999999999 is an error, not a full memory.
MANY = 10_000_000


def run_sample(
    name: Annotated[str, typer.Argument(help="A system (see `admfast models`) or a weights file.")],
    weights: Annotated[
        Path | None, typer.Option(help="Folder with the released files (default: none).")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Classifier for a model given as a file (default: none).")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Class indices, 0-9 or 207,360 (default: seed modulo the number of classes)."),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(help="Images of each class (default: 1, or as --seeds asks).")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, 0-15 or 3,5: one image each (default: 0, 1, 2, ...).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Network evaluations an image (default: the system's).")
    ] = None,
    solver: Annotated[str, typer.Option(help=f"One of {', '.join(SOLVERS)}.")] = "ddpm",
    eta: Annotated[float | None, typer.Option(help="Noise of ddim, 0 to 1 (default: 0).")] = None,
    respacing: Annotated[
        str | None,
        typer.Option(
            help="Timesteps in place of --steps, as published: 250, ddim25, 10,10,10 (default: from --steps)."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of the classifier's gradient, 0 for none (default: the system's)."),
    ] = None,
    upsampler_steps: Annotated[
        int | None, typer.Option(help="Evaluations of the upsampler (default: the system's).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images at a time (default: by image size and device).")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto, fp32, tf32, bf16 or fp16; auto is fp16 on a GPU, else fp32.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU where there is one).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for images/, grid.png and the npz.")] = Path("out"),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace older samples by the complete new set (default: refuse)."),
    ] = False,
    intermediates: Annotated[
        int, typer.Option(help="Also keep x_0 after every so many steps; 0 for none.")
    ] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="For a file: what it doesn't show, such as num_heads=4; repeat for more (default: none).",
        ),
    ] = None,
) -> None:
    """Sample images: PNG files, one labelled grid and the published npz."""
    if batch is not None and batch < 1:
        raise invalid("batch", batch, "1 or more")
    options = options_of("--set", set_)
    pipe = load(name, weights, classifier=classifier, device=device, precision=precision, **options)
    wanted, keys = plan_images(
        None if classes is None else parse_numbers("classes", classes),
        per_class,
        None if seeds is None else parse_numbers("seeds", seeds),
        pipe.num_classes,
    )
    settings: dict[str, Any] = {"solver": solver}
    given = {"steps": steps, "eta": eta, "respacing": respacing}
    given |= {"guidance": guidance, "upsampler_steps": upsampler_steps}
    settings |= {key: value for key, value in given.items() if value is not None}
    run = SampleRun(pipe, wanted, keys, out, settings, batch, overwrite, intermediates)
    print(table(_resolved(pipe, run)), flush=True)
    started = time.time()
    try:
        written = run.run()
    except (AdmfastError, KeyboardInterrupt):
        if run.finished:
            print(f"{run.finished} of {len(keys)} images are finished and kept in {run.kept.resolve()}")
        raise
    spent = time.time() - started
    print(f"{len(keys)} images in {spent:.1f} s ({len(keys) / spent:.2f} images/s)")
    for path in (out / "images", *written):
        print(path.resolve())


def parse_numbers(name: str, text: str) -> list[int]:
    """Read "0-9", "207,360" or "0-3,7"; raises InvalidArgument."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})\s*(?:-\s*(\d{1,20})\s*)?", part)
        if match is None:
            raise invalid(name, text, "whole numbers and ranges separated by commas, such as 0-9 or 207,360")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise invalid(name, text, f"the range {part.strip()} runs backwards")
        if last - first >= MANY or len(numbers) + last - first >= MANY:
            raise invalid(name, text, f"at most {MANY:,} numbers")
        numbers.extend(range(first, last + 1))
    return numbers


def plan_images(
    classes: list[int] | None, per_class: int | None, seeds: list[int] | None, num_classes: int | None
) -> tuple[list[int] | None, list[int]]:
    """Return the class (None without classes) and the seed of every image.

    With `per_class` the images of a class stand together. Without it there is one image a seed, the classes
    taking turns; without seeds one image a class.
    """
    if num_classes is None:
        if classes is not None or per_class is not None:
            raise invalid("classes", classes, "this model has no classes; --seeds says how many images")
        return None, [0] if seeds is None else seeds
    for label in classes or ():
        if label >= num_classes:
            raise invalid("classes", label, f"0 to {num_classes - 1}")
    if per_class is None:
        if seeds is None:
            seeds = list(range(len(classes))) if classes else [0]
        if classes is None:
            return [seed % num_classes for seed in seeds], seeds
        return [classes[i % len(classes)] for i in range(len(seeds))], seeds
    if per_class < 1:
        raise invalid("per-class", per_class, "1 or more")
    asked = range(num_classes) if classes is None else classes
    if per_class * len(asked) > MANY:
        raise invalid("per-class", per_class, f"at most {MANY:,} images in all")
    labels = [label for label in asked for _ in range(per_class)]
    if seeds is None:
        seeds = list(range(len(labels)))
    if len(seeds) != len(labels):
        raise invalid("seeds", f"{len(seeds)} seeds", f"one for each of the {len(labels)} images, or none")
    return labels, seeds


def _resolved(pipe: Pipeline, run: SampleRun) -> list[tuple[str, str]]:
    """What will be done, as a table."""
    settings, side = run.settings, pipe.config.image_size
    steps = f"{settings.get('steps', pipe.steps)} steps"
    if "respacing" in settings:
        steps = f"respacing {settings['respacing']}"
    eta = f", eta {settings['eta']:g}" if "eta" in settings else ""
    rows = [
        ("system", pipe.name),
        ("images", f"{len(run.seeds)} of {side}x{side}, {run.batch_size or pipe.images_at_a_time} at a time"),
        ("seeds", _in_short(run.seeds)),
        ("classes", "none" if run.classes is None else _in_short(run.classes)),
        ("solver", f"{settings['solver']}, {steps}{eta}"),
        ("guidance", "none" if pipe.classifier is None else f"{settings.get('guidance', pipe.guidance):g}"),
        ("device", str(pipe.device)),
        ("precision", str(pipe.net.torso_dtype).removeprefix("torch.")),
        ("out", str(run.out.resolve())),
    ]
    if pipe.upsampler is not None:
        side = pipe.upsampler.config.image_size
        steps = f"{settings.get('upsampler_steps', pipe.upsampler.steps)} steps"
        rows.insert(6, ("upsampler", f"to {side}x{side}, {steps}"))
    return rows


def _in_short(numbers: Sequence[int]) -> str:
    """The numbers, or the first and the last few of many."""
    if len(numbers) <= 12:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:6]))}, ..., {', '.join(map(str, numbers[-3:]))}"
