"""Download a file: resume broken downloads, verify size and hash, and put it in place atomically.

An unfinished download is kept in `NAME.part`, and its ETag in `NAME.part.etag`. The next download resumes it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from admfast.errors import CheckpointError, InvalidArgument, OutputError, invalid
from admfast.files.atomic import output_error, write_text
from admfast.files.locks import close_on_windows, lock

MIRROR = "ADMFAST_MIRROR"  # environment variable: base URL that replaces the published one
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """Published file: its URL, its size in bytes, and its hashes in hexadecimal; None if unknown."""

    url: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None

    def mirrored(self, base_url: str | None) -> RemoteFile:
        """Return the file as a mirror has it, under the same name.

        base_url: URL of the folder of the mirror; None takes the environment variable ADMFAST_MIRROR, or the
        published URL if it is not set.

        Raises InvalidArgument for a base URL that isn't http(s).
        """
        base = base_url or os.environ.get(MIRROR)
        if not base:
            return self
        if not base.lower().startswith(("http://", "https://")):
            raise invalid(
                "base_url" if base_url else MIRROR, base, "a URL that begins with http:// or https://"
            )
        return dataclasses.replace(self, url=f"{base.rstrip('/')}/{self.url.rpartition('/')[2]}")


@dataclass(frozen=True)
class FetchedFile:
    """Downloaded file: its path, its URL, its size in bytes, and the names of the checks that it passed."""

    path: Path
    url: str
    size: int
    checked: tuple[str, ...]


class _ConnectionBroken(Exception):
    """The connection failed before the whole file had arrived."""


def _no_check(path: Path) -> tuple[str, ...]:
    return ()


def download(
    remote: RemoteFile,
    target: Path,
    check: Callable[[Path], tuple[str, ...]] = _no_check,
    *,
    overwrite: bool = False,
    timeout: float = 30.0,
    retries: int = 3,
    wait: float = 1.0,
    progress: bool = True,
) -> FetchedFile:
    """Download a file to `target`, in an existing folder.

    Args:
        check: called with the path of the complete file, which has a temporary name. It returns the names of
            the checks that the file passed, or raises CheckpointError.
        overwrite: replace an existing file. It is kept until the new one has passed its checks.
        timeout: seconds to wait for an answer or for the next byte.
        retries: number of times to reconnect after a broken connection.
        wait: seconds before the first reconnection, doubled each time.
        progress: show a progress bar, if the output is a terminal.

    Returns:
        The file and the checks that it passed: its size (as published, or as given by the server), SHA-256 or
            MD5 if known, and those of `check`.

    Raises:
        InvalidArgument: for a URL that is none, or a timeout that isn't positive.
        CheckpointError: if the server lacks the file or doesn't answer, if the connection breaks too often
            (the unfinished download is kept), or if the file isn't the published one (it is discarded).
        OutputError: if the file exists already, the disk is full, the folder can't be written, or another
            process is downloading the file.
    """
    if not timeout > 0:
        raise invalid("timeout", timeout, "seconds, more than 0")
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; overwrite=True (--overwrite) replaces it")
    part = target.with_name(target.name + ".part")
    with _locked(part) as file:
        with tqdm(desc=target.name, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            transfer = _Transfer(remote.url, file, part, timeout, bar, remote.size, remote.md5)
            transfer.receive(retries, wait)
        size = file.seek(0, os.SEEK_END)
        try:
            os.fsync(file.fileno())
            close_on_windows(file)  # before the check: Windows doesn't let it read a locked byte
            checked = _check_download(transfer, size, remote, check)
            os.replace(part, target)
        except OSError as error:
            raise output_error(target, error) from error
    _etag_file(part).unlink(missing_ok=True)
    return FetchedFile(target, remote.url, size, checked)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open the partial file for appending, and lock it for this process."""
    try:
        file = open(part, "ab")  # noqa: SIM115
    except OSError as error:
        raise output_error(part, error) from error
    with file, contextlib.ExitStack() as cleanup:
        cleanup.callback(_unlock_partial, file, part)
        try:
            lock(file.fileno())
        except BlockingIOError:
            cleanup.pop_all()  # the partial file belongs to the other fetch
            raise OutputError(f"{part}: another fetch is writing it") from None
        except OSError as error:
            raise output_error(part, error) from None
        yield file


def _unlock_partial(file: BinaryIO, part: Path) -> None:
    """Unlock the partial file; remove it if it is empty."""
    close_on_windows(file)
    with contextlib.suppress(OSError):
        if part.stat().st_size == 0:
            _discard(part)


