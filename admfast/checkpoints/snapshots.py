"""Read and write the files of a training run: `run.json` and the snapshots of its state.

    RUN/run.json                      description of the network, with the run's recipe and surroundings
    RUN/snapshots/state-00001000.pt   state after 1000 steps (torch.save)
    RUN/snapshots/state-00001000.pt.sha256
    RUN/averages/average-00001000.pt  power-function averages, from which those of other widths are made

A snapshot is valid once its checksum exists, which is written last. If a snapshot is damaged, a message names
it, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from admfast.errors import CheckpointError, InvalidArgument, first_line, invalid
from admfast.files.atomic import atomic_open, output_error, write_text
from admfast.models.description import Description, description_from_json

RUN_FILE, SNAPSHOTS_FOLDER, AVERAGES_FOLDER = "run.json", "snapshots", "averages"
_NAME = re.compile(r"(?:state|average)-(\d{8,})\.pt")
_LOAD_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Snapshot:
    """State of a run on disk: the number of steps made, and the file."""

    step: int
    path: Path

    @property
    def checksum(self) -> Path:
        """Path of the file with its checksum, in the format of `sha256sum -c`."""
        return self.path.with_name(f"{self.path.name}.sha256")

    def read(self) -> dict[str, Any]:
        """Return the state, on the CPU. Raises CheckpointError if the file is damaged or unreadable."""
        try:
            expected = self.checksum.read_text(encoding="utf-8").split()[0]
            with open(self.path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected:
                raise CheckpointError(f"{self.path}: damaged: its SHA-256 is not the recorded one")
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except (*_LOAD_ERRORS, IndexError) as error:
            raise CheckpointError(f"{self.path}: not readable: {first_line(error)}") from error


def write_snapshot(
    run: Path, step: int, state: dict[str, Any], keep: int | None, folder: str = SNAPSHOTS_FOLDER
) -> Snapshot:
    """Write the state after `step` steps atomically, then remove all snapshots but the newest `keep`.

    keep: None removes none. folder: subfolder of the run. Raises OutputError; the older snapshots are kept.
    """
    directory = run / folder
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(directory, error) from None
    kind = "state" if folder == SNAPSHOTS_FOLDER else "average"
    snapshot = Snapshot(step, directory / f"{kind}-{step:08d}.pt")
    with atomic_open(snapshot.path) as file:
        hashed = _HashingFile(file)
        torch.save(state, hashed)  # type: ignore[arg-type]
    write_text(snapshot.checksum, f"{hashed.digest.hexdigest()}  {snapshot.path.name}\n")
    for old in list_snapshots(run, folder)[keep:] if keep is not None else ():
        for path in (old.checksum, old.path):
            path.unlink(missing_ok=True)
    return snapshot


class SnapshotWriter:
    """Writer of the snapshots of a run, one at a time. As a context manager it waits at its end for the last.

    run: folder of the run. keep: see `write_snapshot`. saved: initial value of the attribute.
    in_thread: copy the state into host memory, and write the copy in a thread while the caller continues.
    Otherwise `write` returns when the snapshot is written.

    Attributes:
        saved: step of the newest snapshot that is known to be written.
    """

    def __init__(self, run: Path, keep: int, saved: int, in_thread: bool) -> None:
        self.saved = saved
        self._run, self._keep = run, keep
        self._pool = ThreadPoolExecutor(1) if in_thread else None
        self._pending: Future[int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def write(self, step: int, state: dict[str, Any], averages: dict[str, Any]) -> None:
        """Write the state after `step` steps, and the power-function averages if there are any.

        Raises OutputError, also if a thread could not write the snapshot before this one.
        """
        self.finish()
        if self._pool is None:
            self.saved = self._write(step, state, averages)
            return
        state, averages = tree_map_only(Tensor, lambda t: t.to("cpu", copy=True), (state, averages))
        self._pending = self._pool.submit(self._write, step, state, averages)

    def check(self) -> None:
        """Update `saved` if the thread has finished; don't wait. Raises OutputError if the thread failed."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the snapshot that is being written. Raises OutputError if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.saved = pending.result()

    def _write(self, step: int, state: dict[str, Any], averages: dict[str, Any]) -> int:
        write_snapshot(self._run, step, state, self._keep, SNAPSHOTS_FOLDER)
        if averages:
            write_snapshot(self._run, step, averages, None, AVERAGES_FOLDER)
        return step


