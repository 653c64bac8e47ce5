"""torch.compile around a prepared step, and its artefacts on disk so that a second process starts warm."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from admfast.errors import AdmfastError, InvalidArgument, OutputError
from admfast.files.atomic import atomic_open, check_writable, lock

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")
INDEX = "index.json"
Keys = set[tuple[str, str]]
# What torch gave this process, save by save, with the keys that were new in each: of what it gives at a later
# save, which names all, only what is new since the one before survives being loaded (torch 2.13).
_SAVES: list[tuple[bytes, Keys]] = []
# What zipfile and json raise for bytes that no archive of ours has.
_NO_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
    KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError,
)  # fmt: skip


def compile_step(step: PreparedStep, cache: str | PathLike[str] | None = None) -> None:
    """Compile the bodies of a step as one graph each; they are compiled when they first run, here.

    The step must not be filled yet. Our own ops stay as they are; the gradient is traced with the networks.
    cache: a file of artefacts: what it holds is not compiled again, what it lacks is added to it.

    Raises: OutputError before anything is compiled, where the file could not be written.
    """
    device = step.state.x.device
    if cache is not None:
        check_writable(cache)
        if Path(cache).exists():
            load_artefacts(cache)
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    for guided, body in list(step.run.items()):
        began = time.monotonic()
        # What layers derive at their first call is there before they are traced.
        step.counters.zero_()
        with torch.no_grad():
            body()
        LOG.warning("compiling the %s step of %s ...", "guided" if guided else "plain", step.key.shape)
        step.run[guided] = _traced(torch.compile(body, fullgraph=True, mode=mode))
        step.counters.zero_()
        with torch.no_grad():
            step.run[guided]()
        LOG.warning("compiled in %.0f s", time.monotonic() - began)
    if cache is not None:
        try:
            save_artefacts(cache)
        except OutputError as error:  # what was compiled serves this process all the same
            LOG.warning("compile_cache: %s", error)


def _traced(body: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(body)
    def run() -> None:
        # The guidance gradient is taken inside; without this torch.autograd.grad breaks the graph.
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # type: ignore[attr-defined]
            body()

    return run


@dataclass
class _Kept:
    """What a file holds: what processes saved, by digest, and the (kind, key) of the artefacts in each."""

    saved: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, Keys] = field(default_factory=dict)

    def add(self, data: bytes, keys: Keys) -> bool:
        """Take in what a process has; False where all of it is here. What it covers entirely is dropped."""
        if keys <= set().union(*self.keys.values()):
            return False
        for digest in [digest for digest, held in self.keys.items() if held <= keys]:
            del self.saved[digest], self.keys[digest]
        digest = hashlib.sha256(data).hexdigest()
        self.saved[digest], self.keys[digest] = data, keys
        return True


class _Unreadable(AdmfastError):
    """A file of artefacts that is of no use here; the message says why."""


def save_artefacts(path: str | PathLike[str]) -> int:
    """Add what this process compiled to a file for `load_artefacts`; returns the bytes added, 0 for nothing.

    What other processes have added stays. A file that can't be read is replaced. The artefacts serve the
    same torch, Triton and GPU. Raises: OutputError.
    """
    artefacts = torch.compiler.save_cache_artifacts()
    if artefacts is None:
        return 0
    data, info = artefacts
    keys = {(kind, key) for kind, names in info.artifacts.items() for key in names}
    if keys := keys - set().union(*(held for _, held in _SAVES)):
        _SAVES.append((data, keys))
    with _alone(Path(path).parent):
        try:
            kept = _read(Path(path)) if Path(path).is_file() else _Kept()
        except _Unreadable:
            kept = _Kept()
        added = [len(data) for data, keys in _SAVES if kept.add(data, keys)]
        if added:
            _write(Path(path), kept)
    return sum(added)


def load_artefacts(path: str | PathLike[str]) -> bool:
    """Take what other processes compiled; only from files that you trust, as they hold code.

    Returns whether it could be used: a damaged file, or one of another torch, is passed over with a warning.

    Raises: InvalidArgument for a file that isn't there.
    """
    if not Path(path).is_file():
        raise InvalidArgument(f"path={str(path)!r}: no such file")
    try:
        kept = _read(Path(path))
        for data in kept.saved.values():
            if _quietly(torch.compiler.load_cache_artifacts, data) is None:
                raise _Unreadable("torch can't read it")
    except _Unreadable as error:
        LOG.warning("compile_cache: %s is not used: %s; it will be written anew", path, error)
        return False
    return True


def _read(path: Path) -> _Kept:
    """What a file holds. Raises _Unreadable."""
    kept = _Kept()
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read(INDEX))
            if index["torch"] != torch.__version__:
                raise _Unreadable(f"it is of torch {index['torch']}, this is {torch.__version__}")
            for digest, keys in index["keys"].items():
                kept.saved[digest] = archive.read(digest)
                kept.keys[digest] = {(kind, key) for kind, key in keys}
    except _NO_ARCHIVE as error:
        raise _Unreadable("it is damaged, or not a file of compiled steps") from error
    except OSError as error:
        raise _Unreadable(error.strerror or str(error)) from error
    return kept


def _write(path: Path, kept: _Kept) -> None:
    """A zip: its checksums tell a damaged file before torch gets to unpickle it."""
    index = {
        "torch": torch.__version__,
        "keys": {digest: sorted(keys) for digest, keys in kept.keys.items()},
    }
    with atomic_open(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(INDEX, json.dumps(index))
        for digest, data in kept.saved.items():
            archive.writestr(digest, data)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from adding to a file of this folder between our reading and writing it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # the write that follows says what is wrong with the folder
        yield
        return
    try:
        # Some network file systems have no locks: two that save at once may then lose one's addition.
        with contextlib.suppress(OSError):
            lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _quietly(load: Callable[[bytes], object], data: bytes) -> object:
    """Load without torch's own log of what it can't read, a traceback."""
    log = logging.getLogger("torch.compiler._cache")
    before, log.disabled = log.disabled, True
    try:
        return load(data)
    finally:
        log.disabled = before
