"""`admfast evaluate SAMPLES [REFERENCE]`: FID, sFID, Inception Score, precision, recall and others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from admfast.cli.commands import UsageProblem
from admfast.cli.run_images import RunImages, open_set
from admfast.cli.sample_options import Device
from admfast.distributed import World, join_processes
from admfast.errors import allowed_names, invalid
from admfast.evaluation import Evaluation, FeatureNet, ImageSet, compute_features, evaluate, open_features
from admfast.evaluation.evaluate import PUBLISHED_MEASURES, comparable_values, published_values
from admfast.evaluation.features import check_image
from admfast.evaluation.reference import write_reference
from admfast.evaluation.report import write_report
from admfast.files.atomic import check_not_existing, check_writable, write_text
from admfast.files.paths import user_path
from admfast.files.tables import table
from admfast.models.published import PUBLISHED, Metric

Samples = Annotated[str, typer.Argument(help="An npz, a folder or zip of images, or a finished run.")]
Reference = Annotated[
    str | None, typer.Argument(help="As SAMPLES, or a published reference batch (default: no comparison).")
]
Features = Annotated[
    list[str] | None,
    typer.Option(
        help="Network whose features are compared: inception (the published evaluator's), dinov2, or the "
        "name or file of a classifier, such as digits32_classifier; repeat it for more (default: inception)."
    ),
]
Weights = Annotated[
    Path, typer.Option(help="Folder or file with the weights of --features; see `admfast fetch`.")
]
Expected = Annotated[
    str | None,
    typer.Option(help="System whose published results are shown too, such as imagenet256 (default: none)."),
]
MakeReference = Annotated[
    bool,
    typer.Option("--make-reference", help="Write a reference batch of SAMPLES to --out (default: evaluate)."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="JSON file for the results, or with --make-reference the npz (default: none)."),
]
Report = Annotated[
    Path | None,
    typer.Option(help="HTML file for a report with images, of the first --features (default: none)."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that the network gets at a time.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of random subsets and of the intervals.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files (default: refuse).")]


def run_evaluate(
    samples: Samples,
    reference: Reference = None,
    features: Features = None,
    weights: Weights = Path("models"),
    expected: Expected = None,
    make_reference: MakeReference = False,
    out: Out = None,
    report: Report = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure samples as the published evaluator does: FID, sFID, Inception Score, precision and recall."""
    if expected is not None and expected not in PUBLISHED:
        raise invalid("expected", expected, allowed_names(expected, PUBLISHED))
    if make_reference and (reference or report or features not in (None, ["inception"])):
        raise UsageProblem("--make-reference takes only SAMPLES and --out, and the features of Inception.")
    if make_reference and out is None:
        raise UsageProblem("--make-reference needs '--out', the npz to write.")
    out = _target("out", out, ".npz" if make_reference else ".json", overwrite)
    report = _target("report", report, ".html", overwrite)
    with join_processes(device) as world:
        images = open_set(samples, "samples")
        others = None if reference is None else open_set(reference, "reference")
        names = dict.fromkeys(features or ["inception"])
        nets = [open_features(name, weights, world.device) for name in names]
        if make_reference and out is not None:
            return _make_reference(images, nets[0], out, batch_size, seed, world)
        for net in nets:  # before hours of work by the first
            for each in (images, others):
                if each is not None:
                    check_image(net, each)
        results = []
        for net in nets:
            results.append(_evaluate(net, images, others, batch_size, seed, world))
            if world.is_first:
                print(_text(results[-1], PUBLISHED[expected] if expected is not None else ()), flush=True)
                if out is not None:
                    write_text(out, json.dumps([result.to_dict() for result in results], indent=1) + "\n")
        if not world.is_first:
            return None
        if out is not None:
            print(out.resolve())
        if report is not None:
            settings: dict[str, Any] = {"weights": weights, "batch size": batch_size, "seed": seed}
            settings |= {"device": world.device, "torch": torch.__version__}
            if isinstance(images, RunImages):
                settings |= images.settings()
            write_report(report, results[0], images, others, expected, settings)
            print(report.resolve())
    return None


def _target(name: str, path: Path | None, ending: str, overwrite: bool) -> Path | None:
    """Return the path of a file to write. Raises OutputError if it can't be written, or exists."""
    if path is None:
        return None
    target = user_path(name, path, [ending])
    check_writable(target)
    if not overwrite:
        check_not_existing(name, [target])
    return target


def _evaluate(
    net: FeatureNet, samples: ImageSet, reference: ImageSet | None, batch_size: int, seed: int, world: World
) -> Evaluation:
    """Evaluate by one network, with a progress bar."""
    with _progress(net, len(samples) + (0 if reference is None else len(reference)), world) as bar:
        return evaluate(
            samples, reference, net, batch_size=batch_size, world=world, seed=seed, count=bar.update
        )


def _make_reference(
    images: ImageSet, net: FeatureNet, target: Path, batch_size: int, seed: int, world: World
) -> None:
    """Compute the statistics of a set and write them with its images."""
    with _progress(net, len(images), world) as bar:
        found = compute_features(net, images, batch_size, world, bar.update)
    if world.is_first:
        write_reference(target, images, found, seed)
        print(target.resolve())


def _progress(net: FeatureNet, images: int, world: World) -> tqdm[object]:
    """Return the bar of this process's images; it is shown by the first process, on a terminal."""
    total = images // world.size
    return tqdm(total=total, desc=net.name, unit="image", disable=None if world.is_first else True)


def _text(result: Evaluation, published: Sequence[Metric]) -> str:
    """Return the tables that the command prints."""
    sets = [("samples", result.samples), ("reference", result.reference)]
    lines = [("features", result.features)]
    lines += [
        (name, f"{found['name']}, {found['images']:,} images of {found['size']}x{found['channels']}")
        for name, found in sets
        if found is not None
    ]
    rows = []
    for measure in result.measures:
        low_high = "" if measure.interval is None else "{:.4f} to {:.4f}".format(*measure.interval)
        rows.append((measure.name, f"{measure.value:.5g}", low_high, measure.how))
    parts = [table(lines), table(rows, ("measure", "value", "95 % interval", "how"))]
    if published:
        parts.append(_published_table(result, published))
    if result.warnings:
        parts.append("\n".join(f"warning: {warning}" for warning in result.warnings))
    return "\n\n".join(parts) + "\n"


def _published_table(result: Evaluation, published: Sequence[Metric]) -> str:
    """Return the published results of a system under those of the samples."""
    rows = [(f"{metric.conditions} ({metric.source})", published_values(metric)) for metric in published]
    if (own := comparable_values(result)) is not None:
        rows.insert(0, ("these samples", own))
    cells = [(name, *map(_number, values)) for name, values in rows]
    return table(cells, ("published (Inception features)", *PUBLISHED_MEASURES))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
