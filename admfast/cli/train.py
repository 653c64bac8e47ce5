"""`admfast train KIND`: train a network; `admfast train export`: write it as a weights file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from admfast import checks
from admfast.checkpoints import load_network
from admfast.checkpoints.reading import WEIGHTS_SUFFIXES
from admfast.checkpoints.snapshots import is_run_folder
from admfast.cli import train_options as option
from admfast.cli.commands import UsageProblem
from admfast.cli.options import DTYPES, parse_settings
from admfast.cli.sample_options import Device
from admfast.cli.train_evaluation import EvaluationOptions, TrainingEvaluation
from admfast.distributed import World, join_processes
from admfast.engine.numerics import peak_memory
from admfast.errors import OutputError, invalid
from admfast.files.atomic import check_folder_path, check_not_existing, check_writable
from admfast.files.images import write_png
from admfast.files.paths import user_path
from admfast.files.tables import table
from admfast.interrupts import SIGNAL_STATUS
from admfast.models import NetConfig
from admfast.models.description import Description
from admfast.runs.folder import find_sample_files
from admfast.training.export import export_run
from admfast.training.folder import RUN_FILE, read_run_file, recipe_from_description
from admfast.training.images import training_source
from admfast.training.loop import LoopOptions, dry_run, train
from admfast.training.picture import draw_run
from admfast.training.recipe import KINDS, Recipe
from admfast.training.recipes import (
    DIGITS,
    PRESETS,
    change_recipe,
    describe_name,
    recipe_from_preset,
    split_options,
)

commands = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True
)


@commands.callback()
def run_train() -> None:
    """Train a diffusion model, classifier or upsampler, or export a trained one."""


def _command(kind: str) -> Callable[..., None]:
    """Return the command that trains networks of a kind."""

    def run(
        out: option.Out = None,
        preset: option.Preset = None,
        data: option.Data = None,
        labels: option.Labels = "auto",
        steps: option.Steps = None,
        batch_size: option.BatchSize = None,
        microbatch: option.Microbatch = None,
        lr: option.Rate = None,
        seed: option.Seed = None,
        precision: option.Precision = None,
        checkpointing: option.Checkpointing = None,
        from_: option.From = None,
        set_: option.Set = None,
        save_every: option.SaveEvery = 1000,
        log_every: option.LogEvery = 100,
        grid_every: option.GridEvery = 1000,
        evaluate_every: option.EvaluateEvery = 0,
        evaluate_images: option.EvaluateImages = 1000,
        evaluate_features: option.EvaluateFeatures = "digits32_classifier",
        evaluate_weights: option.EvaluateWeights = Path("models"),
        keep: option.Keep = 3,
        workers: option.Workers = 0,
        cache: option.Cache = None,
        async_save: option.AsyncSave = None,
        device: Device = None,
        dry_run: option.DryRun = False,
    ) -> None:
        if out is None and not dry_run:
            raise UsageProblem("Missing option '--out', the folder of the run; only --dry-run needs none.")
        options = parse_settings("--set", set_, extra_names=None)
        flags = {
            "steps": steps, "batch_size": batch_size, "microbatch": microbatch, "lr": lr, "seed": seed,
            "precision": precision,
            "checkpointing": None if checkpointing is None else checks.parse_literal(checkpointing),
        }  # fmt: skip
        options |= {name: value for name, value in flags.items() if value is not None}
        run_folder = None if out is None else user_path("out", out)
        old_run = None if run_folder is None else _run_in(run_folder)
        run_recipe = _recipe_of(old_run, kind, preset, from_, options)
        loop_options = LoopOptions(
            save_every=save_every, log_every=log_every, grid_every=grid_every, keep=keep, workers=workers,
            evaluate_every=evaluate_every, async_save=async_save,
            cache=None if cache is None else str(user_path("cache", cache)),
        )  # fmt: skip
        data_name = _data_or_digits(preset, data, old_run)
        evaluation = EvaluationOptions(evaluate_features, evaluate_weights, evaluate_images)
        with join_processes(device) as world, _one_line_warnings():
            if run_folder is None or dry_run:
                _dry_run(run_recipe, data_name, labels, dataclasses.replace(loop_options, cache=None), world)
            else:
                _train(run_recipe, data_name, labels, run_folder, loop_options, world, from_, evaluation)

    run.__doc__ = f"Train {_ARTICLES[kind]}. Presets: {', '.join(PRESETS[kind])}."
    return run


_ARTICLES = {
    "diffusion": "a diffusion model",
    "classifier": "a noisy classifier",
    "upsampler": "an upsampler",
}
for _kind in KINDS:
    commands.command(_kind)(_command(_kind))


@commands.command("export")
def run_export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[
        Path | None, typer.Option(help="Weights file: .safetensors, or .pt as published (default: none).")
    ] = None,
    ema: Annotated[
        str | None, typer.Option(help="Which average, by EMA rate such as 0.9999 (default: the run's first).")
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            help="Instead of --ema, the width of an average that is combined from those of ema_power, as a "
            "share of the run (default: none)."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="On disk: float32, float16 or bfloat16.")] = "float32",
    picture: Annotated[
        Path | None, typer.Option(help="PNG file for the run's losses and samples (default: none).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files (default: refuse).")
    ] = False,
) -> None:
    """Write a run's averaged weights, its picture, or both."""
    checks.one_of("dtype", dtype, DTYPES)
    if out is None:
        if picture is None:
            raise invalid("out", None, "a weights file to write, or --picture")
        for name, value in (("ema", ema), ("width", width)):
            if value is not None:
                raise invalid(name, value, "only with --out, the weights file")
    else:
        out = user_path("out", out, WEIGHTS_SUFFIXES)
    drawing = None
    if picture is not None:
        picture = user_path("picture", picture, [".png"])
        drawing = draw_run(run)
        check_writable(picture)
        if not overwrite:
            check_not_existing("picture", [picture])
    # `export_run` checks its arguments before it writes: an error in either file leaves neither.
    if out is not None:
        description = export_run(run, out, ema, width, DTYPES[dtype], overwrite)
        print(table([(name, str(description.training[name])) for name in ("step", "average")]))
        print(out.resolve())
    if picture is not None and drawing is not None:
        write_png(picture, drawing)
        print(picture.resolve())


