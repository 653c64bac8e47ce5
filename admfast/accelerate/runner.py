"""Run an unmodified program with its networks accelerated: `python -m admfast.accelerate PROGRAM ARGS...`

The runner watches each class whose constructor builds the submodules of a known code base, in whichever file
defined. It converts an instance at its first call, after the program has loaded, moved and prepared it.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import functools
import inspect
import os
import runpy
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from admfast.accelerate.class_conversion import Converted
from admfast.accelerate.conversion import PRECISIONS, accelerate, report
from admfast.accelerate.equivalence import MAX_RELATIVE_DIFFERENCE
from admfast.accelerate.networks import CODE_BASES, AcceleratedNet
from admfast.errors import AdmfastError

COMPAT_FOLDER = Path(__file__).resolve().parents[1] / "compat"


@dataclass
class NetworkRecord:
    """Record of a network: its report, calls, seconds in them, and the difference that a check found."""

    report: str = ""
    calls: int = 0
    seconds: float = 0.0
    difference: float | None = None


@dataclass
class Watcher:
    """Converter of networks at their first calls, which counts calls and seconds.

    check: compare each network's first call with the program's own.
    """

    precision: str | None = None
    check: bool = False
    records: list[NetworkRecord] = field(default_factory=list)
    _record_of: weakref.WeakKeyDictionary[Any, NetworkRecord] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def watch_classes(self) -> Iterator[None]:
        """Watch the classes that are defined within the `with` block."""
        build = builtins.__build_class__

        @functools.wraps(build)
        def build_and_watch(*args: Any, **kwargs: Any) -> Any:
            cls: Any = build(*args, **kwargs)
            init: Any = vars(cls).get("__init__") if isinstance(cls, type) else None
            init = init and inspect.unwrap(init)
            names = getattr(getattr(init, "__code__", None), "co_names", ())
            is_ours = isinstance(cls, type) and cls.__module__.startswith("admfast.")
            builds_network = any(code_base.constructor_names <= set(names) for code_base in CODE_BASES)
            if issubclass(cls, AcceleratedNet) if is_ours else builds_network:
                if not hasattr(cls.__call__, "watched"):  # a subclass inherits a watched one
                    cls.__call__ = self._watched_call(cls.__call__)
            return cls

        builtins.__build_class__ = build_and_watch
        try:
            yield
        finally:
            builtins.__build_class__ = build

    def _watched_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched_call(net: Any, *args: Any, **kwargs: Any) -> Any:
            record = self._record_of.get(net)
            if torch.compiler.is_compiling() or (record is None and self._must_not_convert(net)):
                return call(net, *args, **kwargs)
            if record is None:
                expected = None
                with self._lock:  # another thread may be converting it
                    if net not in self._record_of:
                        expected = self._convert(net, call, args, kwargs)
                out = net(*args, **kwargs)
                if expected is not None:
                    self._record_of[net].difference = _relative_difference(out, expected)
                return out
            # Calls of a converted network also come here, because its class inherits this method.
            started = time.perf_counter()
            try:
                return call(net, *args, **kwargs)
            finally:
                record.calls += 1
                record.seconds += time.perf_counter() - started

        watched_call.watched = True  # type: ignore[attr-defined]
        return watched_call

    def _must_not_convert(self, net: Any) -> bool:
        """Tell whether not to convert a network now: it is already converted, a replica, or being traced."""
        replica = getattr(net, "_is_replica", False)
        return isinstance(net, Converted) or replica or torch._C._is_tracing()

    def _convert(
        self, net: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Convert a network; return its output from before the conversion if that is checked, else None."""
        record, expected = NetworkRecord(), None
        if self.check and not net.training:  # in training mode dropout would draw other masks
            devices = range(torch.cuda.device_count())
            with torch.random.fork_rng(devices), torch.no_grad():
                expected = call(net, *args, **kwargs)
        try:
            accelerate(net, self.precision)
            record.report = report(net).partition("\n")[0]
        except AdmfastError as error:
            record.report = f"{type(net).__name__}: as it is; {error}"
        self.records.append(record)
        self._record_of[net] = record
        return expected

    def report_lines(self) -> list[str]:
        """Return one line for each network: its report, calls, seconds, and difference if checked."""
        lines = []
        for record in self.records:
            each = 1e3 * record.seconds / max(record.calls, 1)
            line = f"{record.report}; {record.calls} calls, {record.seconds:.2f} s on the host"
            line += f", {each:.1f} ms each"
            if record.difference is not None:
                line += f"; its first result differs by {record.difference:.1e} of the largest value"
            lines.append(line)
        return lines or ["no network of the ADM family was called"]

    def has_difference(self) -> bool:
        """Tell whether a check found more than rounding."""
        differences = [record.difference for record in self.records if record.difference is not None]
        return any(not difference <= MAX_RELATIVE_DIFFERENCE for difference in differences)  # NaN differs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the program's exit status, or 1 if it is 0 and a check found a difference."""
    words = list(sys.argv[1:] if argv is None else argv)
    num_own = _count_runner_arguments(words)
    parser = _parser()
    arguments = parser.parse_args(words[:num_own])
    if arguments.check and arguments.package:
        parser.error("--check: not with --package, whose networks are admfast's own")
    watcher = Watcher(arguments.precision, arguments.check)
    program = arguments.program
    if not arguments.module and not Path(program).is_file():
        print(f"program={program!r}: no such Python file; -m runs a module by name", file=sys.stderr)
        return 2
    sys.argv = [program, *words[num_own:]]
    sys.path[0] = os.getcwd() if arguments.module else str(Path(program).resolve().parent)
    if arguments.package:
        _print_hidden_package()
        sys.path.insert(0, str(COMPAT_FOLDER / "front"))
        sys.path.append(str(COMPAT_FOLDER / "stand_ins"))
    status: Any = 0
    program_found = True
    try:
        with watcher.watch_classes():
            if arguments.module:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                _run_file(program)
    except SystemExit as end:
        status = end.code
    except ImportError as error:
        program_found = not _is_raised_by_runpy(error)
        if program_found:
            raise
        print(f"program={program!r}: {error}", file=sys.stderr)
        return 2
    finally:
        for line in watcher.report_lines() if program_found else ():
            print(f"admfast.accelerate: {line}", file=sys.stderr)
    if status is None or status == 0:
        return 1 if watcher.has_difference() else 0
    if isinstance(status, int):
        return status
    print(status, file=sys.stderr)
    return 1


