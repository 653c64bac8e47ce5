"""Write a file whole or not at all: a temporary name in the same folder, fsync, rename.

A failed write raises `OutputError` in one line with the path and the reason, removes its temporary file, and
doesn't change an older file at the path. A process that is killed can leave a file or folder `.NAME.*.tmp`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO, cast

from admfast.errors import OutputError
from admfast.interrupts import declare_writing, delay_signals

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the largest size allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "writing there is not permitted",
    errno.ENAMETOOLONG: "the file name is too long",
}
# Errors that come from the path being written, even if they name no file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def output_error(path: str | PathLike[str], error: OSError) -> OutputError:
    """Return the error `PATH: not written: REASON` for an error of the operating system."""
    folder = Path(path).parent
    if error.errno == errno.ENOENT:
        reason = (
            f"the folder {folder} does not exist"
            if not folder.is_dir()
            else "the file system made no file there"
        )
    elif error.errno == errno.ENOTDIR:
        reason = f"{folder} is not a folder"
    elif error.errno == errno.EEXIST:
        link = _find_dangling_link(path)
        reason = "it is a file, not a folder"
        if link is not None:
            reason = f"{link} is a link to {os.readlink(link)}, which does not exist"
    else:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"{path}: not written: {reason}")


def _find_dangling_link(path: str | PathLike[str]) -> Path | None:
    """Return the first link without a target among a path and its parent folders, or None."""
    parts = (Path(path), *Path(path).parents)
    return next((part for part in parts if part.is_symlink() and not part.exists()), None)


@contextlib.contextmanager
def atomic_open(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` when the block ends without an exception.

    The file supports seek (`np.savez`, `torch.save` and Pillow accept it). Its mode follows the umask.

    Raises:
        OutputError: if it can't be written whole; other exceptions of the block pass unchanged. In both cases
            `path` is unchanged.
    """
    with _temporary_file(path) as (descriptor, temporary):
        raw = _RecordingFile(descriptor, "wb")
        file = io.BufferedWriter(raw)
        try:
            yield cast(BinaryIO, file)
        except BaseException:
            # Closing flushes the rest, which fails again for the reason that is being reported.
            with contextlib.suppress(OSError):
                file.close()
            if raw.error is not None:
                raise output_error(path, raw.error) from raw.error
            raise
        try:
            file.flush()
            if raw.error is not None:  # a failed write that the block ignored
                raise raw.error
            os.fsync(raw.fileno())
            file.close()
        except OSError as error:
            with contextlib.suppress(OSError):
                file.close()
            raise output_error(path, error) from error
        _rename(temporary, path)


