"""Run commands of `admfast` as on another machine.

`python -m tests.tools.elsewhere MACHINE COMMAND [-- COMMAND ...]`: MACHINE is "windows", "macos" or names of
modules that can't be imported, separated by commas. The exit status is that of the first command that fails.
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
LINUX_MODULES = ["triton", "xformers", "admfast._C"]  # the extension is missing if nobody compiled it
# Modules that check the system when they are imported, and would look for another system's libraries.
OTHERS = [
    "PIL.Image", "PIL.PngImagePlugin", "safetensors.torch", "torch._subclasses.fake_tensor",
    "torch.nn.parallel", "torch.utils.data", "torch.utils.flop_counter", "tqdm", "typer",
]  # fmt: skip
MEMORY, PEAK = 64 << 30, 3 << 30


def main(arguments: list[str]) -> int:
    """Imitate the machine, then run the commands one after another."""
    machine, *words = arguments
    {"windows": become_windows, "macos": become_macos}.get(machine, lambda: hide(machine.split(",")))()
    from admfast.cli.main import main as admfast

    for is_end, command in itertools.groupby(words, "--".__eq__):
        if not is_end and (status := admfast(list(command))):
            return status
    return 0


def become_macos() -> None:
    """Remove names and modules that macOS lacks."""
    load_others()
    remove(NOT_ON_MACOS)
    hide(LINUX_MODULES)
    sys.platform = "darwin"


def become_windows() -> None:
    """Remove names and modules that Windows lacks, and install its rules."""
    load_others()
    remove(NOT_ON_WINDOWS)
    hide([*UNIX_MODULES, *LINUX_MODULES])
    sys.modules["msvcrt"] = MSVCRT  # type: ignore[assignment]
    for place, name, value in windows_rules():
        setattr(place, name, value)


def hide(modules: list[str]) -> None:
    """Make the import of modules fail as if they were not installed."""
    for name in modules:
        sys.modules[name] = None  # type: ignore[assignment]


def load_others() -> None:
    """Import OTHERS before the system changes, and start processes by spawn, as macOS and Windows do."""
    for name in OTHERS:
        importlib.import_module(name)
    sysconfig.get_config_vars()
    multiprocessing.set_start_method("spawn")


def remove(names: list[tuple[Any, str]]) -> None:
    """Remove names from modules, if they exist."""
    for module, gone in names:
        for name in gone.split():
            vars(module).pop(name, None)


def windows_rules() -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, value) of every name that has another value on Windows."""
    yield sys, "platform", "win32"
    yield ctypes, "windll", SimpleNamespace(kernel32=KERNEL32)
    for name in ("rename", "unlink", "remove"):
        yield os, name, refusing_open_files(getattr(os, name))
    yield os, "replace", not_over_folders(refusing_open_files(os.replace))
    yield shutil, "_use_fd_functions", False  # these functions open folders
    yield os, "open", no_folders(os.open)
    yield os, "fsync", writers_only(os.fsync)


def locking(descriptor: int, mode: int, count: int) -> None:
    """Lock `count` bytes at the file's position like msvcrt. The position must fit into 32 bits."""
    assert mode == MSVCRT.LK_NBLCK and os.lseek(descriptor, 0, os.SEEK_CUR) < 2**31
    # The lock belongs to the open file, not to the process, so the process can't lock the file twice.
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_CUR, 0, count, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except OSError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def memory_status(status: Any) -> int:
    """Fill MEMORYSTATUSEX, whose second 8 bytes are the machine's memory."""
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
    """Tell whether this process holds a file open; always False for folders."""
    if os.path.isdir(path) or not os.path.lexists(path):
        return False
    held = [file for file in Path("/proc/self/fd").iterdir() if file.exists()]
    return any(os.path.samefile(file, path) for file in held)


def not_over_folders(replace: Callable[..., None]) -> Callable[..., None]:
    """Refuse to replace a folder, even an empty one."""

    def checked(source: Any, target: Any) -> None:
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", source)
        replace(source, target)

    return checked


def no_folders(function: Callable[..., int]) -> Callable[..., int]:
    """Refuse to open a folder without O_DIRECTORY, which only Python itself uses."""

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
