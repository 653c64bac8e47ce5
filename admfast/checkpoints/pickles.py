"""Read a pickle as data: nothing in it is imported, called or run.

The opcodes build dicts, lists, numbers and text; tensors become their places in the file (`StoredTensor`),
and everything else that a pickle would make by a call becomes an inert `PickledObject` of the call.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch

# No honest weights file calls these. They do no harm here, but such a file is made to do harm elsewhere.
_UNSAFE_CALLS = re.compile(
    r"(os|posix|nt)\.(?!stat_result|terminal_size|_Environ)\w+"
    r"|(subprocess|shutil|socket|runpy|importlib|pty|ctypes|code|commands|webbrowser|pip|pickle|_pickle)(\.\w+)+"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint)"
    r"|torch\.(hub|jit)\.\S+|torch\.load"
)
_DTYPE_OF_STORAGE = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
# Calls that rebuild a tensor that isn't dense -> the kind of tensor.
_NON_DENSE_KINDS = {
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
    "torch._utils._rebuild_device_tensor_from_numpy": "device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "device",
    "torch._utils._rebuild_wrapper_subclass": "wrapped",
}
# Calls that rebuild a dense tensor -> index of the argument with its metadata, such as {"conj": True}.
_METADATA_INDEX = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
_METADATA_KINDS = {"conj": "conjugated", "neg": "negated"}
# The persistent id of a storage in protocol 0: the text of a tuple.
_PERSISTENT_ID = re.compile(r"\('storage', <class '([\w.]+)'>, '([^']*)', '[^']*', (\d{1,19})(?:, None)?\)")
# Most bytes of a tensor that is larger than its storage (made by `expand`). No real weight has more.
_MAX_EXPANDED_BYTES = 2**31
_PUSH_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSH_EMPTY: dict[str, Any] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_NO_OPERATION = frozenset(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"))


class UnsafeCall(Exception):
    """A pickle would call a function that can run programs; the message is the function's name."""


@dataclass(frozen=True)
class GlobalName:
    """Object that a pickle would import, by its name `module.name`."""

    name: str