@dataclass
class _Transfer:
    """Download from a URL into a file. size, md5: of the whole file, None while unknown."""

    url: str
    file: BinaryIO
    part: Path
    timeout: float
    bar: tqdm[object]
    size: int | None
    md5: str | None

    def receive(self, retries: int, wait: float) -> None:
        """Receive the rest of the file; reconnect after a broken connection."""
        for attempt in range(retries + 1):
            try:
                return self._receive_once()
            except _ConnectionBroken as broken:
                if attempt == retries:
                    num_received = self.file.seek(0, os.SEEK_END)
                    total = f" of {self.size:,}" if self.size else ""
                    progress = f"{num_received:,}{total} bytes are kept in {self.part}"
                    raise CheckpointError(
                        f"{self.url}: {broken}; {progress}: fetch again to continue"
                    ) from None
                time.sleep(wait * 2**attempt)

    def _receive_once(self) -> None:
        """Make one request and append its data to the file; start over if the server can't resume."""
        num_received = self.file.seek(0, os.SEEK_END)
        response = self._request(num_received)
        if response is None:  # the file is complete, or longer than the server's
            if self.size is not None and num_received > self.size:
                self._truncate()
                return self._receive_once()
            return
        with response:
            if response.status != 206:
                self._truncate()
                num_received = 0
            self._read_headers(response, num_received)
            _write_etag(self.part, response.headers.get("ETag") or "")
            self.bar.total, self.bar.n = self.size, num_received
            self.bar.refresh()
            self._check_disk_space(num_received)
            while data := self._read(response):
                try:
                    self.file.write(data)
                    self.file.flush()
                except OSError as error:
                    raise output_error(self.part, error) from error
                num_received += len(data)
                self.bar.update(len(data))
        if self.size is not None and num_received < self.size:
            raise _ConnectionBroken("the connection ended early")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """Read from the socket once: `read` would lose the data of a chunk that doesn't arrive completely."""
        try:
            return response.read1(_CHUNK)
        except TimeoutError:
            raise _ConnectionBroken(f"no byte came for {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _ConnectionBroken(f"the connection broke ({type(error).__name__})") from None

    def _request(self, num_received: int) -> http.client.HTTPResponse | None:
        """Request the file from byte `num_received` on; return None if no byte is left."""
        headers = {"User-Agent": "admfast", "Accept-Encoding": "identity"}
        if num_received:
            headers["Range"] = f"bytes={num_received}-"
            if etag := _read_etag(self.part):
                headers["If-Range"] = etag
        url = self.url
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                self._handle_http_error(error, num_received)
            return None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _ConnectionBroken(f"no answer within {self.timeout:g} s") from None
            raise CheckpointError(f"{url}: not reached: {error.reason}") from None
        except TimeoutError:
            raise _ConnectionBroken(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _ConnectionBroken(f"the connection broke ({type(error).__name__})") from None
        except ValueError as error:
            raise InvalidArgument(f"{url}: not a URL: {error}") from None

    def _handle_http_error(self, error: urllib.error.HTTPError, num_received: int) -> None:
        """Return if the server has no more bytes to send; raise an error for any other HTTP error."""
        if error.code == 416 and num_received:
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            return self._set_size(int(total) if total.isdigit() else None)
        message = f"the server answered {error.code} {error.reason}"
        if error.code >= 500 or error.code == 429:
            raise _ConnectionBroken(message) from None
        if error.code == 404:
            message = "the server has no such file (404)"
        raise CheckpointError(f"{self.url}: {message}") from None

    def _read_headers(self, response: http.client.HTTPResponse, num_received: int) -> None:
        """Read the whole file's size and MD5 from the headers; reject a wrong range or size."""
        headers: Message = response.headers
        total = headers.get("Content-Length", "")
        if response.status == 206:
            span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if span.partition("-")[0] != str(num_received):
                sent = span or "no range"
                raise CheckpointError(
                    f"{self.url}: asked for byte {num_received:,} on, the server sent {sent}"
                )
        self._set_size(int(total) if total.isdigit() else None)
        # Content-MD5 of a partial answer is that of the part. The release server's own header is that of the
        # whole file.
        content_md5 = headers.get("Content-MD5") if response.status == 200 else None
        with contextlib.suppress(ValueError):
            digest = base64.b64decode(
                headers.get("x-ms-blob-content-md5") or content_md5 or "", validate=True
            )
            if len(digest) == 16:
                self.md5 = self.md5 or digest.hex()

    def _set_size(self, size: int | None) -> None:
        """Take the size that the server gives; reject it if another size is known."""
        if size is not None and self.size is not None and size != self.size:
            raise CheckpointError(f"{self.url}: the server's file has {size:,} bytes, {self.size:,} are due")
        self.size = self.size if size is None else size

    def _check_disk_space(self, num_received: int) -> None:
        """Reject a download that doesn't fit onto the disk, before its first byte."""
        missing, free = (self.size or 0) - num_received, shutil.disk_usage(self.part.parent).free
        if missing > free:
            rest = f"{missing:,} bytes are still to come, the disk has {free:,}"
            raise OutputError(f"{self.part}: not written: {rest}")

    def _truncate(self) -> None:
        """Empty the partial file."""
        try:
            self.file.truncate(0)
        except OSError as error:
            raise output_error(self.part, error) from error


def _check_download(
    transfer: _Transfer, size: int, remote: RemoteFile, check: Callable[[Path], tuple[str, ...]]
) -> tuple[str, ...]:
    """Check that the download is the published file, else discard it; return the names of the checks."""
    part, checks = transfer.part, []
    try:
        if transfer.size is not None:
            checks.append("size" if remote.size is not None else "the server's own length")
            if size != transfer.size:
                raise CheckpointError(f"{size:,} bytes arrived, {transfer.size:,} were due")
        # MD5 adds nothing if SHA-256 is compared.
        name, expected = ("sha256", remote.sha256) if remote.sha256 else ("md5", transfer.md5)
        if expected is not None:
            with open(part, "rb") as file:
                actual = hashlib.file_digest(file, name).hexdigest()
            if actual != expected:
                raise CheckpointError(f"not the published file: its {name} is {actual}, not {expected}")
            checks.append(name)
        return (*checks, *check(part))
    except CheckpointError as error:
        _discard(part)
        message = str(error).removeprefix(f"{part}: ")
        raise CheckpointError(f"{transfer.url}: {message}; discarded") from None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_file(part).unlink(missing_ok=True)


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _write_etag(part: Path, etag: str) -> None:
    """Store the ETag of the partial file; skip a weak one ("W/..."), which doesn't promise equal bytes."""
    if etag and not etag.startswith("W/"):
        write_text(_etag_file(part), etag)
    else:
        _etag_file(part).unlink(missing_ok=True)


def _read_etag(part: Path) -> str:
    """Return the stored ETag of the partial file, or "" if there is none."""
    try:
        return _etag_file(part).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
