"""Repeat the operations of a step on a CPU without the Python code that calls them.

A row of a step calls a thousand operations of torch and of this package. The Python code that chooses and
calls them, and torch's record for the gradient, take 10 to 20 ms: half of a step of digits32 at batch 1. All
rows of one kind run the same operations on the same buffers. So they are recorded once, as a program of
torch.fx, and then repeated, as a GPU repeats a CUDA graph. They give the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from admfast.models.hooks import hook_checks_skipped
from admfast.ops.transforms import is_intercepted, package_dispatch_mode

ATEN = torch.ops.aten
# They return another tensor object with the same elements, whether or not something is written to them.
ALIASING_OPS = frozenset({ATEN.detach.default, ATEN.alias.default, ATEN.lift_fresh.default})


class Replay:
    """A row's body that repeats its recorded operations from its fourth call on.

    The first call runs the body, which derives forms of weights and caches its choices. The second one runs
    it and records its operations. The third one runs the body, then the recorded operations from the same
    state, and compares all bits that they wrote. If something must see the operations or the layers (a
    dispatch mode, a trace, a hook, a replaced layer), a call runs the body.

    refusal: why the operations can't be repeated; None if they can, or if that is not known yet.
    """

    def __init__(self, body: Callable[[], None]):
        self.body = body
        self.forget()

    def forget(self) -> None:
        """Drop the recorded operations; the next call counts as the first."""
        self.refusal: str | None = None
        self._program: _Program | None = None
        self._calls = 0  # until the operations are repeated or refused

    @property
    def reason_not_replayed(self) -> str | None:
        """Why the next call runs the body, or None if it repeats the recorded operations."""
        return self.refusal or ("fewer than four rows" if self._calls < 3 else None)

    def __call__(self) -> None:
        if self.refusal is not None or is_intercepted() or not hook_checks_skipped():
            self.body()
        elif self._calls == 0:
            self.body()
            self._calls = 1
        elif self._calls == 1:
            self._record()
        elif self._calls == 2:
            self._compare()
        else:
            assert self._program is not None
            self._program.run()

    def _record(self) -> None:
        recorder = _Recorder()
        with package_dispatch_mode(), recorder:
            self.body()
        self.refusal = recorder.refusal
        self._program = recorder.program()
        self._calls = 2

    def _compare(self) -> None:
        assert self._program is not None
        written = self._program.written
        before = [t.clone() for t in written]
        self.body()
        expected = [t.clone() for t in written]
        _restore(written, before)
        self._program.run()
        if all(_same_bits(t, e) for t, e in zip(written, expected, strict=True)):
            self._calls = 3
        else:
            _restore(written, expected)
            self._program, self.refusal = None, "the recorded operations gave another result"


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of the same shape and dtype have the same bits; so NaN equals NaN."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class _Program:
    """Recorded operations. written: the tensors from outside that they write to."""

    def __init__(self, graph: fx.Graph, constants: dict[str, Tensor], written: list[Tensor]):
        self.written = written
        self._constants = SimpleNamespace(**constants)
        # Not a GraphModule, which would be part of a reference cycle and keep the networks alive.
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<a step's operations>", "exec"), names)
        self._function = names["forward"]

    def run(self) -> None:
        """Repeat the operations."""
        self._function(self._constants)


class _Recorder(TorchDispatchMode):
    """A dispatch mode that writes every operation into a graph.

    refusal: why the operations can't be repeated, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refusal: str | None = None
        self._graph = fx.Graph()
        self._constants: dict[str, Tensor] = {}
        # The tensors that exist, weakly, so that the memory of a row is freed as without a recorder.
        self._nodes: Any = WeakIdKeyDictionary()
        self._nodes_by_memory: dict[tuple[Any, ...], fx.Node] = {}
        self._written: set[int] = set()

    def program(self) -> _Program:
        """Return the recorded operations, without those whose results nothing reads."""
        self._graph.output(None)
        self._graph.eliminate_dead_code()
        written = [t for t in self._constants.values() if _storage_id(t) in self._written]
        return _Program(self._graph, self._constants, written)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            self.refusal = f"{func} reads a value"
        if func in ALIASING_OPS:
            self._set_node(out, self._node_of(args[0]))
            return out
        is_constant_view = _is_view(func) and all(
            self._is_constant(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)
        )
        if is_constant_view:  # it can be made once
            for t in out if isinstance(out, tuple | list) else (out,):
                self._add_constant(t)
            return out
        inputs = fx.node.map_aggregate((args, kwargs), self._node_of)
        node = self._graph.call_function(func, *inputs)  # type: ignore[misc]
        self._note_writes(func, args, kwargs)
        if isinstance(out, tuple | list):
            for i, t in enumerate(out):
                if isinstance(t, Tensor) and t not in self._nodes:
                    self._set_node(t, self._graph.call_function(operator.getitem, (node, i)))
        elif isinstance(out, Tensor) and out not in self._nodes:
            self._set_node(out, node)
        return out

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not func._schema.is_mutable:
            return
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if isinstance(value, Tensor):
                    self._written.add(_storage_id(value))

    def _set_node(self, t: Tensor, node: Any) -> None:
        self._nodes[t] = node
        self._nodes_by_memory[_memory_key(t)] = node

    def _node_of(self, value: Any) -> Any:
        """Return a tensor's node, a constant for a tensor from outside; return other values as is."""
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(value)
        if node is None:
            # autograd may hand out a result under another tensor object when it has saved it.
            node = self._nodes_by_memory.get(_memory_key(value))
            if node is None:
                return self._add_constant(value)
            self._nodes[value] = node
        return node

    def _add_constant(self, t: Tensor) -> fx.Node:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = t
        node = self._graph.create_node("get_attr", name)
        self._set_node(t, node)
        return node

    def _is_constant(self, t: Tensor) -> bool:
        return self._node_of(t).op == "get_attr"


def _storage_id(t: Tensor) -> int:
    """Return the identity of a tensor's memory; oneDNN's tensors show no memory."""
    return t.untyped_storage()._cdata if t.layout == torch.strided else id(t)


def _memory_key(t: Tensor) -> tuple[Any, ...]:
    """Return the key of a tensor's elements in memory."""
    if t.layout != torch.strided:
        return (_storage_id(t),)
    return _storage_id(t), t.dtype, t.storage_offset(), t.shape, t.stride()


def _is_view(func: Any) -> bool:
    """Tell whether an operation only returns views of its input."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
