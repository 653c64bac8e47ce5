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

from admfast.checkpoints.file_format import HEAD_BYTES, MAX_HEADER, describe_text, detect_format
from admfast.checkpoints.pickles import Storage, StoredTensor, UnsafeCall, read_pickle
from admfast.errors import first_line

_CHUNK = 1 << 24
_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's older format
# Largest ratio of a member's length to its compressed length; 1 for a member that isn't compressed.
_MAX_COMPRESSION = {zipfile.ZIP_DEFLATED: 1032, zipfile.ZIP_BZIP2: 1 << 20, zipfile.ZIP_LZMA: 1 << 14}
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

    def read(self, storage: Storage, buffer: memoryview | None) -> None:
        """Read the bytes of a storage into `buffer`, and verify its checksum if the file has one.

        storage: must have passed `check`. buffer: None only verifies the checksum.
        Raises: ValueError if the checksum is wrong or the file ends early.
        """


def open_container(file: BinaryIO, checksums: bool = True) -> Container:
    """Return the reader for a file's format, which its first bytes determine.

    Raises: ValueError that says what is wrong with the file, or which other kind of file it is.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    kind = detect_format(file.read(HEAD_BYTES), size)
    if kind == "zip":
        return _TorchZip(file, size, checksums)
    return _Safetensors(file, size) if kind == "safetensors" else _LegacyTorchFile(file, size)


def _read_pickle(
    file: BinaryIO | io.BytesIO, error_message: str | None = None
) -> tuple[Any, dict[str, Storage]]:
    """Read a pickle; raise ValueError for any failure, with `error_message` if one is given."""
    try:
        return read_pickle(file)
    except UnsafeCall as call:
        why = "a weights file holds tensors and nothing else (nothing was run)"
        raise ValueError(f"refused: unpickling it would call {call}; {why}") from None
    except Exception as error:  # a damaged pickle can fail in any look-up; all failures mean the same
        detail = first_line(error) if type(error) is ValueError else type(error).__name__
        damaged = f"damaged, or no file of torch.save: its pickle can't be read ({detail})"
        raise ValueError(error_message or damaged) from error


class _TorchZip:
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
        pickle_name = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickle_name is None:
            raise ValueError(
                f"a zip archive without data.pkl: not a file of torch.save{_describe_members(names)}"
            )
        self._folder = pickle_name.removesuffix("data.pkl")
        duplicate = next((name for name, count in Counter(names).items() if count > 1), None)
        if duplicate is not None:
            raise ValueError(f"damaged: it holds {duplicate} more than once")
        byteorder_name = f"{self._folder}byteorder"
        if byteorder_name in names and self._read_member(byteorder_name) != b"little":
            raise ValueError("saved on a big-endian machine; save it again on a little-endian one")
        self.content, _ = _read_pickle(io.BytesIO(self._read_member(pickle_name)))

    def check(self, storage: Storage) -> None:
        name = self._member_name(storage)
        try:
            num_bytes = self._member_size(name)
        except KeyError:
            raise ValueError(f"damaged: {name} is missing") from None
        if num_bytes != storage.nbytes:
            raise ValueError(f"damaged: {name} has {num_bytes:,} bytes, not {storage.nbytes:,}")

    def read(self, storage: Storage, buffer: memoryview | None) -> None:
        self._read_into(self._member_name(storage), buffer)

    def _member_name(self, storage: Storage) -> str:
        return f"{self._folder}data/{storage.key}"

    def _member_size(self, name: str) -> int:
        """Return the length of a member in bytes; reject one that can't fit into the file."""
        info = self._archive.getinfo(name)
        max_bytes = self._size * _MAX_COMPRESSION.get(info.compress_type, 1)
        if info.compress_size > self._size or info.file_size > max_bytes:
            raise ValueError(f"damaged: {name} claims to have {info.file_size:,} bytes")
        return info.file_size

    def _read_member(self, name: str) -> bytes:
        memory = _allocate_bytes(self._member_size(name))
        self._read_into(name, memoryview(memory.numpy().data))
        return memory.numpy().tobytes()

    def _read_into(self, name: str, buffer: memoryview | None) -> None:
        info = self._archive.getinfo(name)
        try:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:  # made by another program
                with self._archive.open(info) as member:
                    _read_bytes(member, buffer, info.file_size)
                    is_intact = not member.read(1)  # verifies the checksum, at the end
            else:
                checksum = _read_bytes(self._seek_member(info), buffer, info.file_size)
                is_intact = checksum == info.CRC or not self._checksums
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error):
            is_intact = False
        if not is_intact:
            raise ValueError(f"damaged: {name} fails its checksum")

    def _seek_member(self, info: zipfile.ZipInfo) -> BinaryIO:
        """Return the file, positioned at the first byte of a member that isn't compressed."""
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        name, extra = struct.unpack("<HH", header[26:])
        if header[:4] != b"PK\x03\x04":
            raise EOFError
        self._file.seek(name + extra, io.SEEK_CUR)
        return self._file