def resolve_recipe(kind: str, preset: str, start: str | None, options: dict[str, Any]) -> Recipe:
    """Return the recipe of a command's options. Raises InvalidArgument, CheckpointError."""
    base = recipe_from_preset(kind, preset)
    if start is not None:
        _check_is_file(start)
        parts = split_options(kind, options)
        file_settings = {name: value for name, value in parts["network"].items() if name not in _RUN_SETTINGS}
        info = load_network(start, **file_settings, **parts["process"])[1]
        network: NetConfig = dataclasses.replace(info.config, use_checkpoint=False)
        if not isinstance(network, KINDS[kind]):
            raise invalid("from", start, f"a network for the kind {kind!r}; it holds a {network.kind}")
        low_res_size = base.low_res_size if info.low_res_size is None else info.low_res_size
        # A network that was trained with a null class keeps it.
        drop_classes = dict(info.training.get("recipe", {})).get("drop_classes", 0.0)
        base = dataclasses.replace(
            base, network=network, process=info.diffusion or base.process, low_res_size=low_res_size,
            drop_classes=drop_classes,
        )  # fmt: skip
    return change_recipe(base, options)


def _check_is_file(start: str) -> None:
    """Reject the name of a preset or model in place of a file; say which option or command takes the name."""
    hint = describe_name(start)
    if hint is not None and not os.path.lexists(start):
        raise invalid("from", start, f"a weights file, or the folder of a run; {hint}")


def _run_in(folder: Path) -> Description | None:
    """Return the description of the run in a folder, None if it holds none."""
    return read_run_file(folder) if (folder / RUN_FILE).is_file() else None


def _recipe_of(
    old_run: Description | None, kind: str, preset: str | None, start: str | None, options: dict[str, Any]
) -> Recipe:
    """Return the recipe of a command, for a new run or for the run in its folder."""
    if old_run is None:
        return resolve_recipe(kind, preset or DIGITS, start, options)
    return _recipe_to_continue(recipe_from_description(old_run), kind, preset, start, options)


