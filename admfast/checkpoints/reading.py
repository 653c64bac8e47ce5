"""Read `.pt`, `.pth` and `.safetensors` files to a state dict on the CPU; nothing in them is run."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from admfast.checkpoints.snapshots import is_run, read_run
from admfast.errors import CheckpointError, InvalidArgument, first_line
from admfast.models.description import Description, description_from_json

METADATA_KEY = "admfast"  # of the copy of the description in a safetensors header
ENDINGS = (".pt", ".pth", ".safetensors")

# Globals that a state dict is made of; any other is what a refused file is refused for.
_OF_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\.\w*Storage|torch\.storage\.\w+|torch\.(Size|device|Tensor|[a-z]+\d+\w*)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
)


@dataclass(frozen=True)
class Weights:
    """A state dict on the CPU, in the order of the file, and the description that came with it, if any."""

    path: Path
    tensors: dict[str, Tensor]
    description: Description | None


def read_weights(path: str | PathLike[str], *, checksums: bool = True) -> Weights:
    """Read a weights file.

    Tensors of a zip-format .pt or a .safetensors are mapped from the file, not copied: pages are read when
    they are used, so the file must not be rewritten in place meanwhile. The description is that of the
    `.json` beside the file, or the copy in a safetensors header.

    Args:
        path: .pt, .pth or .safetensors; or the folder of a training run, of which it reads the first average
            in the newest snapshot that is whole.
        checksums: compare every member of a zip-format .pt with its CRC-32, which mapping it would pass over:
            1.5 s for 2.2 GB. False is for files that were saved without (torch's `set_crc32_options`).

    Raises:
        CheckpointError: in one line, for a file that is missing, empty, truncated, damaged, would run code
            when unpickled (naming what it would run), or isn't a plain mapping of names to tensors.
    """
    path = Path(path)
    if is_run(path):
        return Weights(path, *read_run(path))
    _check_there(path)
    if path.suffix == ".safetensors":
        tensors, header = _read_safetensors(path)
    else:
        tensors, header = _read_pickled(path, checksums), None
    return Weights(path, tensors, _description(path, header))


def _check_there(path: Path) -> None:
    """Refuse what isn't a file with something in it."""
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir() if entry.suffix in ENDINGS)
        raise CheckpointError(f"{path}: a folder, not a weights file (holds {', '.join(held[:8]) or 'none'})")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: not a regular file")
        size = found.st_size
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file{_near_names(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file it points to")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: a web page, not a weights file (a download that failed?)")


def _near_names(path: Path) -> str:
    """`; nearest there: a, b`, or what weights the folder holds, or that there is no such folder."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    held = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in ENDINGS)
    near = get_close_matches(path.name, held, n=3, cutoff=0.5)
    if near:
        return f"; nearest there: {', '.join(near)}"
    return f"; {path.parent} holds {', '.join(held[:8]) or 'no weights files'}"


def _read_pickled(path: Path, checksums: bool) -> dict[str, Tensor]:
    """The state dict of a file that torch.save wrote."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        _check_archive(path, checksums)
    try:
        with warnings.catch_warnings():
            # Said of what is refused, or read, by us in a line of our own.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            # Only the zip format can be mapped; older files are read whole.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(path, zipped)}") from error
    except Exception as error:  # torch raises many kinds for damaged files; all of them mean one thing here
        text = first_line(error).split(". This is")[0][:200]
        raise CheckpointError(f"{path}: damaged, or no file of torch.save: {text}") from error
    return _plain(path, loaded)


def _check_archive(path: Path, checksums: bool) -> None:
    """Refuse a zip that ends early, holds a program, or has a member that isn't what was written."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: truncated: the zip central directory at its end is missing ({size:,} bytes are there)"
        ) from None
    with archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(f"{path}: a TorchScript program, not a state dict")
        if not any(name.endswith("/data.pkl") for name in names):
            raise CheckpointError(f"{path}: a zip archive without data.pkl: not a file of torch.save")
        for name in names if checksums else ():
            try:
                with archive.open(name) as member:
                    while member.read(1 << 20):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
                raise CheckpointError(f"{path}: damaged: {name} fails its checksum") from None


def _refusal(path: Path, zipped: bool) -> str:
    """Name the first global that isn't a tensor's, for which torch refused to unpickle; imports nothing."""
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open(path, "rb"))
            if zipped:
                archive = stack.enter_context(zipfile.ZipFile(file))
                inner = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                file = stack.enter_context(archive.open(inner))
            names = _globals(file)
    except (ValueError, OSError, zipfile.BadZipFile):
        names = []
    foreign = next((name for name in names if not _OF_TENSORS.fullmatch(name)), None)
    if foreign is None:
        return "damaged, or no file of torch.save: its pickle can't be read"
    why = "a weights file holds tensors and nothing else (nothing was run)"
    return f"refused: unpickling it would call {foreign}; {why}"


def _globals(file: IO[bytes]) -> list[str]:
    """`module.name` of everything that the pickles of a file import, in order, without importing it."""
    found: list[str] = []
    # An old-format file is several pickles in a row, then raw data: what parses before the data counts.
    for _ in range(5):
        strings: list[str] = []
        try:
            for opcode, argument, _position in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found.append(str(argument).replace(" ", ".", 1))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, EOFError, IndexError, UnicodeDecodeError):
            return found
    return found


def _plain(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Refuse whatever isn't a mapping of names to dense tensors, and say what it is instead."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    if not loaded:
        raise CheckpointError(f"{path}: an empty state dict")
    if {"state", "param_groups"} <= set(loaded):
        raise CheckpointError(f"{path}: the state of an optimiser, not of a network")
    others = [
        key for key, value in loaded.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if not others:
        return dict(loaded)
    inside = [str(key) for key in others if _is_state(loaded[key])]
    hint = f"; {_quoted(inside)} in it would be: save that alone" if inside else ""
    verb = "is" if len(others) == 1 else "are"
    raise CheckpointError(f"{path}: not a plain state dict: {_quoted(others)} {verb} no tensor{hint}")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _quoted(names: list[Any]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown + (", ..." if len(names) > 4 else "")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the copy of the description in the header."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: truncated, damaged or not safetensors: {first_line(error)}"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors, metadata.get(METADATA_KEY)


def _description(path: Path, header: str | None) -> Description | None:
    """The `.json` beside the file; without one, the header's copy."""
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{beside}: not readable: {error}") from None
        source = str(beside)
    elif header is not None:
        text, source = header, f"{path} (header)"
    else:
        return None
    try:
        return description_from_json(text, source)
    except InvalidArgument as error:
        raise CheckpointError(str(error)) from None