@contextlib.contextmanager
def atomic_path(path: str | PathLike[str]) -> Iterator[Path]:
    """Like `atomic_open`, for a writer that needs a path: yield the temporary path to write to."""
    with _temporary_file(path) as (descriptor, temporary):
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield temporary
        except OSError as error:
            is_temporary = error.filename is not None and Path(os.fsdecode(error.filename)) == temporary
            if isinstance(error, OutputError) or not (is_temporary or error.errno in _DISK_ERRORS):
                raise
            raise output_error(path, error) from error
        try:
            # Windows can't sync a file that is open for reading only.
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # Some writers (safetensors) replace the file by one that only its owner can read.
            temporary.chmod(mode)
        except OSError as error:
            raise output_error(path, error) from error
        _rename(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_path`, for the files of a folder: yield a new folder next to `path` for the block to fill.

    If `path` is missing or empty, the new folder replaces it. Otherwise, when all files are written, they are
    moved into `path` one by one; other files in it are not touched.

    Raises:
        OutputError: if they can't all be written; `path` is then unchanged, unless a later one of these moves
            failed.
    """
    with folder_removed_if_empty(path.parent):
        temporary = _temporary_path(path)
        try:
            temporary.mkdir()
        except OSError as error:
            raise output_error(path, error) from error
        try:
            yield temporary
            with delay_signals():
                _move_files(temporary, path)
        except OutputError as error:
            raise OutputError(str(error).replace(str(temporary), str(path))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_files(temporary: Path, folder: Path) -> None:
    """Move the files of a finished folder into another."""
    if not folder.is_dir() or not any(folder.iterdir()):
        if sys.platform == "win32" and folder.is_dir():  # there, a rename can't replace a folder
            with contextlib.suppress(OSError):  # the rename then fails too, and reports it
                folder.rmdir()
        return _rename(temporary, folder)
    for file in (file for file in temporary.rglob("*") if file.is_file()):
        target = folder / file.relative_to(temporary)
        make_folder(target.parent)
        _rename(file, target)


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises OutputError."""
    with atomic_open(path) as file:
        file.write(data)


def write_new(path: Path, data: bytes) -> bool:
    """Write `data` to `path` whole, unless it exists; return whether it was written.

    If several processes try, one succeeds. Raises OutputError.
    """
    with _temporary_file(path) as (descriptor, temporary):
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                with open(path, "xb") as file:
                    file.write(data)
            sync_folder(path.parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise output_error(path, error) from error
    return True


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8, line endings unchanged, whole or not at all. Raises OutputError."""
    write_bytes(path, text.encode())


def check_writable(path: str | PathLike[str]) -> None:
    """Raise OutputError if a file at `path` can't be written; change nothing and leave nothing behind.

    Call it before long work whose result goes there.
    """
    with _temporary_file(path) as (descriptor, _):
        os.close(descriptor)


def check_not_existing(name: str, paths: Iterable[Path]) -> None:
    """Raise OutputError if one of the paths of the argument `name` exists."""
    for path in paths:
        if os.path.lexists(path):
            raise OutputError(f"{name}={str(path)!r}: exists already; give another path, or --overwrite")


def check_folder(path: str | PathLike[str]) -> None:
    """Make the folder `path` if it is missing; raise OutputError if no file can be written into it."""
    declare_writing()
    try:
        Path(path).mkdir(exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    check_writable(Path(path) / "file")


def check_folder_path(folder: Path) -> None:
    """Raise OutputError if `folder` or one of its parents is a file; make nothing."""
    existing = next((part for part in (folder, *folder.parents) if os.path.lexists(part)), None)
    if existing is not None and not existing.is_dir():
        raise output_error(existing, FileExistsError(errno.EEXIST, "")) from None


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises OutputError."""
    declare_writing()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None


@contextlib.contextmanager
def folder_removed_if_empty(folder: Path) -> Iterator[None]:
    """Make a folder and its parents for a block; afterwards remove those it made that are empty.

    Raises OutputError.
    """
    missing = [part for part in (folder, *folder.parents) if not os.path.lexists(part)]
    try:
        make_folder(folder)
        yield
    finally:
        for part in missing:
            with contextlib.suppress(OSError):  # it isn't empty, or was not made
                part.rmdir()


class _RecordingFile(io.FileIO):
    """A raw file that remembers its first failed write, for writers that raise their own error instead."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.error = self.error or error
            raise


@contextlib.contextmanager
def _temporary_file(path: str | PathLike[str]) -> Iterator[tuple[int, Path]]:
    """Create an empty temporary file next to `path`; yield its descriptor and path; remove it at the end."""
    target = Path(path)
    # A rename would replace a device such as /dev/null, and for a folder it would fail only at the end.
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(
            f"{path}: not written: it is a {'folder' if target.is_dir() else 'device'}, not a file"
        )
    declare_writing()
    temporary = _temporary_path(target)
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        yield descriptor, temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    """Return an unused path next to `path`."""
    return path.parent / f".{path.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _rename(temporary: Path, path: str | PathLike[str]) -> None:
    """Rename the finished file or folder to `path`, and sync the folder so that the new name lasts."""
    try:
        # If `path` is a link, the file it points to is replaced, not the link.
        os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        raise output_error(path, error) from error
    sync_folder(Path(path).parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder so that the names in it last, where the system can open and sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
