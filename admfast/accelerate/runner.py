"""Run an unmodified program with its networks accelerated: `python -m admfast.accelerate PROGRAM ARGS...`

The runner watches each class whose constructor builds the parts of a known make, in whichever file it is
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

from admfast.accelerate.classes import Converted
from admfast.accelerate.door import PRECISIONS, accelerate, report
from admfast.accelerate.nets import MAKES, AcceleratedNet
from admfast.accelerate.trials import SAME
from admfast.errors import AdmfastError

PACKAGES = Path(__file__).resolve().parents[1] / "compat"


@dataclass
class Seen:
    """Record of a network: its report, calls, seconds in them, and the difference that a check found."""

    said: str = ""
    calls: int = 0
    seconds: float = 0.0
    difference: float | None = None


@dataclass
class Watch:
    """Converter of networks at their first calls, which counts calls and seconds.

    check: compare each network's first call with the program's own.
    """

    precision: str | None = None
    check: bool = False
    seen: list[Seen] = field(default_factory=list)
    _known: weakref.WeakKeyDictionary[Any, Seen] = field(default_factory=weakref.WeakKeyDictionary)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the classes that are defined within the `with` block."""
        build = builtins.__build_class__

        @functools.wraps(build)
        def and_look(*args: Any, **kwargs: Any) -> Any:
            made: Any = build(*args, **kwargs)
            init: Any = vars(made).get("__init__") if isinstance(made, type) else None
            init = init and inspect.unwrap(init)
            names = getattr(getattr(init, "__code__", None), "co_names", ())
            ours = isinstance(made, type) and made.__module__.startswith("admfast.")
            built = any(make.builds <= set(names) for make in MAKES)
            if issubclass(made, AcceleratedNet) if ours else built:
                if not hasattr(made.__call__, "watched"):  # a subclass inherits a watched one
                    made.__call__ = self._watched(made.__call__)
            return made

        builtins.__build_class__ = and_look
        try:
            yield
        finally:
            builtins.__build_class__ = build

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(net: Any, *args: Any, **kwargs: Any) -> Any:
            seen = self._known.get(net)
            if torch.compiler.is_compiling() or (seen is None and self._passes(net)):
                return call(net, *args, **kwargs)
            if seen is None:
                wanted = None
                with self._lock:  # another thread may be converting it
                    if net not in self._known:
                        wanted = self._convert(net, call, args, kwargs)
                out = net(*args, **kwargs)
                if wanted is not None:
                    self._known[net].difference = _off(out, wanted)
                return out
            # Calls of a converted network also come here, because its class inherits this method.
            started = time.perf_counter()
            try:
                return call(net, *args, **kwargs)
            finally:
                seen.calls += 1
                seen.seconds += time.perf_counter() - started

        called.watched = True  # type: ignore[attr-defined]
        return called

    def _passes(self, net: Any) -> bool:
        """Tell whether not to convert a network now: it is already converted, a replica, or being traced."""
        replica = getattr(net, "_is_replica", False)
        return isinstance(net, Converted) or replica or torch._C._is_tracing()

    def _convert(
        self, net: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Convert a network; return its output from before the conversion if that is checked, else None."""
        seen, wanted = Seen(), None
        if self.check and not net.training:  # in training mode dropout would draw other masks
            devices = range(torch.cuda.device_count())
            with torch.random.fork_rng(devices), torch.no_grad():
                wanted = call(net, *args, **kwargs)
        try:
            accelerate(net, self.precision)
            seen.said = report(net).partition("\n")[0]
        except AdmfastError as error:
            seen.said = f"{type(net).__name__}: as it is; {error}"
        self.seen.append(seen)
        self._known[net] = seen
        return wanted

    def said(self) -> list[str]:
        """Return one line for each network: its report, calls, seconds, and difference if checked."""
        lines = []
        for seen in self.seen:
            each = 1e3 * seen.seconds / max(seen.calls, 1)
            line = f"{seen.said}; {seen.calls} calls, {seen.seconds:.2f} s on the host, {each:.1f} ms each"
            if seen.difference is not None:
                line += f"; its first result differs by {seen.difference:.1e} of the largest value"
            lines.append(line)
        return lines or ["no network of the ADM family was called"]

    def differs(self) -> bool:
        """Tell whether a check found more than rounding."""
        found = [seen.difference for seen in self.seen if seen.difference is not None]
        return any(not difference <= SAME for difference in found)  # NaN differs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the program's exit status, or 1 if it is 0 and a check found a difference."""
    given = list(sys.argv[1:] if argv is None else argv)
    own = _own(given)
    parser = _parser()
    arguments = parser.parse_args(given[:own])
    if arguments.check and arguments.package:
        parser.error("--check: not with --package, whose networks are admfast's own")
    watch = Watch(arguments.precision, arguments.check)
    program = arguments.program
    if not arguments.module and not Path(program).is_file():
        print(f"program={program!r}: no such Python file; -m runs a module by name", file=sys.stderr)
        return 2
    sys.argv = [program, *given[own:]]
    sys.path[0] = os.getcwd() if arguments.module else str(Path(program).resolve().parent)
    if arguments.package:
        _say_what_is_hidden()
        sys.path.insert(0, str(PACKAGES / "front"))
        sys.path.append(str(PACKAGES / "stand_ins"))
    status: Any = 0
    found = True
    try:
        with watch.watching():
            if arguments.module:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                _run_file(program)
    except SystemExit as end:
        status = end.code
    except ImportError as error:
        found = not _is_by_runpy(error)
        if found:
            raise
        print(f"program={program!r}: {error}", file=sys.stderr)
        return 2
    finally:
        for line in watch.said() if found else ():
            print(f"admfast.accelerate: {line}", file=sys.stderr)
    if status is None or status == 0:
        return 1 if watch.differs() else 0
    if isinstance(status, int):
        return status
    print(status, file=sys.stderr)
    return 1


def _is_by_runpy(error: ImportError) -> bool:
    """Tell whether the program itself was not found, rather than a module that it imports."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == "runpy"


def _say_what_is_hidden() -> None:
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


def _off(found: Any, wanted: Any) -> float | None:
    """Return the largest difference divided by the largest value; None if the results are not tensors."""
    found, wanted = _images(found), _images(wanted)
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return None
    difference = (found.detach() - wanted).abs().max()
    return float(difference / wanted.abs().max()) if difference else 0.0


def _images(out: Any) -> Any:
    """Return the images in a network's output; diffusers returns them first in a tuple, or as `sample`."""
    return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


def _own(given: Sequence[str]) -> int:
    """Return how many arguments belong to the runner: those up to PROGRAM. The others are the program's."""
    at = 0
    while at < len(given) and given[at].startswith("-"):
        at += 2 if given[at] == "--precision" else 1
    return min(at + 1, len(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m admfast.accelerate",
        allow_abbrev=False,  # `_own` must know which option takes a value
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
