"""Locks between processes: a locked file, and the lock file of a folder."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from admfast.errors import OutputError
from admfast.files.atomic import output_error

LOCK = ".lock"
_LOCKED_BYTE = 2**31 - 2  # the second to last byte that `msvcrt.locking` can lock


@contextlib.contextmanager
def folder_locked(
    folder: Path, activity: str, keeps_file: Callable[[], bool] = lambda: False, required: bool = True
) -> Iterator[None]:
    """Hold the lock of a folder within the block: a locked file in it, which is removed at the end.

    activity: what another process does that holds the lock, for the error. keeps_file: called at the end;
    True leaves the file. required: False goes on without a lock where files can't be locked.
    Raises: OutputError if another process holds the lock, or if the file can't be made or locked.
    """
    path = folder / LOCK
    removes = not os.path.lexists(path)
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise output_error(path, error) from None
    with file:
        try:
            try:
                lock(file.fileno())
                # The process that made it may have removed it since: a removed file locks no one out.
                in_use = os.fstat(file.fileno()).st_nlink == 0
            except BlockingIOError:
                in_use = True
            except OSError as error:
                if required:
                    raise output_error(path, error) from None
                in_use = False
            removes = not in_use
            if in_use:
                raise OutputError(f"out={str(folder)!r}: another process is {activity} in this folder")
            yield
        finally:
            close_on_windows(file)
            if removes and not keeps_file():
                with contextlib.suppress(OSError):  # on Windows another process may have opened it
                    path.unlink()


def lock(descriptor: int) -> None:
    """Lock a file, until it is closed, against other processes that lock it.

    Raises BlockingIOError if another process holds the lock, another OSError if the file can't be locked.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_byte(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def close_on_windows(file: BinaryIO) -> None:
    """Close a file, and so release its lock, on Windows, which can't move or remove an open file."""
    if sys.platform == "win32":
        file.close()


def _lock_byte(descriptor: int) -> None:
    """Lock one byte of a file on Windows, past the end of most files, as others can't read a locked byte."""
    try:
        msvcrt = importlib.import_module("msvcrt")
    except ImportError:
        raise OSError(errno.ENOLCK, "this Python can't lock files") from None
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(errno.EAGAIN, "another process has locked it") from error
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
