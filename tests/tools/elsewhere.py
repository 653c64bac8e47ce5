"""Run commands of `admfast` as on another machine.

`python -m tests.tools.elsewhere MACHINE COMMAND [-- COMMAND ...]`: MACHINE is "windows", "macos" or a list of
modules that can't be imported, joined by commas. The exit status is that of the first command that fails.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NOT_ON_WINDOWS: list[tuple[Any, str]] = [
    (os, "sysconf sched_getaffinity fork getuid geteuid getgid getpgid setsid fchmod statvfs mkfifo nice"),
    (signal, "SIGHUP SIGKILL SIGQUIT sigwaitinfo sigwait pthread_sigmask pthread_kill setitimer alarm"),
]
NOT_ON_MACOS: list[tuple[Any, str]] = [(os, "sched_getaffinity"), (signal, "sigwaitinfo")]
UNIX_MODULES = ["resource", "fcntl", "pwd", "grp", "termios"]
LINUX_MODULES = ["triton", "xformers", "admfast._C"]  # the extension: where nobody compiled it
# They ask for the system when they are imported, and would look for its libraries.
OTHERS = [
    "PIL.Image", "PIL.PngImagePlugin", "safetensors.torch", "torch._subclasses.fake_tensor",
    "torch.nn.parallel", "torch.utils.data", "torch.utils.flop_counter", "tqdm", "typer",
]  # fmt: skip
MEMORY, PEAK = 64 << 30, 3 << 30


def main(arguments: list[str]) -> int:
    """Become the machine, then run the commands one after another."""
    machine, *words = arguments
    {"windows": become_windows, "macos": become_macos}.get(machine, lambda: hide(machine.split(",")))()
    from admfast.cli.main import main as admfast

    for is_end, command in itertools.groupby(words, "--".__eq__):
        if not is_end and (status := admfast(list(command))):
            return status
    return 0


def become_macos() -> None:
    """Take away what macOS lacks."""
    load_others()
    remove(NOT_ON_MACOS)
    hide(LINUX_MODULES)
    sys.platform = "darwin"


def become_windows() -> None:
    """Take away what Windows lacks, and put its own rules in place."""
    load_others()
    remove(NOT_ON_WINDOWS)
    hide([*UNIX_MODULES, *LINUX_MODULES])
    sys.modules["msvcrt"] = MSVCRT  # type: ignore[assignment]
    for place, name, value in windows_rules():
        setattr(place, name, value)


def hide(modules: list[str]) -> None:
    """Let the import of modules fail as it does where they are not installed."""
    for name in modules:
        sys.modules[name] = None  # type: ignore[assignment]


def load_others() -> None:
    """Import what asks for the system only once, and begin processes as macOS and Windows do."""
    for name in OTHERS:
        importlib.import_module(name)
    sysconfig.get_config_vars()
    multiprocessing.set_start_method("spawn")


def remove(names: list[tuple[Any, str]]) -> None:
    """Take names out of modules, where they are."""
    for module, gone in names:
        for name in gone.split():
            vars(module).pop(name, None)


def windows_rules() -> Iterator[tuple[Any, str, Any]]:
    """Yield what Windows has in the place of a module's name: the module, the name, the value."""
    yield sys, "platform", "win32"
    yield ctypes, "windll", SimpleNamespace(kernel32=KERNEL32)
    for name in ("rename", "unlink", "remove"):
        yield os, name, refusing_open_files(getattr(os, name))
    yield os, "replace", not_over_folders(refusing_open_files(os.replace))
    yield shutil, "_use_fd_functions", False  # opens folders
    yield os, "open", no_folders(os.open)
    yield os, "fsync", writers_only(os.fsync)


def locking(descriptor: int, mode: int, count: int) -> None:
    """Lock `count` bytes at the file's position, which fits into 32 bits, as msvcrt does."""
    assert mode == MSVCRT.LK_NBLCK and os.lseek(descriptor, 0, os.SEEK_CUR) < 2**31
    # Of the open file, not of the process: the process may not lock it twice.
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_CUR, 0, count, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except OSError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def memory_status(status: Any) -> int:
    """Fill MEMORYSTATUSEX, whose second 8 bytes are the memory of the machine."""
    assert ctypes.sizeof(status) == 64 and struct.unpack_from("<I", status)[0] == 64
    struct.pack_into("<Q", status, 8, MEMORY)
    return 1


def process_memory(process: Any, counters: Any, size: int) -> int:
    """Fill PROCESS_MEMORY_COUNTERS, whose second 8 bytes are the largest working set."""
    assert process.value == 2**64 - 1 and size == ctypes.sizeof(counters) == 72
    struct.pack_into("<Q", counters, 8, PEAK)
    return 1


MSVCRT = SimpleNamespace(LK_NBLCK=2, locking=locking)
KERNEL32 = SimpleNamespace(GlobalMemoryStatusEx=memory_status, K32GetProcessMemoryInfo=process_memory)


def refusing_open_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to move or remove a file that this process holds open."""

    def checked(*paths: Any, **options: Any) -> Any:
        for path in paths:
            if options.get("dir_fd") is None and is_open(path):
                raise PermissionError(errno.EACCES, "The file is being used by another process", path)
        return function(*paths, **options)

    return checked


def is_open(path: Any) -> bool:
    """Tell whether this process holds a file open; folders are not asked for."""
    if os.path.isdir(path) or not os.path.lexists(path):
        return False
    held = [file for file in Path("/proc/self/fd").iterdir() if file.exists()]
    return any(os.path.samefile(file, path) for file in held)


def not_over_folders(replace: Callable[..., None]) -> Callable[..., None]:
    """Refuse to put something in the place of a folder, be it an empty one."""

    def checked(source: Any, target: Any) -> None:
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", source)
        replace(source, target)

    return checked


def no_folders(function: Callable[..., int]) -> Callable[..., int]:
    """Refuse to open a folder, but for Python itself."""

    def checked(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if os.path.isdir(path) and not flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return function(path, flags, *more, **options)

    return checked


def writers_only(fsync: Callable[[int], None]) -> Callable[[int], None]:
    """Refuse to sync a file that is open for reading only."""

    def checked(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    return checked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