def _recipe_to_continue(
    old: Recipe, kind: str, preset: str | None, start: str | None, options: dict[str, Any]
) -> Recipe:
    """Return the recipe of a command for a run with the recipe `old`: what the user didn't give is the run's.

    Network and process are the run's too, unless a preset or a file to start from is given.
    """
    # The run refuses another kind or batch size, which its other settings may not fit.
    fits = old.kind == kind and options.get("batch_size") in (None, old.batch_size)
    if fits and preset is None and start is None:
        return change_recipe(old, options)
    new = resolve_recipe(kind, preset or DIGITS, start, options)
    if not fits:
        return new
    names = {field.name for field in dataclasses.fields(Recipe)} - {"kind", "network", "process"}
    return dataclasses.replace(new, **{name: getattr(old, name) for name in names - options.keys()})


# Options that a run always sets itself, not the file that it begins from.
_RUN_SETTINGS = ("dropout", "num_classes")


def _data_or_digits(preset: str | None, data: str | None, run: Description | None) -> str:
    """Return the name of the data: digits by default, if the preset and the run to continue are of digits."""
    if data is not None:
        return data
    of_digits = preset in (None, DIGITS)
    if run is not None:
        of_digits = of_digits and run.training.get("surroundings", {}).get("data") == "digits"
    if not of_digits:
        raise invalid("data", None, "the images: a folder, a zip, an npz, or digits")
    return "digits"


def _train(
    run_recipe: Recipe,
    data: str,
    labels: str,
    out: Path,
    loop_options: LoopOptions,
    world: World,
    start: str | None,
    evaluation: EvaluationOptions,
) -> None:
    _check_run_folder(out)
    source = training_source(data, labels)
    if world.is_first:
        rows = [("data", f"{data}, {len(source)} images"), ("out", str(out.resolve()))]
        print(table([*_rows(run_recipe, world), *rows]))
    evaluate = None
    if loop_options.evaluate_every:
        evaluate = TrainingEvaluation(run_recipe, source, evaluation, world)
    outcome = train(run_recipe, source, out, loop_options, world, start, _print_line, evaluate)
    if world.is_first:
        peak = peak_memory(world.device) / 1e9
        print(f"{outcome.step} of {run_recipe.steps} steps are done; peak memory {peak:.2f} GB")
        print(out.resolve())
    if outcome.signal is not None:
        raise typer.Exit(SIGNAL_STATUS + outcome.signal)


def _check_run_folder(out: Path) -> None:
    """Raise OutputError if `out` can't be the folder of a run: it is a file, or holds samples."""
    check_folder_path(out)
    samples = find_sample_files(out)
    if samples and not is_run_folder(out):
        contents = f"holds {len(samples)} files of samples (from `admfast sample`)"
        raise OutputError(f"out={str(out)!r}: {contents}; give another folder for the training run")


def _dry_run(run_recipe: Recipe, data: str, labels: str, loop_options: LoopOptions, world: World) -> None:
    """Make two steps; print the time and memory that the run would take."""
    trial = dry_run(run_recipe, training_source(data, labels), loop_options, world)
    if world.is_first:
        hours = trial.run_seconds / 3600
        rows = [
            ("step", f"{trial.step_seconds:.3f} s"),
            ("images a second", f"{run_recipe.batch_size / trial.step_seconds:.1f}"),
            ("peak memory", f"{trial.memory / 1e9:.2f} GB, of one process"),
            ("whole run", f"{hours:.2f} hours for {run_recipe.steps} steps"),
        ]
        print(table([*_rows(run_recipe, world), *rows]))


def _rows(run_recipe: Recipe, world: World) -> list[tuple[str, str]]:
    """Return the resolved recipe as rows of (name, value), one for each field and the processes."""
    rows = []
    for name, value in run_recipe.to_dict().items():
        text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        rows.append((name, text))
    return [*rows, ("processes", f"{world.size}, on {world.device}")]


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print warnings (such as a skipped image) as one line, without their place in the code."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"admfast: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _print_line(text: str) -> None:
    print(text, flush=True)
