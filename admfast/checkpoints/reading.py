"""Read weights to a state dict on the CPU, from a file, by its content, or from memory; nothing is run."""

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

METADATA_KEY = "admfast"  # of the copy of the description in a safetensors header
ENDINGS = (".pt", ".pth", ".safetensors")
A_RUN = f"the folder of a training run (`admfast train --out FOLDER` makes it; it holds {RUN_FILE})"

# Projections over positions; relatives of these networks keep them as 2-D convolutions or as linear layers.
_PROJECTION = re.compile(r"(.*\.)?(qkv|proj_out|qkv_proj|c_proj)\.weight")

Source = str | PathLike[str] | Mapping[str, Any] | nn.Module | BinaryIO


@dataclass(frozen=True)
class Weights:
    """A network's state dict, in the order of the file, and the description that came with it, if any.

    path: the file, or a word for weights in memory. entry: where in the file they lay, "" for its own keys.
    notes: what was left out, one line each. ours: nobody else holds these tensors.
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
    """Read weights.

    Of a file that holds more than a state dict, the one network's is taken, the average over training before
    the weights that are trained. Keys lose their prefix, 1x1 projections have the published shape. The
    description is that of the `.json` beside the file, or the copy in a safetensors header.

    Args:
        source: a path, whatever its ending (.pt, .pth, .safetensors, ...); the folder of a training run, of
            which it reads the first average in the newest snapshot that is whole; a file open for reading
            bytes; a state dict or a module, whose tensors are not copied.
        checksums: compare everything that is read of a zip-format .pt with its CRC-32. False is for files
            that were saved without (torch's `set_crc32_options`).
        values: False compares checksums, but gives tensors without memory, on the meta device.
        entry: the state dict to take, such as "ema" or "model", where a file holds several.

    Raises:
        InvalidArgument: for a URL, or what is neither path nor weights.
        CheckpointError: in one line, for a file that is missing, empty, truncated, damaged, would run code
            when unpickled (naming what it would run), or has no state dict, or several of equal right.
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
        raise invalid("weights", str(path), f"a path that the system takes ({error.strerror})") from None
    if run:
        return Weights(path, *read_run(path))
    _check_there(path)
    with open(path, "rb") as file:
        return _read_open(path, file, checksums, values, entry, beside=path.with_suffix(".json"))


def _read_open(
    path: Path, file: BinaryIO, checksums: bool, values: bool, entry: str | None, beside: Path | None = None
) -> Weights:
    """Read an open file; `beside` is where its description would be."""
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
    """Put together what was read."""
    for key, value in tensors.items():
        if _PROJECTION.fullmatch(key) and value.dim() != 3 and all(side == 1 for side in value.shape[2:]):
            tensors[key] = value.reshape(*value.shape[:2], 1)
    said = (chosen.note,) if chosen.note else ()
    return Weights(path, tensors, description, chosen.entry, (*said, *notes), ours)


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Say what is wrong with weights under their name."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _check_there(path: Path) -> None:
    """Refuse what isn't a file that can be read."""
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
            raise CheckpointError(f"{path}: a link to {os.readlink(path)}, which is not there") from None
        raise CheckpointError(f"{path}: no such file{near_names(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def near_names(path: Path) -> str:
    """Return what lies beside a path that isn't there: `; nearest there: a, b`, `; FOLDER holds a, b`, ..."""
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
    """The `.json` beside the file, if it is ours, else the header's copy; and what was passed over."""
    notes: tuple[str, ...] = ()
    if beside is not None and beside.is_file():
        try:
            text = beside.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise CheckpointError(f"{beside}: not readable: {error}") from None
        if not is_foreign(text):
            return _described(text, str(beside)), ()
        notes = (f"passed over {beside.name} beside it: not a description of ours",)
    if header is None:
        return None, notes
    return _described(header, f"{path} (header)"), notes


def _described(text: str, source: str) -> Description:
    try:
        return description_from_json(text, source)
    except InvalidArgument as error:
        raise CheckpointError(str(error)) from None
