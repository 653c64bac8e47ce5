"""Read weights from a file or from memory into a state dict on the CPU, without running code of the file."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from admfast.checkpoints.choosing import Chosen, choose
from admfast.checkpoints.containers import open_container, read_tensors
from admfast.checkpoints.snapshots import RUN_FILE, is_run, read_run
from admfast.errors import CheckpointError, InvalidArgument, invalid
from admfast.files.paths import user_path
from admfast.models import NetConfig
from admfast.models.description import Description, description_from_json, is_foreign

METADATA_KEY = "admfast"  # key of the description's copy in a safetensors header
ENDINGS = (".pt", ".pth", ".safetensors")
A_RUN = f"the folder of a training run (`admfast train --out FOLDER` makes it; it holds {RUN_FILE})"

# 1x1 projections. Related networks store them as 2-D convolutions or as linear layers.
_PROJECTION = re.compile(r"(.*\.)?(qkv|proj_out|qkv_proj|c_proj)\.weight")

Source = str | PathLike[str] | Mapping[str, Any] | nn.Module | BinaryIO


@dataclass(frozen=True)
class Weights:
    """State dict of a network, in the order of the file, and the description that came with it, if any.

    path: the file, or a word for weights in memory. entry: name of the state dict in the file, "" for the top
    level. notes: lines about contents that were left out. ours: whether no one else holds these tensors.
    """

    path: Path
    tensors: dict[str, Tensor]
    description: Description | None
    entry: str = ""
    notes: tuple[str, ...] = ()
    ours: bool = True


def read_weights(
    source: Source, *, checksums: bool = True, values: bool = True, entry: str | None = None
) -> Weights:
    """Read a network's weights and their description.

    A file may hold more than a state dict. The state dict of the network is chosen from it; the average of
    the weights over training is preferred to the current weights. Prefixes of the keys are removed, and 1x1
    projections get the published shape. The description is that of the `.json` next to the file, or else the
    copy in a safetensors header.

    Args:
        source: a path with any ending (.pt, .pth, .safetensors, ...); the folder of a training run, of which
            the first average in the newest intact snapshot is read; a file open for reading bytes; a state
            dict or a module, whose tensors are not copied.
        checksums: verify the CRC-32 of everything that is read from a zip-format .pt. False is for files that
            were saved without checksums (torch's `set_crc32_options`).
        values: False verifies checksums, but returns tensors on the meta device, which have no memory.
        entry: name of the state dict to read, such as "ema" or "model", if a file holds several.

    Raises:
        InvalidArgument: for a URL, or a source that is neither a path nor weights.
        CheckpointError: in one line, for a file that is missing, empty, truncated or damaged, that would run
            code when unpickled (the message names the function), or that holds no state dict or several
            different ones.
    """
    if isinstance(source, str | PathLike):
        return _read_file(user_path("weights", source), checksums, values, entry)
    if isinstance(source, nn.Module | Mapping):
        path, config = Path("state_dict"), None
        if isinstance(source, nn.Module):
            path, config = Path(type(source).__name__), getattr(source, "config", None)
            source = source.state_dict()
        with _said_of(path):
            chosen = choose(source, entry)
        tensors = {key: value.detach() for key, value in chosen.tensors.items()}
        carried = Description(config) if isinstance(config, NetConfig) else None
        return _weights(path, tensors, carried, chosen, (), ours=False)
    if getattr(source, "closed", False):
        raise invalid("weights", source, "an open file; this one is closed")
    if not (hasattr(source, "read") and hasattr(source, "seek") and isinstance(source.read(0), bytes)):
        raise invalid("weights", source, "a path, a file open for reading bytes, a state dict or a module")
    name = getattr(source, "name", None)
    path = Path(name if isinstance(name, str) else type(source).__name__)
    return _read_open(path, source, checksums, values, entry)


def _read_file(path: Path, checksums: bool, values: bool, entry: str | None) -> Weights:
    try:
        run = is_run(path)
    except OSError as error:
        raise invalid("weights", str(path), f"a path that the system accepts ({error.strerror})") from None
    if run:
        return Weights(path, *read_run(path))
    _check_there(path)
    with open(path, "rb") as file:
        return _read_open(path, file, checksums, values, entry, beside=path.with_suffix(".json"))


def _read_open(
    path: Path, file: BinaryIO, checksums: bool, values: bool, entry: str | None, beside: Path | None = None
) -> Weights:
    """Read an open file. beside: path of the `.json` that may describe it."""
    with _said_of(path):
        container = open_container(file, checksums)
        chosen = choose(container.content, entry)
        tensors = read_tensors(container, chosen.tensors, values)
    description, notes = _description(path, beside, container.header.get(METADATA_KEY))
    return _weights(path, tensors, description, chosen, notes)


def _weights(
    path: Path,
    tensors: dict[str, Tensor],
    description: Description | None,
    chosen: Chosen,
    notes: tuple[str, ...],
    ours: bool = True,
) -> Weights:
    """Return weights as a record, with 1x1 projections in the published shape."""
    for key, value in tensors.items():
        if _PROJECTION.fullmatch(key) and value.dim() != 3 and all(side == 1 for side in value.shape[2:]):
            tensors[key] = value.reshape(*value.shape[:2], 1)
    said = (chosen.note,) if chosen.note else ()
    return Weights(path, tensors, description, chosen.entry, (*said, *notes), ours)


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Turn errors in the block into CheckpointErrors that begin with the path."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _check_there(path: Path) -> None:
    """Reject a path that isn't a readable file."""
    if path.is_dir():
        held = ", ".join(_held(path)[:8]) or "none"
        raise CheckpointError(f"{path}: a folder, not a weights file (holds {held}), and not {A_RUN}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to {os.readlink(path)}, which does not exist") from None
        raise CheckpointError(f"{path}: no such file{near_names(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def near_names(path: Path) -> str:
    """Return a hint for a missing path: `; nearest there: a, b`, `; FOLDER holds a, b`, ..."""
    folder = path.parent
    try:
        held = _held(folder)
    except FileNotFoundError:
        return f"; there is no folder {folder}"
    except OSError as error:
        return f"; {folder}: {error.strerror}"
    near = get_close_matches(path.name, held, n=3, cutoff=0.5)
    if near:
        return f"; nearest there: {', '.join(near)}"
    return f"; {folder} holds {', '.join(held[:8]) or 'no weights files and no training runs'}"


def _held(folder: Path) -> list[str]:
    """Return the names of the weights files and training runs in a folder."""
    names = sorted(os.listdir(folder))
    return [name for name in names if name.endswith(ENDINGS) or os.path.isfile(folder / name / RUN_FILE)]


def _description(
    path: Path, beside: Path | None, header: str | None
) -> tuple[Description | None, tuple[str, ...]]:
    """Return the description in the `.json` next to the file, else the header's, and notes on the `.json`."""
    notes: tuple[str, ...] = ()
    if beside is not None and beside.is_file():
        try:
            text = beside.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise CheckpointError(f"{beside}: not readable: {error}") from None
        if not is_foreign(text):
            return _described(text, str(beside)), ()
        notes = (f"ignored {beside.name}: not a description written by admfast",)
    if header is None:
        return None, notes
    return _described(header, f"{path} (header)"), notes


def _described(text: str, source: str) -> Description:
    try:
        return description_from_json(text, source)
    except InvalidArgument as error:
        raise CheckpointError(str(error)) from None