@dataclass(eq=False)
class PickledObject:
    """Record of an object that a pickle would make by calling unknown code: arguments, state, items."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Storage in a file: its key, and the dtype and number of its values."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in a storage; offset and stride count values of its dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(type(n) is int and 0 <= n < 2**62 for n in (self.offset, *self.shape, *self.stride))
        if not whole or len(self.shape) != len(self.stride):
            raise ValueError("a tensor of impossible shape")
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if all(self.shape) and (self.offset + last + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise ValueError("a tensor that extends past its storage")
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        if nbytes > max(self.storage.nbytes, _MAX_EXPANDED_BYTES):
            raise ValueError(f"a tensor of {nbytes:,} bytes in a storage of {self.storage.nbytes:,}")


def read_pickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """Read the pickle at the file's position; return its value, and its storages by key.

    Raises:
        UnsafeCall: if it would call a function that can run programs.
        Exception: ValueError, KeyError or another, if it is damaged or not a pickle.
    """
    machine = _PickleMachine()
    for opcode, argument, _ in pickletools.genops(file):
        machine.execute(opcode.name, argument)
    return machine.stack.pop(), machine.storages


class _PickleMachine:
    """Stack machine of pickle that can neither import nor call anything."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def execute(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _PUSH_CONSTANT:
            self.stack.append(_PUSH_CONSTANT[name])
        elif name in _PUSH_EMPTY:
            self.stack.append(_PUSH_EMPTY[name]())
        elif (
            name not in _NO_OPERATION
            and not self._execute_stack_opcode(name, argument)
            and not self._execute_fill_opcode(name)
        ):
            self._execute_make_opcode(name, argument)

    def _execute_stack_opcode(self, name: str, argument: Any) -> bool:
        """Execute an opcode that moves values on the stack or the memo; return whether it was one."""
        stack, memo = self.stack, self.memo
        if name == "MARK":
            self.marks.append(len(stack))
        elif name == "POP":
            _ = self.marks.pop() if self.marks and self.marks[-1] == len(stack) else stack.pop()
        elif name == "POP_MARK":
            self._pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            return False
        return True

    def _execute_fill_opcode(self, name: str) -> bool:
        """Execute an opcode that puts values into an existing object; return whether it was one."""
        if name in ("SETITEM", "APPEND"):
            values = self._pop_last(2 if name == "SETITEM" else 1)
        elif name in ("SETITEMS", "APPENDS", "ADDITEMS"):
            values = self._pop_to_mark()
        elif name == "BUILD":
            state = self.stack.pop()
            if isinstance(self.stack[-1], PickledObject):
                self.stack[-1].state = state
            return True
        else:
            return False
        target = self.stack[-1]
        if name.startswith("SETITEM"):
            items = target.items if isinstance(target, PickledObject) else target
            items.update(_pairs(values))
        elif not isinstance(target, PickledObject):
            (target.update if name == "ADDITEMS" else target.extend)(values)
        return True

    def _execute_make_opcode(self, name: str, argument: Any) -> None:
        """Execute an opcode that makes one value from others."""
        stack = self.stack
        if name == "TUPLE":
            value: Any = tuple(self._pop_to_mark())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            value = tuple(self._pop_last(int(name[-1])))
        elif name == "LIST":
            value = self._pop_to_mark()
        elif name == "DICT":
            value = dict(_pairs(self._pop_to_mark()))
        elif name == "FROZENSET":
            value = frozenset(self._pop_to_mark())
        elif name == "GLOBAL":
            value = GlobalName(str(argument).replace(" ", ".", 1))
        elif name == "STACK_GLOBAL":
            value = GlobalName(".".join(map(str, self._pop_last(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            value = _call(*self._pop_last(2))
        elif name == "NEWOBJ_EX":
            value = _call(*self._pop_last(3)[:2])
        elif name == "INST":
            value = _call(GlobalName(str(argument).replace(" ", ".", 1)), tuple(self._pop_to_mark()))
        elif name == "OBJ":
            function, *arguments = self._pop_to_mark()
            value = _call(function, tuple(arguments))
        elif name in ("PERSID", "BINPERSID"):
            value = _make_storage(_parse_persistent_id(argument) if name == "PERSID" else stack.pop())
            if self.storages.setdefault(value.key, value).nbytes != value.nbytes:
                raise ValueError(f"two lengths of the storage {value.key}")
        else:
            raise ValueError(f"opcode {name}")
        stack.append(value)

    def _pop_last(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :]
        if len(values) != count:
            raise ValueError("an empty stack")
        del self.stack[len(self.stack) - count :]
        return values

    def _pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _call(function: Any, arguments: Any) -> Any:
    """Return the value of a call that belongs to a state dict (a dict, a tensor, ...), else a record."""
    name = function.name if isinstance(function, GlobalName | PickledObject) else type(function).__name__
    if not isinstance(arguments, tuple):
        raise ValueError("a call without arguments")
    if _UNSAFE_CALLS.fullmatch(name):
        raise UnsafeCall(name)
    if name == "collections.OrderedDict":
        return dict(*arguments[:1])
    if name == "torch.Size":
        return tuple(arguments[0])
    if name == "torch._tensor._rebuild_from_type_v2":
        return _call(arguments[0], arguments[2])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name in _METADATA_INDEX:
        storage, offset, shape, stride, *_ = arguments
        dtype = _rebuilt_dtype(name, arguments)
        if isinstance(storage, Storage) and dtype is not None and not _metadata_kinds(name, arguments):
            return StoredTensor(storage, dtype, offset, tuple(shape), tuple(stride))
    return PickledObject(name, arguments)


def _rebuilt_dtype(name: str, arguments: tuple[Any, ...]) -> torch.dtype | None:
    """Return the dtype of a rebuilt tensor: its storage's, or the one that version 3 names; else None."""
    if not name.endswith("v3"):
        return getattr(arguments[0], "dtype", None)
    dtype = getattr(torch, arguments[6].name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _metadata_kinds(name: str, arguments: tuple[Any, ...]) -> list[str]:
    """Return what distinguishes a rebuilt tensor's values from its memory: "negated", "conjugated", ..."""
    metadata = [named_values(argument) or {} for argument in arguments[_METADATA_INDEX[name] :]]
    return [
        _METADATA_KINDS.get(flag, str(flag)) for flags in metadata for flag, is_set in flags.items() if is_set
    ]


def non_dense_kind(value: Any) -> str | None:
    """Return the kind of a tensor that isn't dense memory with its values; None for anything else."""
    if isinstance(value, torch.Tensor):
        layout = None if value.layout is torch.strided else str(value.layout).removeprefix("torch.")
        return "quantized" if value.is_quantized else "meta" if value.is_meta else layout
    if not isinstance(value, PickledObject) or value.name not in _METADATA_INDEX:
        return _NON_DENSE_KINDS.get(value.name) if isinstance(value, PickledObject) else None
    kinds = " and ".join(_metadata_kinds(value.name, value.arguments))
    if kinds or not isinstance(value.arguments[0], Storage):
        return kinds or "separately pickled"
    return f"{value.arguments[6].name}"  # a dtype that this torch doesn't have


def _parse_persistent_id(text: str) -> tuple[Any, ...]:
    """Parse the persistent id of a storage from its text."""
    match = _PERSISTENT_ID.fullmatch(text)
    if match is None:
        raise ValueError("a persistent id that is not a storage's")
    return "storage", GlobalName(match[1]), match[2], None, int(match[3])


def _make_storage(identity: Any) -> Storage:
    """Return the storage for a persistent id of torch.save."""
    kind, storage_type, key, _location, count, *view = identity
    dtype = _DTYPE_OF_STORAGE.get(storage_type.name.rpartition(".")[2])
    if kind != "storage" or dtype is None or type(count) is not int or count < 0 or any(view):
        raise ValueError(f"a storage of an unknown kind, {storage_type.name}")
    return Storage(str(key), dtype, count)


def named_values(value: Any) -> Mapping[Any, Any] | None:
    """Return the named values of a dict or of an object's record; None if it has none.

    Those of a pickled module are its parameters, buffers and submodules.
    """
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, PickledObject):
        return None
    state = value.state if isinstance(value.state, dict) else {}
    if {"_parameters", "_modules"} <= state.keys():
        parts = (state.get(name) for name in ("_parameters", "_buffers", "_modules"))
        return {name: value for part in parts for name, value in (named_values(part) or {}).items()}
    return {**state, **value.items} or None
