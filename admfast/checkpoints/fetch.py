"""Download released weights when asked to: resumed after a break, checked, and put in place whole.

What has arrived is kept in `NAME.pt.part` (and the server's name for that version of the file in
`NAME.pt.part.etag`); the next fetch goes on from there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from admfast.checkpoints.differences import compare, fingerprint, network_shapes, shapes_of
from admfast.checkpoints.reading import read_weights
from admfast.errors import CheckpointError, InvalidArgument, OutputError, invalid
from admfast.files.atomic import lock, output_error, write_text
from admfast.models.presets import ModelPreset, preset

MIRROR = "ADMFAST_MIRROR"  # environment variable: base URL that takes the place of the published one
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched: where it lies, where it came from, its bytes, and what it was checked by."""

    path: Path
    url: str
    size: int
    checked: tuple[str, ...]


@dataclass
class _Offer:
    """What the server says of the whole file: bytes and MD5, as far as it says them."""

    size: int | None = None
    md5: str | None = None


class _Broken(Exception):
    """The connection ended before the file did."""


def fetch(
    name: str,
    folder: str | PathLike[str] = ".",
    *,
    base_url: str | None = None,
    overwrite: bool = False,
    timeout: float = 30.0,
    retries: int = 3,
    wait: float = 1.0,
    progress: bool = True,
) -> Fetched:
    """Download one released file into `folder`.

    Args:
        name: of the model or of its file, such as "64x64_diffusion" or "64x64_diffusion.pt".
        folder: an existing folder.
        base_url: URL of a folder that holds the released files under their names; None takes the environment
            variable ADMFAST_MIRROR, else the published place.
        overwrite: replace a file of that name; it stays until the new one has been checked.
        timeout: seconds without an answer or a byte.
        retries: how often a broken connection is taken up again.
        wait: seconds before the first of these, doubled each time.
        progress: show a bar on a terminal.

    Returns:
        The path, and what the file was checked by: its size (as published, or the length that the server
            gave), SHA-256 or MD5 where known, the checksums in the zip, and the model's keys and shapes.

    Raises:
        InvalidArgument: for an unknown name, one that ships with the package, or a base URL that isn't
            http(s).
        CheckpointError: if the server doesn't have the file or doesn't answer, the connection breaks too
            often (what has arrived is kept), or what arrived isn't the published file (it is discarded).
        OutputError: if the file is there already, the disk is full, or the folder can't be written.
    """
    if not timeout > 0:
        raise invalid("timeout", timeout, "seconds, more than 0")
    model = preset(name)
    if model.shipped:
        raise invalid("name", name, f"nothing to fetch: it ships with the package ({model.shipped_path})")
    url = _address(model, base_url)
    target = Path(folder) / model.file
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: is there already; overwrite it only if asked to")
    part = target.with_name(target.name + ".part")
    with _locked(part) as file:
        offer = _Offer(size=model.size, md5=model.md5)
        bar = tqdm(desc=model.file, unit="B", unit_scale=True, disable=None if progress else True)
        with bar:
            _receive(url, file, part, offer, timeout, retries, wait, bar)
        size = file.seek(0, os.SEEK_END)
        checked = _check(url, part, size, model, offer)
        try:
            os.fsync(file.fileno())
            os.replace(part, target)
        except OSError as error:
            raise output_error(target, error) from error
    _etag_file(part).unlink(missing_ok=True)
    return Fetched(target, url, size, checked)


def _address(model: ModelPreset, base_url: str | None) -> str:
    """The URL of a model's file."""
    base = base_url or os.environ.get(MIRROR)
    if not base:
        return str(model.url)
    if not base.lower().startswith(("http://", "https://")):
        raise invalid("base_url" if base_url else MIRROR, base, "a URL that begins with http:// or https://")
    return f"{base.rstrip('/')}/{model.file}"


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open the partial file at its end, for this process alone."""
    try:
        file = open(part, "ab")  # noqa: SIM115
    except OSError as error:
        raise output_error(part, error) from error
    with file:
        try:
            lock(file.fileno())
        except OSError:
            raise OutputError(f"{part}: another fetch is writing it") from None
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):
                if part.stat().st_size == 0:
                    _discard(part)


def _receive(
    url: str,
    file: BinaryIO,
    part: Path,
    offer: _Offer,
    timeout: float,
    retries: int,
    wait: float,
    bar: tqdm[object],
) -> None:
    """Receive the rest of the file, taking a broken connection up again."""
    for attempt in range(retries + 1):
        try:
            return _receive_once(url, file, part, offer, timeout, bar)
        except _Broken as broken:
            if attempt == retries:
                have = file.seek(0, os.SEEK_END)
                of = f" of {offer.size:,}" if offer.size else ""
                raise CheckpointError(
                    f"{url}: {broken}; {have:,}{of} bytes are kept in {part}: fetch again to go on from there"
                ) from None
            time.sleep(wait * 2**attempt)


def _receive_once(
    url: str, file: BinaryIO, part: Path, offer: _Offer, timeout: float, bar: tqdm[object]
) -> None:
    """One request: append what comes to the file, or begin it anew where the server can't go on."""
    have = file.seek(0, os.SEEK_END)
    response = _open(url, have, _read_etag(part), timeout, offer)
    if response is None:  # the file is complete, or longer than the server's
        if offer.size is not None and have > offer.size:
            _truncate(file, part)
            return _receive_once(url, file, part, offer, timeout, bar)
        return
    with response:
        if response.status != 206:
            _truncate(file, part)
            have = 0
        _note_offer(url, response, have, offer)
        _write_etag(part, response.headers.get("ETag") or "")
        bar.total, bar.n = offer.size, have
        bar.refresh()
        _check_room(part, offer, have)
        while True:
            try:
                # One read of the socket: `read` would throw what came away if the rest of its chunk does not.
                data = response.read1(_CHUNK)
            except TimeoutError:
                raise _Broken(f"no byte came for {timeout:g} s") from None
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(f"the connection broke ({type(error).__name__})") from None
            if not data:
                break
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                raise output_error(part, error) from error
            have += len(data)
            bar.update(len(data))
    if offer.size is not None and have < offer.size:
        raise _Broken("the connection ended early")


