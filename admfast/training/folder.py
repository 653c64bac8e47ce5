"""The folder of a run: who may write to it, what it says of the run, its log."""

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

from admfast.checkpoints.reading import A_RUN, near_names
from admfast.checkpoints.snapshots import RUN_FILE, newest_state, sweep
from admfast.errors import AdmfastError, CheckpointError, OutputError, first_line, invalid
from admfast.files.atomic import folder_if_used, let_go, lock, output_error, write_text
from admfast.files.paths import user_path
from admfast.models.description import Description, description_from_json
from admfast.training.distributed import World
from admfast.training.images import Source
from admfast.training.recipe import Recipe, recipe_from_dict

LOG, LOCK, GRIDS = "log.jsonl", ".lock", "grids"
# What a run may change when it goes on: none of it changes the samples and draws of the steps to come.
MAY_CHANGE = ("steps", "microbatch", "checkpointing", "max_skipped")

Say = Callable[[str], None]


@contextlib.contextmanager
def held(run: Path, world: World) -> Iterator[None]:
    """Make the folder and keep other runs from it within the block.

    A block that ends without a `run.json` has begun no run: it leaves no folder and no lock that it made.
    Raises: OutputError where it can't be written, or another process trains there.
    """
    if not world.first:
        yield
        return
    with folder_if_used(run), _locked(run):
        sweep(run)
        yield


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
                # A process that was refused may have removed it since: it would keep nobody out.
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
            let_go(file)
            if made and not os.path.lexists(run / RUN_FILE):
                with contextlib.suppress(OSError):  # on Windows another process may have opened it
                    path.unlink()


def surroundings(world: World, source: Source) -> dict[str, Any]:
    """Return what a run depends on beside its recipe."""
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
    """Check that this is the run that was begun in the folder, if one was; writes nothing.

    Returns the recipe with the precision that the run began with, and what it was begun on. The number of
    torch's threads, which orders its sums, is set to the run's where as many processes go on on the same kind
    of device.
    Raises: InvalidArgument for a recipe that differs in what a run can't change; CheckpointError.
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
                say(f"{name} differs: {value} now, {facts[name]} when the run began; it goes on")
        same = all(facts.get(name) == found[name] for name in ("processes", "device"))
        if same and isinstance(threads := facts.get("threads"), int) and threads != found["threads"]:
            torch.set_num_threads(threads)
            say(f"threads: {threads}, as when the run began (not {found['threads']})")
        found = facts
    return recipe, found


def write_run_file(run: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write what the run is and what it was begun on. Raises OutputError."""
    process = None if recipe.kind == "classifier" else recipe.process
    text = Description(recipe.network, process, {"recipe": recipe.to_dict(), "surroundings": dict(facts)})
    write_text(run / RUN_FILE, text.to_json())


def run_folder(run: str | PathLike[str]) -> Path:
    """Return the path of a run's folder. Raises InvalidArgument, which says what lies there instead."""
    place = user_path("run", run)
    if os.path.isfile(place / RUN_FILE):
        return place
    if os.path.isdir(place):
        found = f"this folder has no {RUN_FILE}"
    else:
        found = "this is a file" if os.path.exists(place) else f"nothing is there{near_names(place)}"
    raise invalid("run", str(place), f"{A_RUN}; {found}")


def read_run_file(run: Path) -> Description:
    """Return what `run.json` says. Raises CheckpointError."""
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
    """Refuse another run's recipe, then say what has changed of the settings that a run may change."""
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
    """Return the state of the newest whole snapshot, the same for every process; None where there is none."""
    found = newest_state(run, say) if world.first else None
    step = world.most(found[0].step if found is not None else -1)
    if step < 0:
        return None
    if found is None:
        found = newest_state(run, step=step)
    if found is None:
        raise AdmfastError(f"{run}: process {world.rank} doesn't see step {step}: is the folder shared?")
    return found[1]


def cut_log(run: Path, step: int) -> None:
    """Remove the rows of steps after `step`, which will come again, and one that was not finished."""
    if (run / LOG).exists():
        kept = [row for row in read_log(run) if row.get("step", 0) <= step]
        write_text(run / LOG, "".join(f"{json.dumps(row)}\n" for row in kept))


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of the log, without what was not finished. Raises CheckpointError."""
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
