"""Leases: each shard of a run is worked on by one process, and by another if that one dies.

A lease is a file NAME.GENERATION that its process creates exclusively and rewrites every few seconds, with a
higher count each time. Whoever sees the same count for `LIFETIME` seconds of its own monotonic clock takes
the lease over, by the exclusive creation of the next generation, in which only one process succeeds. So the
clocks of the machines needn't agree, and no file lock is needed. On one machine a death is seen at once: the
process also locks its file, and the system releases that lock.

A lease saves work and is not needed for correctness: if two processes work on one shard (one was suspended
for longer than a lifetime), they write the same files. This module doesn't import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from admfast.files.atomic import make_folder, output_error
from admfast.files.locks import close_on_windows, lock

HEARTBEAT, LIFETIME = 5.0, 60.0  # seconds
_NAME = re.compile(r"(?P<name>.+)\.(?P<generation>\d+)")
_PATIENCE = 5.0  # seconds that a release waits for a rewriting, which can hang where a server is gone
_LENGTH = 512  # bytes of a lease file: each rewriting replaces all of it
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """Return a name for the running system: it differs between machines, and on Linux after a restart."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return platform.node()


@dataclass(frozen=True)
class Sighting:
    """Content of a lease file as one process saw it, and since when it is unchanged."""

    content: bytes
    since: float


class Lease:
    """A lease that this process holds. A daemon thread rewrites its file until `release`.

    report: returns what the file also says: a dict for JSON.
    """

    def __init__(self, path: Path, file: BinaryIO, heartbeat: float, report: Callable[[], dict[str, Any]]):
        self.path = path
        self._file, self._report, self._count = file, report, 0
        try:
            lock(file.fileno())
            self._locked = True
        except OSError:  # this file system can't lock: only the heartbeat counts
            self._locked = False
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat,), daemon=True)
        self._thread.start()

    def _write(self) -> None:
        """Rewrite the file with the next count."""
        self._count += 1
        content = {"machine": machine_id(), "host": platform.node(), "pid": os.getpid()}
        content |= {"locked": self._locked, "count": self._count, **self._report()}
        self._file.seek(0)
        self._file.write(json.dumps(content).encode().ljust(_LENGTH))
        os.fsync(self._file.fileno())

    def _beat(self, heartbeat: float) -> None:
        while not self._stop.wait(heartbeat):
            # A full disk or a read-only folder is reported by the work itself.
            with contextlib.suppress(OSError, ValueError):
                self._write()

    def is_lost(self) -> bool:
        """Tell whether another process took the lease over, or finished the work and removed it."""
        name, generation = _split(self.path)
        return newest_generation(self.path.parent, name) != generation

    def release(self) -> None:
        """Stop the heartbeat, and remove the file and those of earlier generations."""
        self._stop.set()
        self._thread.join(_PATIENCE)
        name, own = _split(self.path)
        close_on_windows(self._file)
        # The newest file goes last, so that no older one is ever taken for the newest.
        for path in _generations(self.path.parent, name):
            if _split(path)[1] <= own:
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            self._file.close()


class Leases:
    """The leases in a folder, as one process sees and takes them.

    heartbeat: seconds between two rewritings of a file. lifetime: seconds without a change after which a
    lease is taken over. clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        heartbeat: float = HEARTBEAT,
        lifetime: float = LIFETIME,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._heartbeat, self._lifetime, self._clock = heartbeat, lifetime, clock
        self._sightings: dict[Path, Sighting] = {}

    def acquire(self, name: str, report: Callable[[], dict[str, Any]] = dict) -> Lease | None:
        """Take the lease of this name; None if another process holds it. Raises OutputError."""
        newest = newest_generation(self.folder, name)
        if newest is not None and not self.is_abandoned(self.folder / f"{name}.{newest}"):
            return None
        make_folder(self.folder)
        path = self.folder / f"{name}.{0 if newest is None else newest + 1}"
        try:
            file = open(path, "xb", buffering=0)  # noqa: SIM115
            return Lease(path, file, self._heartbeat, report)  # type: ignore[arg-type]
        except (FileExistsError, FileNotFoundError):
            # Another process took it, or has just finished the last shard and removed the folder.
            return None
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise output_error(path, error) from None

    def is_abandoned(self, path: Path) -> bool:
        """Tell whether the process that made a lease file is dead, as far as this process can see."""
        try:
            content = path.read_bytes()
        except OSError:
            return False  # it was released just now; the next call finds out
        held = is_held_here(path, content)
        if held is not None:
            return not held
        sighting, now = self._sightings.get(path), self._clock()
        if sighting is None or sighting.content != content:
            self._sightings[path] = Sighting(content, now)
            return False
        return now - sighting.since >= self._lifetime


def is_held_here(path: Path, content: bytes) -> bool | None:
    """Tell whether a process of this machine holds a lease file; None if only its heartbeat can tell."""
    record = parse_lease(content)
    if record.get("machine") != machine_id() or not record.get("locked"):
        return None
    try:
        with open(path, "rb+") as file:
            lock(file.fileno())
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def parse_lease(content: bytes) -> dict[str, Any]:
    """Return the record in a lease file; empty while the file is being written."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def newest_generation(folder: Path, name: str) -> int | None:
    """Return the newest generation of a lease; None if nobody holds it."""
    generations = [_split(path)[1] for path in _generations(folder, name)]
    return max(generations, default=None)


def newest_leases(folder: Path) -> dict[str, Path]:
    """Return the file of the newest generation of every lease, by name."""
    newest: dict[str, Path] = {}
    for path in sorted(_lease_files(folder), key=lambda path: _split(path)[1]):
        newest[_split(path)[0]] = path
    return newest


def remove_leases(folder: Path, name: str) -> None:
    """Remove all files of a lease whose work is finished."""
    for path in _generations(folder, name):
        with contextlib.suppress(OSError):
            path.unlink()


def _lease_files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return []


def _generations(folder: Path, name: str) -> list[Path]:
    """Return the files of a lease, oldest generation first."""
    return sorted((path for path in _lease_files(folder) if _split(path)[0] == name), key=_generation)


def _generation(path: Path) -> int:
    return _split(path)[1]


def _split(path: Path) -> tuple[str, int]:
    """Return name and generation of a lease file."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match["name"], int(match["generation"])