def _open(url: str, have: int, etag: str, timeout: float, offer: _Offer) -> http.client.HTTPResponse | None:
    """Ask for the file from byte `have` on; None where the server says that nothing is left."""
    headers = {"User-Agent": "admfast", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag:
            headers["If-Range"] = etag
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                whole = error.headers.get("Content-Range", "").rpartition("/")[2]
                _agree(url, int(whole) if whole.isdigit() else None, offer)
                return None
            if error.code >= 500 or error.code == 429:
                raise _Broken(f"the server answered {error.code} {error.reason}") from None
            if error.code == 404:
                raise CheckpointError(f"{url}: the server has no such file (404)") from None
            raise CheckpointError(f"{url}: the server answered {error.code} {error.reason}") from None
    except TimeoutError:
        raise _Broken(f"no answer within {timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _Broken(f"no answer within {timeout:g} s") from None
        raise CheckpointError(f"{url}: not reached: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({type(error).__name__})") from None
    except ValueError as error:
        raise InvalidArgument(f"{url}: not a URL: {error}") from None


def _note_offer(url: str, response: http.client.HTTPResponse, have: int, offer: _Offer) -> None:
    """Read size and MD5 of the whole file off the answer; refuse one that can't be the published file."""
    headers: Message = response.headers
    size: int | None = None
    if response.status == 206:
        span, _, whole = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(have):
            raise CheckpointError(f"{url}: asked for byte {have:,} on, the server sent {span or 'no range'}")
        size = int(whole) if whole.isdigit() else None
    elif headers.get("Content-Length", "").isdigit():
        size = int(headers["Content-Length"])
    _agree(url, size, offer)
    # Content-MD5 of a partial answer is that of the part; the other name is the release server's, of the
    # whole.
    encoded = headers.get("x-ms-blob-content-md5") or (
        headers.get("Content-MD5") if response.status == 200 else None
    )
    with contextlib.suppress(ValueError):
        digest = base64.b64decode(encoded or "", validate=True)
        if len(digest) == 16:
            offer.md5 = offer.md5 or digest.hex()


def _agree(url: str, size: int | None, offer: _Offer) -> None:
    """Take the server's size for the file's, unless another one is known."""
    if size is not None and offer.size is not None and size != offer.size:
        raise CheckpointError(f"{url}: the server's file has {size:,} bytes, {offer.size:,} are due")
    offer.size = offer.size if size is None else size


def _check_room(part: Path, offer: _Offer, have: int) -> None:
    """Refuse a download that can't fit, before its first byte."""
    missing = (offer.size or 0) - have
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise OutputError(f"{part}: not written: {missing:,} bytes are still to come, the disk has {free:,}")


def _check(url: str, part: Path, size: int, model: ModelPreset, offer: _Offer) -> tuple[str, ...]:
    """Compare the file that arrived with what is known of it; discard it if it differs."""
    by = []
    if offer.size is not None:
        by.append("size" if model.size is not None else "the server's own length")
        if size != offer.size:
            _discard(part)
            raise CheckpointError(f"{url}: {size:,} bytes arrived, {offer.size:,} were due; discarded")
    for name, wanted in (("sha256", model.sha256), ("md5", offer.md5)):
        # Nothing is gained by the weaker hash where the stronger one has been compared.
        if wanted is None or "sha256" in by:
            continue
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, name).hexdigest()
        if found != wanted:
            _discard(part)
            raise CheckpointError(
                f"{url}: not the published file: its {name} is {found}, not {wanted}; discarded, fetch again"
            )
        by.append(name)
    try:
        shapes = shapes_of(read_weights(part).tensors)
    except CheckpointError as error:
        _discard(part)
        raise CheckpointError(f"{url}: {str(error).removeprefix(f'{part}: ')}; discarded") from None
    if zipfile.is_zipfile(part):  # the older format of torch.save has none
        by.append("zip checksums")
    if fingerprint(shapes) != model.fingerprint:
        differs = compare(shapes, network_shapes(model.config)).summary(1)
        _discard(part)
        raise CheckpointError(f"{url}: not {model.name}: {differs}; discarded")
    return (*by, "keys and shapes")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_file(part).unlink(missing_ok=True)


def _truncate(file: BinaryIO, part: Path) -> None:
    """Begin the partial file anew."""
    try:
        file.truncate(0)
    except OSError as error:
        raise output_error(part, error) from error


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _write_etag(part: Path, etag: str) -> None:
    """Note the version that the part belongs to; a weak name ("W/...") doesn't promise equal bytes."""
    if etag and not etag.startswith("W/"):
        write_text(_etag_file(part), etag)
    else:
        _etag_file(part).unlink(missing_ok=True)


def _read_etag(part: Path) -> str:
    """The server's name for the version of the file that the part belongs to; empty if it gave none."""
    try:
        return _etag_file(part).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