class _HashingFile:
    """Write-only file that hashes what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def list_snapshots(run: Path, folder: str = SNAPSHOTS_FOLDER) -> list[Snapshot]:
    """Return the finished snapshots of a run, newest first."""
    directory = run / folder
    if not directory.is_dir():
        return []
    finished = [
        Snapshot(int(m[1]), path) for path in directory.iterdir() if (m := _NAME.fullmatch(path.name))
    ]
    return sorted((s for s in finished if s.checksum.is_file()), key=lambda s: s.step, reverse=True)


def read_newest_state(
    run: Path, say: Callable[[str], None] = lambda text: None, step: int | None = None
) -> tuple[Snapshot, dict[str, Any]] | None:
    """Return the newest intact snapshot and its state; None if there are no snapshots.

    say: called with a message for each damaged snapshot. step: consider only the snapshot of this step.
    Raises CheckpointError if there are snapshots, but none is intact.
    """
    finished = [s for s in list_snapshots(run) if step is None or s.step == step]
    for snapshot in finished:
        try:
            return snapshot, snapshot.read()
        except CheckpointError as error:
            say(f"{error}; the snapshot before it is used")
            last = error
    if finished:
        raise CheckpointError(f"{run / SNAPSHOTS_FOLDER}: no snapshot is whole; the oldest: {last}")
    return None


def remove_leftovers(run: Path) -> None:
    """Remove the leftovers of killed processes: temporary files, and states without a checksum.

    Call it only in the process that holds the lock of the run's folder.
    """
    for folder in (SNAPSHOTS_FOLDER, AVERAGES_FOLDER):
        finished = {s.path.name for s in list_snapshots(run, folder)}
        for path in (run / folder).glob("*") if (run / folder).is_dir() else ():
            temporary = path.name.startswith((".state-", ".average-")) and path.suffix == ".tmp"
            if temporary or (_NAME.fullmatch(path.name) and path.name not in finished):
                with contextlib.suppress(OSError):
                    path.unlink()


def is_run_folder(path: str | PathLike[str]) -> bool:
    """Tell whether a path is the folder of a training run."""
    return (Path(path) / RUN_FILE).is_file()


def read_run_average(
    path: str | PathLike[str], average: str | None = None, argument: str = "ema"
) -> tuple[dict[str, Tensor], Description]:
    """Return an average of a run's newest intact snapshot as a state dict, and the network's description.

    average: its name ("0.9999"); None takes the first. argument: the name of `average` in errors.
    Raises CheckpointError, InvalidArgument.
    """
    run = Path(path)
    try:
        text = (run / RUN_FILE).read_text(encoding="utf-8")
        description = description_from_json(text, str(run / RUN_FILE))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run / RUN_FILE}: not readable: {first_line(error)}") from error
    except InvalidArgument as error:
        raise CheckpointError(str(error)) from None
    newest = read_newest_state(run)
    if newest is None:
        raise CheckpointError(f"{run}: a training run that has saved no snapshot yet")
    snapshot, state = newest
    averages = state["averages"]
    name = next(iter(averages)) if average is None else average
    if name not in averages:
        raise invalid(argument, name, f"one of the run's averages: {', '.join(averages)}")
    training = {**description.training, "step": snapshot.step, "average": name}
    # Names in the order of the network's state dict, with its buffers.
    tensors = {key: averages[name].get(key, value) for key, value in state["net"].items()}
    return tensors, Description(description.network, description.diffusion, training)
