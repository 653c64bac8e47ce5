"""Manage the folder of a run: its lock, `run.json`, its log, and the state from which a run continues."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from admfast.checkpoints.reading import RUN_FOLDER_HINT, missing_path_hint
from admfast.checkpoints.snapshots import RUN_FILE, list_snapshots, read_newest_state, remove_leftovers
from admfast.distributed import World
from admfast.errors import AdmfastError, CheckpointError, first_line, invalid
from admfast.files.atomic import folder_removed_if_empty, output_error, write_text
from admfast.files.locks import folder_locked
from admfast.files.paths import user_path
from admfast.files.sources import Source
from admfast.models.description import Description, description_from_json
from admfast.training.recipe import Recipe, recipe_from_dict

LOG, GRIDS = "log.jsonl", "grids"
# Settings that may differ when a run continues: none of them changes the samples and draws of later steps.
MAY_CHANGE = ("steps", "microbatch", "checkpointing", "max_skipped")

Say = Callable[[str], None]


@contextlib.contextmanager
def lock_run_folder(run: Path, world: World) -> Iterator[None]:
    """Make the folder of a run, and lock it for the block; only the first process does this.

    If the block fails before a new run has a snapshot or a row of its log, its `run.json` is removed: another
    recipe may then use the folder. Without a `run.json`, a folder and lock that the block made are removed.
    Raises: OutputError if the folder can't be written, or another process is training in it.
    """
    if not world.is_first:
        yield
        return
    is_run = lambda: os.path.lexists(run / RUN_FILE)  # noqa: E731
    with folder_removed_if_empty(run), folder_locked(run, "training", keeps_file=is_run):
        remove_leftovers(run)
        is_new = not is_run()
        try:
            yield
        except BaseException:
            if is_new and not _has_progress(run):
                with contextlib.suppress(OSError):
                    (run / RUN_FILE).unlink()
            raise


def _has_progress(run: Path) -> bool:
    """Tell whether a run has a snapshot or a row of its log."""
    try:
        return bool(list_snapshots(run)) or ((run / LOG).is_file() and bool(read_log(run)))
    except (OSError, CheckpointError):  # a file that can't be read is kept
        return True


def environment_of(world: World, source: Source) -> dict[str, Any]:
    """Return the facts outside its recipe that a run depends on: data, processes, device, versions."""
    return {
        "data": source.identity(),
        "images": len(source),
        "classes": list(source.class_names),
        "processes": world.size,
        "device": str(world.device.type),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }


def match_existing_run(
    run: Path, recipe: Recipe, environment: Mapping[str, Any], world: World, say: Say
) -> tuple[Recipe, Mapping[str, Any]]:
    """Check that a recipe agrees with the run in the folder, if there is one; write nothing.

    Return the recipe with the precision that the run started with, and the environment that it started in.
    If the number of processes and the kind of device are the same, set torch's number of threads to that of
    the run, because the order of sums depends on it.
    Raises: InvalidArgument if the recipe differs in a setting that a run can't change; CheckpointError.
    """
    path = run / RUN_FILE
    old_run = read_run_file(run) if path.exists() else None
    if old_run is not None:
        old_recipe = recipe_from_description(old_run)
        old_environment = old_run.training.get("surroundings", {})
        if recipe.precision == "auto" or old_recipe.precision == recipe.precision:
            recipe = replace(recipe, precision=old_recipe.precision)
        _check_changes(old_recipe, recipe, run, say)
        for name, value in environment.items():
            if name in old_environment and old_environment[name] != value and name != "threads":
                say(f"{name} differs: {value} now, {old_environment[name]} when the run began; it continues")
        threads = old_environment.get("threads")
        same_devices = all(old_environment.get(name) == environment[name] for name in ("processes", "device"))
        if same_devices and isinstance(threads, int) and threads != environment["threads"]:
            torch.set_num_threads(threads)
            say(f"threads: {threads}, as when the run began (not {environment['threads']})")
        environment = old_environment
    return recipe, environment


def write_run_file(run: Path, recipe: Recipe, environment: Mapping[str, Any]) -> None:
    """Write `run.json`: the network, the process, the recipe and the environment. Raises OutputError."""
    process = None if recipe.kind == "classifier" else recipe.process
    training = {"recipe": recipe.to_dict(), "surroundings": dict(environment)}
    description = Description(recipe.network, process, training)
    write_text(run / RUN_FILE, description.to_json())


def find_run_folder(run: str | PathLike[str]) -> Path:
    """Return the path of a run's folder. Raises InvalidArgument, which says what the path is."""
    path = user_path("run", run)
    if os.path.isfile(path / RUN_FILE):
        return path
    if os.path.isdir(path):
        found = f"this folder has no {RUN_FILE}"
    else:
        found = "this is a file" if os.path.exists(path) else f"nothing is there{missing_path_hint(path)}"
    raise invalid("run", str(path), f"{RUN_FOLDER_HINT}; {found}")


def read_run_file(run: Path) -> Description:
    """Return the description in `run.json`. Raises CheckpointError."""
    path = run / RUN_FILE
    try:
        return description_from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from None


def recipe_from_description(description: Description) -> Recipe:
    """Return the recipe that a run's description holds. Raises InvalidArgument."""
    values = description.training.get("recipe")
    if not isinstance(values, Mapping):
        raise invalid("run", "no recipe", "the folder of a run of `admfast train`")
    return recipe_from_dict(values)


def _check_changes(old_recipe: Recipe, new_recipe: Recipe, run: Path, say: Say) -> None:
    """Reject changes of a recipe that a run can't make; report those that it may make."""
    old_fields, new_fields = old_recipe.to_dict(), new_recipe.to_dict()
    changes = list[str]()
    for name in (name for name in old_fields if old_fields[name] != new_fields[name]):
        old, new = old_fields[name], new_fields[name]
        if isinstance(old, dict):
            changed_keys = [key for key in old if old[key] != new.get(key)] or [
                key for key in new if key not in old
            ]
            name, old, new = changed_keys[0], old.get(changed_keys[0]), new.get(changed_keys[0])
        if name not in MAY_CHANGE:
            raise invalid(name, new, f"{run} was begun with {old!r}; give another folder for another run")
        changes.append(f"{name} was {old}, is {new} now")
    for change in changes:
        say(change)


def load_newest_state(run: Path, world: World, say: Say) -> dict[str, Any] | None:
    """Return the state of the newest intact snapshot, the same for every process; None if there is none."""
    newest = read_newest_state(run, say) if world.is_first else None
    step = world.all_reduce_max(newest[0].step if newest is not None else -1)
    if step < 0:
        return None
    if newest is None:
        newest = read_newest_state(run, step=step)
    if newest is None:
        raise AdmfastError(f"{run}: process {world.rank} can't read step {step}: is the folder shared?")
    return newest[1]


def truncate_log(run: Path, step: int) -> None:
    """Remove incomplete rows, and the rows of steps after `step`, which will be made again, from the log."""
    if (run / LOG).exists():
        rows = [row for row in read_log(run) if row.get("step", 0) <= step]
        write_text(run / LOG, "".join(f"{json.dumps(row)}\n" for row in rows))


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of the log, without incomplete ones. Raises CheckpointError."""
    rows = []
    try:
        lines = (run / LOG).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run / LOG}: not readable: {first_line(error)}") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def append_log(run: Path, row: Mapping[str, float | int]) -> None:
    """Add a row to the log. Raises OutputError."""
    path = run / LOG
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise output_error(path, error) from error
