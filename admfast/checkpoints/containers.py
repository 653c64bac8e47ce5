"""Readers of the formats of weights files.

A reader lists the tensors of a file with their places in it, and reads the bytes of a storage on demand. It
never maps the file into memory, so loaded values don't change if the file is overwritten.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from collections import Counter
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from admfast.checkpoints.contents import HEAD, MAX_HEADER, kind_of, words_for_text
from admfast.checkpoints.pickles import RunsCode, Storage, StoredTensor, read_pickle
from admfast.errors import first_line

_CHUNK = 1 << 24
_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's older format
# Largest ratio of a member's length to its compressed length; 1 for a member that isn't compressed.
_MOST_PACKED = {zipfile.ZIP_DEFLATED: 1032, zipfile.ZIP_BZIP2: 1 << 20, zipfile.ZIP_LZMA: 1 << 14}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Container(Protocol):
    """Reader of an open weights file.

    content: dicts and lists of `StoredTensor` and other values. header: metadata, texts by name.
    """

    content: Any
    header: dict[str, str]

    def check(self, storage: Storage) -> None:
        """Raise ValueError unless the file holds a storage with the length that its pickle gives."""

    def read(self, storage: Storage, into: memoryview | None) -> None:
        """Read the bytes of a storage into `into`, and verify its checksum if the file has one.

        storage: must have passed `check`. into: None only verifies.
        Raises: ValueError if the checksum is wrong or the file ends early.
        """


def open_container(file: BinaryIO, checksums: bool = True) -> Container:
    """Return the reader for a file's format, which its first bytes determine.

    Raises: ValueError that says what is wrong with the file, or which other kind of file it is.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    kind = kind_of(file.read(HEAD), size)
    if kind == "zip":
        return _Zip(file, size, checksums)
    return _Safetensors(file, size) if kind == "safetensors" else _Pickles(file, size)


def _unpickled(file: BinaryIO | io.BytesIO, otherwise: str | None = None) -> tuple[Any, dict[str, Storage]]:
    """Call `read_pickle`; raise ValueError for any failure. otherwise: message to use then."""
    try:
        return read_pickle(file)
    except RunsCode as call:
        why = "a weights file holds tensors and nothing else (nothing was run)"
        raise ValueError(f"refused: unpickling it would call {call}; {why}") from None
    except Exception as error:  # a damaged pickle can fail in any look-up; all failures mean the same
        detail = first_line(error) if type(error) is ValueError else type(error).__name__
        damaged = f"damaged, or no file of torch.save: its pickle can't be read ({detail})"
        raise ValueError(otherwise or damaged) from error


class _Zip:
    """Reader of torch.save's format: a zip archive of a pickle and one member for each storage."""

    def __init__(self, file: BinaryIO, size: int, checksums: bool):
        self._file, self._size, self._checksums = file, size, checksums
        self.header: dict[str, str] = {}
        try:
            self._archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile:
            text = f"the zip central directory at its end is missing ({size:,} bytes are there)"
            raise ValueError(f"truncated: {text}") from None
        names = self._archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("a TorchScript program, not a state dict")
        main = next((name for name in names if name.endswith("/data.pkl")), None)
        if main is None:
            raise ValueError(f"a zip archive without data.pkl: not a file of torch.save{_held(names)}")
        self._folder = main.removesuffix("data.pkl")
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"damaged: it holds {twice} more than once")
        order = f"{self._folder}byteorder"
        if order in names and self._member(order) != b"little":
            raise ValueError("saved on a big-endian machine; save it again on a little-endian one")
        self.content, _ = _unpickled(io.BytesIO(self._member(main)))

    def check(self, storage: Storage) -> None:
        name = self._name(storage)
        try:
            held = self._length(name)
        except KeyError:
            raise ValueError(f"damaged: {name} is missing") from None
        if held != storage.nbytes:
            raise ValueError(f"damaged: {name} has {held:,} bytes, not {storage.nbytes:,}")

    def read(self, storage: Storage, into: memoryview | None) -> None:
        self._fill(self._name(storage), into)

    def _name(self, storage: Storage) -> str:
        return f"{self._folder}data/{storage.key}"

    def _length(self, name: str) -> int:
        """Return the length of a member in bytes; reject one that can't fit into the file."""
        claimed = self._archive.getinfo(name)
        most = self._size * _MOST_PACKED.get(claimed.compress_type, 1)
        if claimed.compress_size > self._size or claimed.file_size > most:
            raise ValueError(f"damaged: {name} claims to have {claimed.file_size:,} bytes")
        return claimed.file_size

    def _member(self, name: str) -> bytes:
        whole = _memory(self._length(name))
        self._fill(name, memoryview(whole.numpy().data))
        return whole.numpy().tobytes()

    def _fill(self, name: str, into: memoryview | None) -> None:
        info = self._archive.getinfo(name)
        try:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:  # made by another program
                with self._archive.open(info) as member:
                    _fill(member, into, info.file_size)
                    fits = not member.read(1)  # verifies the checksum, at the end
            else:
                found = _fill(self._at_start(info), into, info.file_size)
                fits = found == info.CRC or not self._checksums
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error):
            fits = False
        if not fits:
            raise ValueError(f"damaged: {name} fails its checksum")

    def _at_start(self, info: zipfile.ZipInfo) -> BinaryIO:
        """Return the file, positioned at the first byte of a member that isn't compressed."""
        self._file.seek(info.header_offset)
        head = self._file.read(30)
        name, extra = struct.unpack("<HH", head[26:])
        if head[:4] != b"PK\x03\x04":
            raise EOFError
        self._file.seek(name + extra, io.SEEK_CUR)
        return self._file


