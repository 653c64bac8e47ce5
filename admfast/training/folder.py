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
from admfast.errors import AdmfastError, CheckpointError, OutputError, first_line, invalid
from admfast.files.atomic import close_on_windows, folder_removed_if_empty, lock, output_error, write_text
from admfast.files.paths import user_path
from admfast.models.description import Description, description_from_json
from admfast.training.distributed import World
from admfast.training.images import Source
from admfast.training.recipe import Recipe, recipe_from_dict

LOG, LOCK, GRIDS = "log.jsonl", ".lock", "grids"
# Settings that may differ when a run continues: none of them changes the samples and draws of later steps.
MAY_CHANGE = ("steps", "microbatch", "checkpointing", "max_skipped")

Say = Callable[[str], None]


@contextlib.contextmanager
def held(run: Path, world: World) -> Iterator[None]:
    """Make the folder of a run, and lock it for the block; only the first process does this.

    If the block fails before a new run has a snapshot or a row of its log, its `run.json` is removed: another
    recipe may then use the folder. Without a `run.json`, a folder and lock that the block made are removed.
    Raises: OutputError if the folder can't be written, or another process is training in it.
    """
    if not world.first:
        yield
        return
    with folder_removed_if_empty(run), _locked(run):
        remove_leftovers(run)
        is_new = not os.path.lexists(run / RUN_FILE)
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


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the lock of a folder within the block. Raises OutputError."""
    path = run / LOCK
    made = not os.path.lexists(path)
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise output_error(path, error) from None
    with file:
        try:
            try:
                lock(file.fileno())
                # The process that made it may have removed it since: a removed file locks no one out.
                used = os.fstat(file.fileno()).st_nlink == 0
            except BlockingIOError:
                used = True
            except OSError as error:
                raise output_error(path, error) from None
            if used:
                made = False
                raise OutputError(f"out={str(run)!r}: another process is training in this folder")
            yield
        finally:
            close_on_windows(file)
            if made and not os.path.lexists(run / RUN_FILE):
                with contextlib.suppress(OSError):  # on Windows another process may have opened it
                    path.unlink()


def surroundings(world: World, source: Source) -> dict[str, Any]:
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


def agreed(
    run: Path, recipe: Recipe, found: Mapping[str, Any], world: World, say: Say
) -> tuple[Recipe, Mapping[str, Any]]:
    """Check that a recipe agrees with the run in the folder, if there is one; write nothing.

    Return the recipe with the precision that the run started with, and the surroundings that it started in.
    If the number of processes and the kind of device are the same, set torch's number of threads to that of
    the run, because the order of sums depends on it.
    Raises: InvalidArgument if the recipe differs in a setting that a run can't change; CheckpointError.
    """
    path = run / RUN_FILE
    old = read_run_file(run) if path.exists() else None
    if old is not None:
        before, facts = recipe_of(old), old.training.get("surroundings", {})
        if recipe.precision == "auto" or before.precision == recipe.precision:
            recipe = replace(recipe, precision=before.precision)
        _compare(before, recipe, run, say)
        for name, value in found.items():
            if name in facts and facts[name] != value and name != "threads":
                say(f"{name} differs: {value} now, {facts[name]} when the run began; it continues")
        same = all(facts.get(name) == found[name] for name in ("processes", "device"))
        if same and isinstance(threads := facts.get("threads"), int) and threads != found["threads"]:
            torch.set_num_threads(threads)
            say(f"threads: {threads}, as when the run began (not {found['threads']})")
        found = facts
    return recipe, found


def write_run_file(run: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write `run.json`: the network, the process, the recipe and the surroundings. Raises OutputError."""
    process = None if recipe.kind == "classifier" else recipe.process
    text = Description(recipe.network, process, {"recipe": recipe.to_dict(), "surroundings": dict(facts)})
    write_text(run / RUN_FILE, text.to_json())


def run_folder(run: str | PathLike[str]) -> Path:
    """Return the path of a run's folder. Raises InvalidArgument, which says what is there instead."""
    place = user_path("run", run)
    if os.path.isfile(place / RUN_FILE):
        return place
    if os.path.isdir(place):
        found = f"this folder has no {RUN_FILE}"
    else:
        found = "this is a file" if os.path.exists(place) else f"nothing is there{missing_path_hint(place)}"
    raise invalid("run", str(place), f"{RUN_FOLDER_HINT}; {found}")


def read_run_file(run: Path) -> Description:
    """Return the description in `run.json`. Raises CheckpointError."""
    path = run / RUN_FILE
    try:
        return description_from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from None


def recipe_of(description: Description) -> Recipe:
    """Return the recipe that a run's description holds. Raises InvalidArgument."""
    values = description.training.get("recipe")
    if not isinstance(values, Mapping):
        raise invalid("run", "no recipe", "the folder of a run of `admfast train`")
    return recipe_from_dict(values)


def _compare(before: Recipe, now: Recipe, run: Path, say: Say) -> None:
    """Reject changes of a recipe that a run can't make; report those that it may make."""
    a, b = before.to_dict(), now.to_dict()
    changes = list[str]()
    for name in (name for name in a if a[name] != b[name]):
        old, new = a[name], b[name]
        if isinstance(old, dict):
            inner = [key for key in old if old[key] != new.get(key)] or [key for key in new if key not in old]
            name, old, new = inner[0], old.get(inner[0]), new.get(inner[0])
        if name not in MAY_CHANGE:
            raise invalid(name, new, f"{run} was begun with {old!r}; give another folder for another run")
        changes.append(f"{name} was {old}, is {new} now")
    for change in changes:
        say(change)


def resume(run: Path, world: World, say: Say) -> dict[str, Any] | None:
    """Return the state of the newest intact snapshot, the same for every process; None if there is none."""
    found = read_newest_state(run, say) if world.first else None
    step = world.most(found[0].step if found is not None else -1)
    if step < 0:
        return None
    if found is None:
        found = read_newest_state(run, step=step)
    if found is None:
        raise AdmfastError(f"{run}: process {world.rank} can't read step {step}: is the folder shared?")
    return found[1]


def cut_log(run: Path, step: int) -> None:
    """Remove incomplete rows, and the rows of steps after `step`, which will be made again, from the log."""
    if (run / LOG).exists():
        kept = [row for row in read_log(run) if row.get("step", 0) <= step]
        write_text(run / LOG, "".join(f"{json.dumps(row)}\n" for row in kept))


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
