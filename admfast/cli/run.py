"""`admfast run status|merge|export RUN`: look at a run of many images, and collect its images.

These commands don't import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from admfast.errors import allowed_names, invalid
from admfast.files.paths import user_path
from admfast.files.tables import table
from admfast.host import peak_memory
from admfast.runs.collect import EXPORTS, FinishedRun, merge
from admfast.runs.status import RunStatus, run_status

commands = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True
)

Run = Annotated[Path, typer.Argument(help="Folder of `admfast sample`.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files (default: refuse).")]


@commands.callback()
def run_run() -> None:
    """Look at a run of many images, or collect its images: status, merge, export."""


@commands.command("status")
def run_status_command(run: Run) -> None:
    """Print how far a run is, who works on it, and how long it will take."""
    folder = user_path("run", run)
    status = run_status(folder)
    print(table([("run", str(folder.resolve())), *_status_rows(status)]))
    if status.workers:
        rows = [
            (worker.shard, worker.host, str(worker.pid), str(worker.images), f"{worker.rate:.2f}",
             "works" if worker.alive else "no sign of life")
            for worker in status.workers
        ]  # fmt: skip
        print("\n" + table(rows, header=("shard", "host", "process", "images", "images/s", "state")))


def _status_rows(status: RunStatus) -> list[tuple[str, str]]:
    """Return the status as rows of (name, value)."""
    manifest, left = status.manifest, status.seconds_left
    unfinished = manifest.shards - status.finished_shards - status.open_shards
    working = sum(worker.alive for worker in status.workers)
    percent = 100 * status.finished_images / manifest.images
    rows = [
        ("model", f"{manifest.model}, {manifest.precision}"),
        ("images", f"{status.finished_images} of {manifest.images} ({percent:.1f} %)"),
    ]
    if manifest.files == "png":  # its process has no lease, which would tell that it works
        return rows
    return [
        *rows,
        ("shards", f"{status.finished_shards} done, {status.open_shards} open, {unfinished} left"),
        ("processes", f"{working} at work"),
        ("rate", f"{status.rate:.2f} images/s" if status.rate else "unknown"),
        ("time left", "unknown" if left is None else _duration(left)),
    ]


def _duration(seconds: float) -> str:
    """Return a duration as "2 h 05 min", "3 min 20 s" or "12 s"."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes else f"{round(seconds)} s"


@commands.command("merge")
def run_merge_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="The npz file, in the format of the published scripts.")],
    overwrite: Overwrite = False,
) -> None:
    """Write all images of a finished run into one npz."""
    target = user_path("out", out, [".npz"])
    with _opened(run) as finished:
        merge(finished, target, overwrite)
    _print_result(finished, target)


@commands.command("export")
def run_export_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    to: Annotated[
        str, typer.Option(help="png: a file for each image; webdataset: a tar file for each shard.")
    ] = "png",
    overwrite: Overwrite = False,
) -> None:
    """Write the images of a finished run as PNG files or as tar files."""
    if to not in EXPORTS:
        raise invalid("to", to, allowed_names(to, EXPORTS))
    target = user_path("out", out)
    with _opened(run) as finished:
        EXPORTS[to](finished, target, overwrite)
    _print_result(finished, target)


@contextmanager
def _opened(run: Path) -> Iterator[FinishedRun]:
    """Open a finished run for a block, with a progress bar that is shown once images are read."""
    with tqdm(unit="image", delay=1, leave=False) as bar:
        finished = FinishedRun(user_path("run", run), bar.update)
        bar.total = finished.manifest.images
        yield finished


def _print_result(finished: FinishedRun, target: Path) -> None:
    print(f"{finished.manifest.images} images; peak memory {peak_memory() / 1e6:.0f} MB")
    print(target.resolve())