class _Pickles:
    """Reader of torch.save's format before version 1.6: several pickles, then the storages."""

    header: dict[str, str] = {}

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._starts: dict[str, int] = {}
        file.seek(0)
        text = words_for_text(file.read(HEAD), size)  # a text can begin like a pickle of protocol 0
        file.seek(0)
        magic, _ = _unpickled(file, text)
        if magic != _MAGIC_NUMBER:
            raise ValueError("a bare pickle, no file of torch.save: save the state dict with torch.save")
        protocol, _ = _unpickled(file)
        machine, _ = _unpickled(file)
        if protocol != _PROTOCOL or not isinstance(machine, dict) or not machine.get("little_endian"):
            raise ValueError("an unknown format of torch.save: save it again on a little-endian machine")
        self.content, storages = _unpickled(file)
        keys, _ = _unpickled(file)
        for key in keys if isinstance(keys, list) else ():
            storage = storages.get(str(key))
            count = file.read(8)
            if storage is None or len(count) < 8 or struct.unpack("<q", count)[0] != storage.count:
                raise ValueError("damaged, or no file of torch.save: storages and pickle don't match")
            self._starts[storage.key] = file.tell()
            if storage.nbytes > size - file.tell():
                raise ValueError(f"truncated, or no file of torch.save: it ends within storage {key}")
            file.seek(storage.nbytes, io.SEEK_CUR)

    def check(self, storage: Storage) -> None:
        if storage.key not in self._starts:
            raise ValueError(f"damaged: storage {storage.key} is missing")

    def read(self, storage: Storage, into: memoryview | None) -> None:
        self._file.seek(self._starts[storage.key])
        _fill(self._file, into, storage.nbytes)


class _Safetensors:
    """Reader of safetensors: a JSON header, then the tensors one after the other."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._starts: dict[str, int] = {}
        file.seek(0)
        try:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"the header would end at byte {length + 8:,} of {size:,}")
            listed = json.loads(file.read(length))
            self.header = listed.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in self.header.values()):
                raise ValueError("its metadata must be texts")
            self.content = {name: self._tensor(name, entry) for name, entry in listed.items()}
            spans = sorted(entry["data_offsets"] for entry in listed.values())
            ends = [0, *(end for _, end in spans)]
            if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != size - 8 - length:
                raise ValueError(f"its tensors take {ends[-1]:,} bytes, but it has {size - 8 - length:,}")
            self._first = 8 + length
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, struct.error) as error:
            detail = str(error) if type(error) is ValueError else "its header can't be read"
            raise ValueError(f"truncated, damaged or not safetensors: {detail}") from error
        if not self.content:
            raise ValueError("holds no tensors")

    def _tensor(self, name: str, entry: dict[str, Any]) -> StoredTensor:
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if dtype is None or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name} has dtype {entry['dtype']}")
        count = math.prod(shape)
        if end - begin != count * dtype.itemsize:
            raise ValueError(f"{name} has {end - begin:,} bytes for {count:,} values")
        self._starts[name] = begin
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return StoredTensor(Storage(name, dtype, count), dtype, 0, shape, tuple(strides))

    def check(self, storage: Storage) -> None:
        """Do nothing: the constructor has compared the header's offsets with the file's length."""

    def read(self, storage: Storage, into: memoryview | None) -> None:
        self._file.seek(self._first + self._starts[storage.key])
        _fill(self._file, into, storage.nbytes)


def _fill(file: Any, into: memoryview | None, count: int) -> int:
    """Read `count` bytes from the file's position, into `into` unless it is None; return their CRC-32."""
    checksum = position = 0
    spare = memoryview(bytearray(min(count, _CHUNK))) if into is None else None
    while position < count:
        most = min(count - position, _CHUNK)
        part = spare[:most] if spare is not None else into[position : position + most]  # type: ignore[index]
        got = file.readinto(part)
        if not got:
            raise ValueError("truncated while it was being read")
        checksum = zlib.crc32(part[:got], checksum)
        position += got
    return checksum


def _memory(count: int) -> Tensor:
    """Return uninitialised memory of `count` bytes."""
    try:
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        raise ValueError(f"{count:,} of its bytes do not fit into memory") from None


def _held(names: list[str]) -> str:
    """Return ` (it holds a, b)`, or that the archive is an npz, for an error."""
    inside = [name for name in names if not name.endswith("/")]
    if inside and all(name.endswith(".npy") for name in inside):
        return ", but an npz of NumPy arrays"
    return f" (it holds {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''})"


def read_tensors(
    container: Container, wanted: dict[str, StoredTensor], values: bool = True
) -> dict[str, Tensor]:
    """Read tensors from their places in a file, each storage once.

    Tensors that share a storage in the file share its memory. values: False verifies the storages and returns
    tensors on the meta device.
    """
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for key, place in wanted.items():
        storage = place.storage
        if storage.key not in storages:
            container.check(storage)
            held = _memory(storage.nbytes if values else 0)
            container.read(storage, memoryview(held.numpy().data) if values else None)
            storages[storage.key] = held
        if not values:
            tensors[key] = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device="meta")
            continue
        held = storages[storage.key]
        held = held[: held.numel() // place.dtype.itemsize * place.dtype.itemsize].view(place.dtype)
        tensors[key] = held.as_strided(place.shape, place.stride, place.offset)
    return tensors
