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

from admfast.checkpoints.containers import open_container, read_tensors
from admfast.checkpoints.snapshots import RUN_FILE, is_run_folder, read_run_average
from admfast.checkpoints.state_dicts import NetworkEntry, find_network_entry
from admfast.errors import CheckpointError, InvalidArgument, invalid
from admfast.files.paths import user_path
from admfast.models import NetConfig
from admfast.models.description import Description, description_from_json, is_foreign

METADATA_KEY = "admfast"  # key of the description's copy in a safetensors header
WEIGHTS_SUFFIXES = (".pt", ".pth", ".safetensors")
RUN_FOLDER_HINT = f"the folder of a training run (`admfast train --out FOLDER` makes it; it holds {RUN_FILE})"

# 1x1 projections. Related networks store them as 2-D convolutions or as linear layers.
_PROJECTION = re.compile(r"(.*\.)?(qkv|proj_out|qkv_proj|c_proj)\.weight")

WeightsSource = str | PathLike[str] | Mapping[str, Any] | nn.Module | BinaryIO


@dataclass(frozen=True)
class Weights:
    """State dict of a network, in the order of the file, and the description that came with it, if any.

    path: the file, or a word for weights in memory. entry: name of the state dict in the file or of a run's
    average, "" for the top level of a file. notes: lines about ignored contents. unshared: whether nothing
    else uses the memory of these tensors.
    """

    path: Path
    tensors: dict[str, Tensor]
    description: Description | None
    entry: str = ""
    notes: tuple[str, ...] = ()
    unshared: bool = True


def read_weights(
    source: WeightsSource, *, checksums: bool = True, values: bool = True, entry: str | None = None
) -> Weights:
    """Read a network's weights and their description.

    A file may hold more than a state dict. The state dict of the network is chosen from it; the average of
    the weights over training is preferred to the current weights. Prefixes of the keys are removed, and 1x1
    projections get the published shape. The description is that of the `.json` next to the file, or else the
    copy in a safetensors header.

    Args:
        source: a path with any ending (.pt, .pth, .safetensors, ...); the folder of a training run, of which
            the newest intact snapshot is read; a file open for reading bytes; a state
            dict or a module, whose tensors are not copied.
        checksums: verify the CRC-32 of everything that is read from a zip-format .pt. False is for files that
            were saved without checksums (torch's `set_crc32_options`).
        values: False verifies checksums, but returns tensors on the meta device, which have no memory.
        entry: name of the state dict to read, such as "ema" or "model", if a file holds several; of a run,
            the name of an average, such as "0.9999". None reads the first average of a run.

    Raises:
        InvalidArgument: for a URL, a source that is neither a path nor weights, or an unknown average of a
            run.
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
        with _errors_with_path(path):
            network = find_network_entry(source, entry)
        tensors = {key: value.detach() for key, value in network.tensors.items()}
        description = Description(config) if isinstance(config, NetConfig) else None
        return _make_weights(path, tensors, description, network, (), unshared=False)
    if getattr(source, "closed", False):
        raise invalid("weights", source, "an open file; this one is closed")
    if not (hasattr(source, "read") and hasattr(source, "seek") and isinstance(source.read(0), bytes)):
        raise invalid("weights", source, "a path, a file open for reading bytes, a state dict or a module")
    name = getattr(source, "name", None)
    path = Path(name if isinstance(name, str) else type(source).__name__)
    return _read_open(path, source, checksums, values, entry)


def _read_file(path: Path, checksums: bool, values: bool, entry: str | None) -> Weights:
    try:
        is_run = is_run_folder(path)
    except OSError as error:
        raise invalid("weights", str(path), f"a path that the system accepts ({error.strerror})") from None
    if is_run:
        # A command line reads 0.9999 as a number.
        average = None if entry is None else str(entry)
        tensors, description = read_run_average(path, average, argument="entry")
        return Weights(path, tensors, description, description.training["average"])
    _check_readable(path)
    with open(path, "rb") as file:
        return _read_open(path, file, checksums, values, entry, json_path=path.with_suffix(".json"))


def _read_open(
    path: Path,
    file: BinaryIO,
    checksums: bool,
    values: bool,
    entry: str | None,
    json_path: Path | None = None,
) -> Weights:
    """Read an open file. json_path: path of the `.json` that may describe it."""
    with _errors_with_path(path):
        container = open_container(file, checksums)
        network = find_network_entry(container.content, entry)
        tensors = read_tensors(container, network.tensors, values)
    description, notes = _find_description(path, json_path, container.header.get(METADATA_KEY))
    return _make_weights(path, tensors, description, network, notes)


def _make_weights(
    path: Path,
    tensors: dict[str, Tensor],
    description: Description | None,
    network: NetworkEntry,
    notes: tuple[str, ...],
    unshared: bool = True,
) -> Weights:
    """Return weights as a record, with 1x1 projections in the published shape."""
    for key, value in tensors.items():
        if _PROJECTION.fullmatch(key) and value.dim() != 3 and all(side == 1 for side in value.shape[2:]):
            tensors[key] = value.reshape(*value.shape[:2], 1)
    network_notes = (network.summary,) if network.summary else ()
    return Weights(path, tensors, description, network.name, (*network_notes, *notes), unshared)


@contextlib.contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Turn errors in the block into CheckpointErrors that begin with the path."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _check_readable(path: Path) -> None:
    """Reject a path that isn't a readable file."""
    if path.is_dir():
        names = ", ".join(_weights_in_folder(path)[:8]) or "none"
        raise CheckpointError(
            f"{path}: a folder, not a weights file (holds {names}), and not {RUN_FOLDER_HINT}"
        )
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to {os.readlink(path)}, which does not exist") from None
        raise CheckpointError(f"{path}: no such file{missing_path_hint(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def missing_path_hint(path: Path) -> str:
    """Return a hint for a missing path: `; similar names: a, b`, `; FOLDER holds a, b`, ..."""
    folder = path.parent
    try:
        names = _weights_in_folder(folder)
    except FileNotFoundError:
        return f"; there is no folder {folder}"
    except OSError as error:
        return f"; {folder}: {error.strerror}"
    similar = get_close_matches(path.name, names, n=3, cutoff=0.5)
    if similar:
        return f"; similar names: {', '.join(similar)}"
    return f"; {folder} holds {', '.join(names[:8]) or 'no weights files and no training runs'}"


def _weights_in_folder(folder: Path) -> list[str]:
    """Return the names of the weights files and training runs in a folder."""
    names = sorted(os.listdir(folder))
    return [
        name for name in names if name.endswith(WEIGHTS_SUFFIXES) or os.path.isfile(folder / name / RUN_FILE)
    ]


def _find_description(
    path: Path, json_path: Path | None, header: str | None
) -> tuple[Description | None, tuple[str, ...]]:
    """Return the description in the `.json` next to the file, else the header's, and notes on the `.json`."""
    notes: tuple[str, ...] = ()
    if json_path is not None and json_path.is_file():
        try:
            text = json_path.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise CheckpointError(f"{json_path}: not readable: {error}") from None
        if not is_foreign(text):
            return _parse_description(text, str(json_path)), ()
        notes = (f"ignored {json_path.name}: not a description written by admfast",)
    if header is None:
        return None, notes
    return _parse_description(header, f"{path} (header)"), notes


def _parse_description(text: str, source: str) -> Description:
    try:
        return description_from_json(text, source)
    except InvalidArgument as error:
        raise CheckpointError(str(error)) from None
