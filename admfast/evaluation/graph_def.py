"""Read the constant arrays of a TensorFlow graph file without TensorFlow.

A GraphDef is a protocol buffer: field 1 holds the nodes; in a node, field 1 is the name, 2 the operation, and
5 the attributes, a map from a name to a value, whose field 8 is a tensor: 1 its type, 2 its shape, 4 its
bytes, 5 its float32 numbers. Only these fields are read; nothing of the file is executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admfast.errors import CheckpointError

_FLOAT32 = 1
Field = tuple[int, int | memoryview]


class _Damaged(Exception):
    """The bytes are not a protocol buffer of this form."""


def read_constants(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the float32 constants of a graph file, by the name of their node. Raises CheckpointError."""
    constants: dict[str, NDArray[np.float32]] = {}
    try:
        for number, node in _fields(memoryview(path.read_bytes())):
            if number == 1 and isinstance(node, memoryview):
                name, operation, tensor = _read_node(node)
                if operation == "Const" and tensor is not None:
                    array = _read_tensor(tensor)
                    if array is not None:
                        constants[name] = array
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror or error}") from None
    except (_Damaged, IndexError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a TensorFlow graph, or damaged: {error}") from None
    return constants


def _fields(data: memoryview) -> Iterator[Field]:
    """Yield the fields of a message: numbers, and the bytes of texts and nested messages."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        value: int | memoryview
        if wire_type == 0:
            value, position = _varint(data, position)
        else:
            if wire_type == 2:
                length, position = _varint(data, position)
            elif wire_type in (1, 5):
                length = 8 if wire_type == 1 else 4
            else:
                raise _Damaged(f"a field of the unknown type {wire_type}")
            if position + length > len(data):
                raise _Damaged("it ends early")
            value, position = data[position : position + length], position + length
        yield number, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the number at a position, seven bits a byte, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise _Damaged("it ends early")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _read_node(node: memoryview) -> tuple[str, str, memoryview | None]:
    """Return name, operation and constant of a node."""
    name = operation = ""
    tensor = None
    for number, value in _fields(node):
        if number == 1:
            name = _text(value)
        elif number == 2:
            operation = _text(value)
        elif number == 5 and isinstance(value, memoryview):
            entry = dict(_fields(value))
            if _text(entry.get(1, memoryview(b""))) == "value" and isinstance(entry.get(2), memoryview):
                found = dict(_fields(entry[2])).get(8)  # type: ignore[arg-type]
                tensor = found if isinstance(found, memoryview) else tensor
    return name, operation, tensor


def _read_tensor(tensor: memoryview) -> NDArray[np.float32] | None:
    """Return a float32 tensor; None for another type."""
    dtype, sides, content, values = 0, [], memoryview(b""), b""
    for number, value in _fields(tensor):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2 and isinstance(value, memoryview):
            for kind, dimension in _fields(value):
                if kind == 2 and isinstance(dimension, memoryview):
                    side = dict(_fields(dimension)).get(1, 0)
                    sides.append(side if isinstance(side, int) else 0)
        elif number == 4 and isinstance(value, memoryview):
            content = value
        elif number == 5 and isinstance(value, memoryview):
            values += bytes(value)
    if dtype != _FLOAT32:
        return None
    array = np.frombuffer(bytes(content) or values, dtype="<f4")
    count = math.prod(sides)
    if array.size == 1 and count > 1:  # one number stands for all
        array = np.full(count, array[0], dtype="<f4")
    if array.size != count:
        raise _Damaged(f"an array of {array.size} numbers with the shape {sides}")
    return array.reshape(sides).astype(np.float32)


def _text(value: int | memoryview) -> str:
    if isinstance(value, int):
        raise _Damaged("a number in place of a text")
    return bytes(value).decode()
