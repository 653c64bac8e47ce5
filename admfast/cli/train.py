"""`admfast train KIND`: train a network; `admfast train export`: write it as a weights file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from admfast import checks
from admfast.checkpoints import load_network
from admfast.checkpoints.reading import ENDINGS
from admfast.cli import train_options as option
from admfast.cli.commands import UsageProblem
from admfast.cli.options import DTYPES, options_of
from admfast.cli.sample_options import Device
from admfast.engine.numerics import peak_memory
from admfast.errors import invalid
from admfast.files.atomic import check_free, check_place, check_writable
from admfast.files.images import write_png
from admfast.files.paths import user_path
from admfast.files.tables import table
from admfast.interrupts import SIGNALLED
from admfast.models import NetConfig
from admfast.training.distributed import World, join_processes
from admfast.training.export import export_run
from admfast.training.folder import MAY_CHANGE, RUN_FILE, read_run_file, recipe_from_description
from admfast.training.images import open_source
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
        preset: option.Preset = DIGITS,
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
        keep: option.Keep = 3,
        workers: option.Workers = 0,
        cache: option.Cache = None,
        async_save: option.AsyncSave = None,
        device: Device = None,
        dry_run: option.DryRun = False,
    ) -> None:
        if out is None and not dry_run:
            raise UsageProblem("Missing option '--out', the folder of the run; only --dry-run needs none.")
        options = options_of("--set", set_, also=None)
        given = {
            "steps": steps, "batch_size": batch_size, "microbatch": microbatch, "lr": lr, "seed": seed,
            "precision": precision,
            "checkpointing": None if checkpointing is None else checks.literal(checkpointing),
        }  # fmt: skip
        options |= {name: value for name, value in given.items() if value is not None}
        wanted = resolved(kind, preset, from_, options)
        if out is not None:
            wanted = _with_settings_of_run(user_path("out", out), wanted, options)
        loop_options = LoopOptions(
            save_every=save_every, log_every=log_every, grid_every=grid_every, keep=keep, workers=workers,
            cache=None if cache is None else str(user_path("cache", cache)), async_save=async_save,
        )  # fmt: skip
        place = _data(preset, data)
        run_folder = None if out is None else user_path("out", out)
        with join_processes(device) as world, _plain_warnings():
            if run_folder is None or dry_run:
                _try(wanted, place, labels, dataclasses.replace(loop_options, cache=None), world)
            else:
                _train(wanted, place, labels, run_folder, loop_options, world, from_)

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
        out = user_path("out", out, ENDINGS)
    drawn = None
    if picture is not None:
        picture = user_path("picture", picture, [".png"])
        drawn = draw_run(run)
        check_writable(picture)
        if not overwrite:
            check_free("picture", [picture])
    # `export_run` checks its arguments before it writes: an error in either file leaves neither.
    if out is not None:
        description = export_run(run, out, ema, width, DTYPES[dtype], overwrite)
        print(table([(name, str(description.training[name])) for name in ("step", "average")]))
        print(out.resolve())
    if picture is not None and drawn is not None:
        write_png(picture, drawn)
        print(picture.resolve())


def resolved(kind: str, preset: str, start: str | None, options: dict[str, Any]) -> Recipe:
    """Return the recipe of a command's options. Raises InvalidArgument, CheckpointError."""
    base = recipe_from_preset(kind, preset)
    if start is not None:
        _check_is_file(start)
        parts = split_options(kind, options)
        own = {name: value for name, value in parts["network"].items() if name not in _OWN}
        info = load_network(start, **own, **parts["process"])[1]
        network: NetConfig = dataclasses.replace(info.config, use_checkpoint=False)
        if not isinstance(network, KINDS[kind]):
            raise invalid("from", start, f"a network for the kind {kind!r}; it holds a {network.kind}")
        low_res_size = base.low_res_size if info.low_res_size is None else info.low_res_size
        # A network that was trained with a null class keeps it.
        dropping = dict(info.training.get("recipe", {})).get("drop_classes", 0.0)
        base = dataclasses.replace(
            base, network=network, process=info.diffusion or base.process, low_res_size=low_res_size,
            drop_classes=dropping,
        )  # fmt: skip
    return change_recipe(base, options)


def _check_is_file(start: str) -> None:
    """Reject the name of a preset or model in place of a file; say which option or command takes the name."""
    hint = describe_name(start)
    if hint is not None and not os.path.lexists(start):
        raise invalid("from", start, f"a weights file, or the folder of a run; {hint}")


def _with_settings_of_run(run: Path, wanted: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe whose changeable settings are those of the run in a folder, if it holds one.

    options: settings that the user gave; they stay.
    """
    if not (run / RUN_FILE).is_file():
        return wanted
    old = recipe_from_description(read_run_file(run))
    if old.batch_size != wanted.batch_size:  # the run refuses it, and its microbatch may not fit
        return wanted
    settings = {name: getattr(old, name) for name in MAY_CHANGE if name not in options}
    return dataclasses.replace(wanted, **settings)


# Options that a run always sets itself, not the file that it begins from.
_OWN = ("dropout", "num_classes")


def _data(preset: str, data: str | None) -> str:
    if data is None and preset != DIGITS:
        raise invalid("data", None, "the images: a folder, a zip, an npz, or digits")
    return data or "digits"


def _train(
    wanted: Recipe,
    data: str,
    labels: str,
    out: Path,
    loop_options: LoopOptions,
    world: World,
    start: str | None,
) -> None:
    source = open_source(data, labels)
    check_place(out)
    if world.is_first:
        print(
            table(
                [
                    *_rows(wanted, world),
                    ("data", f"{data}, {len(source)} images"),
                    ("out", str(out.resolve())),
                ]
            )
        )
    outcome = train(wanted, source, out, loop_options, world, start, say=_say)
    if world.is_first:
        peak = peak_memory(world.device) / 1e9
        print(f"{outcome.step} of {wanted.steps} steps are done; peak memory {peak:.2f} GB")
        print(out.resolve())
    if outcome.signal is not None:
        raise typer.Exit(SIGNALLED + outcome.signal)


def _try(wanted: Recipe, data: str, labels: str, loop_options: LoopOptions, world: World) -> None:
    """Make two steps; print the time and memory that the run would take."""
    trial = dry_run(wanted, open_source(data, labels), loop_options, world)
    if world.is_first:
        hours = trial.run_seconds / 3600
        rows = [
            ("step", f"{trial.step_seconds:.3f} s"),
            ("images a second", f"{wanted.batch_size / trial.step_seconds:.1f}"),
            ("peak memory", f"{trial.memory / 1e9:.2f} GB, of one process"),
            ("whole run", f"{hours:.2f} hours for {wanted.steps} steps"),
        ]
        print(table([*_rows(wanted, world), *rows]))


def _rows(wanted: Recipe, world: World) -> list[tuple[str, str]]:
    """Return the resolved recipe as rows of (name, value), one for each field and the processes."""
    rows = []
    for name, value in wanted.to_dict().items():
        text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        rows.append((name, text))
    return [*rows, ("processes", f"{world.size}, on {world.device}")]


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings (such as a skipped image) as one line, without their place in the code."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"admfast: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _say(text: str) -> None:
    print(text, flush=True)
