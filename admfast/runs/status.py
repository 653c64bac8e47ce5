"""Describe how far a run is, and who works on it. This module doesn't import torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from admfast.files.image_files import SAMPLE_NAME
from admfast.runs.leases import HEARTBEAT, is_held_here, newest_leases, parse_lease
from admfast.runs.manifest import Manifest, require_manifest
from admfast.runs.shards import LEASES, ShardFiles

WATCHED = 1.5 * HEARTBEAT  # seconds in which a process on another machine must have rewritten its lease


@dataclass(frozen=True)
class Worker:
    """A process that has a lease: its shard, host and number, the images it made, in how many seconds.

    alive: it was seen to work; False if it is dead, or has not rewritten its lease while it was watched.
    """

    shard: str
    host: str
    pid: int
    images: int
    seconds: float
    alive: bool

    @property
    def rate(self) -> float:
        """Images a second since the process began; 0 before its first batch."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class RunStatus:
    """Tell how far a run is, and which processes have a lease."""

    manifest: Manifest
    finished_images: int
    finished_shards: int
    open_shards: int
    workers: tuple[Worker, ...] = ()

    @property
    def rate(self) -> float:
        """Images a second of all processes that are alive."""
        return sum(worker.rate for worker in self.workers if worker.alive)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all images are finished at this rate; None if nobody works."""
        left = self.manifest.images - self.finished_images
        return left / self.rate if self.rate else (0.0 if not left else None)


def run_status(folder: Path, sleep: Callable[[float], None] = time.sleep) -> RunStatus:
    """Return the status of a run. It waits for `WATCHED` seconds if a process is on another machine.

    Raises InvalidArgument for a folder without a manifest.
    """
    manifest = require_manifest(folder)
    if manifest.files == "png":
        with contextlib.suppress(FileNotFoundError):
            count = sum(1 for path in (folder / "images").iterdir() if SAMPLE_NAME.fullmatch(path.name))
            return RunStatus(manifest, count, int(count == manifest.images), int(count < manifest.images))
    files = ShardFiles(folder, manifest)
    workers = _workers(folder / LEASES, sleep)
    begun = files.open_shards()
    finished = files.finished_shards()
    images = sum(len(manifest.shard_images(shard)) for shard in finished) + sum(begun.values())
    return RunStatus(manifest, images, len(finished), len(begun), tuple(workers))


def _workers(folder: Path, sleep: Callable[[float], None]) -> list[Worker]:
    """Return the processes that have a lease."""
    contents = {}
    for name, path in newest_leases(folder).items():
        with contextlib.suppress(OSError):
            contents[name] = (path, path.read_bytes())
    held = {name: is_held_here(path, content) for name, (path, content) in contents.items()}
    if None in held.values():
        sleep(WATCHED)
    workers = []
    for name, (path, content) in sorted(contents.items()):
        alive, now = held[name], content
        if alive is None:
            with contextlib.suppress(OSError):
                now = path.read_bytes()
            alive = now != content
        record = parse_lease(now)
        pid, images, seconds = (record.get(key, 0) for key in ("pid", "images", "seconds"))
        workers.append(Worker(name, str(record.get("host", "")), pid, images, seconds, alive))
    return workers