class _LegacyTorchFile:
    """Reader of torch.save's format before version 1.6: several pickles, then the storages."""

    header: dict[str, str] = {}

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._starts: dict[str, int] = {}
        file.seek(0)
        # A text can begin like a pickle of protocol 0.
        not_a_pickle = describe_text(file.read(HEAD_BYTES), size)
        file.seek(0)
        magic, _ = _read_pickle(file, not_a_pickle)
        if magic != _MAGIC_NUMBER:
            raise ValueError("a bare pickle, no file of torch.save: save the state dict with torch.save")
        protocol, _ = _read_pickle(file)
        machine, _ = _read_pickle(file)
        if protocol != _PROTOCOL or not isinstance(machine, dict) or not machine.get("little_endian"):
            raise ValueError("an unknown format of torch.save: save it again on a little-endian machine")
        self.content, storages = _read_pickle(file)
        keys, _ = _read_pickle(file)
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

    def read(self, storage: Storage, buffer: memoryview | None) -> None:
        self._file.seek(self._starts[storage.key])
        _read_bytes(self._file, buffer, storage.nbytes)


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
            entries = json.loads(file.read(length))
            self.header = entries.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in self.header.values()):
                raise ValueError("its metadata must be texts")
            self.content = {name: self._tensor(name, entry) for name, entry in entries.items()}
            spans = sorted(entry["data_offsets"] for entry in entries.values())
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

    def read(self, storage: Storage, buffer: memoryview | None) -> None:
        self._file.seek(self._first + self._starts[storage.key])
        _read_bytes(self._file, buffer, storage.nbytes)


def _read_bytes(file: Any, buffer: memoryview | None, count: int) -> int:
    """Read `count` bytes from the file's position, into `buffer` unless it is None; return their CRC-32."""
    checksum = position = 0
    scratch = memoryview(bytearray(min(count, _CHUNK))) if buffer is None else None
    while position < count:
        chunk = min(count - position, _CHUNK)
        part = scratch[:chunk] if scratch is not None else buffer[position : position + chunk]  # type: ignore[index]
        num_read = file.readinto(part)
        if not num_read:
            raise ValueError("truncated while it was being read")
        checksum = zlib.crc32(part[:num_read], checksum)
        position += num_read
    return checksum


def _allocate_bytes(count: int) -> Tensor:
    """Return uninitialised memory of `count` bytes."""
    try:
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        raise ValueError(f"{count:,} of its bytes do not fit into memory") from None


def _describe_members(names: list[str]) -> str:
    """Return ` (it holds a, b)`, or that the archive is an npz, for an error."""
    members = [name for name in names if not name.endswith("/")]
    if members and all(name.endswith(".npy") for name in members):
        return ", but an npz of NumPy arrays"
    return f" (it holds {', '.join(members[:3])}{', ...' if len(members) > 3 else ''})"


def read_tensors(
    container: Container, places: dict[str, StoredTensor], values: bool = True
) -> dict[str, Tensor]:
    """Read tensors from their places in a file, each storage once.

    Tensors that share a storage in the file share its memory. values: False verifies the storages and returns
    tensors on the meta device.
    """
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for key, place in places.items():
        storage = place.storage
        if storage.key not in storages:
            container.check(storage)
            memory = _allocate_bytes(storage.nbytes if values else 0)
            container.read(storage, memoryview(memory.numpy().data) if values else None)
            storages[storage.key] = memory
        if not values:
            tensors[key] = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device="meta")
            continue
        memory = storages[storage.key]
        memory = memory[: memory.numel() // place.dtype.itemsize * place.dtype.itemsize].view(place.dtype)
        tensors[key] = memory.as_strided(place.shape, place.stride, place.offset)
    return tensors