def _is_raised_by_runpy(error: ImportError) -> bool:
    """Tell whether the program itself was not found, rather than a module that it imports."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == "runpy"


def _print_hidden_package() -> None:
    """Print the path of the package that the program would have imported, as it may differ from ours."""
    for folder in map(Path, sys.path):
        if (folder / "guided_diffusion").is_dir():
            print(f"admfast.accelerate: not used: {folder / 'guided_diffusion'}", file=sys.stderr)
            return


def _run_file(program: str) -> None:
    """Run a file as `python FILE` does; `runpy` would set `sys.argv[0]` to the value of `__file__`."""
    path = os.path.abspath(program)
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = path
    exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))


def _relative_difference(output: Any, expected: Any) -> float | None:
    """Return the largest difference divided by the largest value; None if the results are not tensors."""
    output, expected = _images(output), _images(expected)
    if not isinstance(output, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return None
    difference = (output.detach() - expected).abs().max()
    return float(difference / expected.abs().max()) if difference else 0.0


def _images(out: Any) -> Any:
    """Return the images in a network's output; diffusers returns them first in a tuple, or as `sample`."""
    return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


def _count_runner_arguments(words: Sequence[str]) -> int:
    """Return how many arguments belong to the runner: those up to PROGRAM. The others are the program's."""
    position = 0
    while position < len(words) and words[position].startswith("-"):
        position += 2 if words[position] == "--precision" else 1
    return min(position + 1, len(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m admfast.accelerate",
        allow_abbrev=False,  # `_count_runner_arguments` must know which option takes a value
        usage="%(prog)s [-h] [--precision {fp32,bf16,fp16}] [--check] [--package] [-m] PROGRAM ARGS...",
        description="Run an unmodified program and accelerate its ADM networks at their first calls.",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="dtype of the torso (default: as it is)")
    parser.add_argument("--check", action="store_true", help="compute first calls both ways and compare them")
    parser.add_argument(
        "--package", action="store_true", help="let the program import admfast's own guided_diffusion"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is the name of a module")
    parser.add_argument("program", metavar="PROGRAM", help="a Python file")
    return parser
