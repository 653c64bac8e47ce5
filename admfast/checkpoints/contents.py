"""Tell what a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import json
import re
import struct

from admfast.errors import shown

HEAD = 512  # bytes that are looked at
MAX_HEADER = 100_000_000  # bytes of a safetensors header, as its authors limit it

_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ\0": "an xz archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!\x1a\x07": "a rar archive: unpack it first",
    b"\x89HDF\r\n": "an HDF5 file, not weights of PyTorch",
    b"\x93NUMPY": "a NumPy array, not a state dict",
    b"GGUF": "a GGUF file, not weights of PyTorch",
    b"\x89PNG": "a PNG image, not a weights file",
    b"\xff\xd8\xff": "a JPEG image, not a weights file",
    b"%PDF": "a PDF document, not a weights file",
}
# How protocols 0 and 1 of pickle begin: a number (as torch.save's magic one), a dict or list, or a name.
_EARLY_PICKLE = re.compile(rb"L\d+L\n\.|\([dl]p\d+\n|[}\]]q\0|c[\w.]+\n\w+\n(p\d+\n|q|\()")
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def kind_of(head: bytes, size: int) -> str:
    """Return "zip", "pickle" or "safetensors": the formats that are read by their content.

    Args:
        head: the first `HEAD` bytes of the file.
        size: of the whole file, in bytes.

    Raises:
        ValueError: what the file is instead, in words.
    """
    if size == 0:
        raise ValueError("the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"PK\x05\x06"):
        raise ValueError("an empty zip archive")
    for magic, words in _MAGIC.items():
        if head.startswith(magic):
            raise ValueError(words)
    if head[257:262] == b"ustar":
        raise ValueError("a tar archive: unpack it first, or save the weights anew with torch.save")
    if not head.strip(b"\0"):
        raise ValueError("damaged: it begins with zeros (a download that was not finished?)")
    if _EARLY_PICKLE.match(head):
        return "pickle"
    text = words_for_text(head, size)
    if text is not None:
        raise ValueError(text)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if head[8:9] == b"{" and length <= MAX_HEADER or 2 <= length <= size - 8 and head[:1] != b"\x80":
        return "safetensors"
    if head[:1] != b"\x80":
        raise ValueError("damaged, or no file of torch.save or safetensors")
    return "pickle"


def _as_text(head: bytes) -> str | None:
    """Return the beginning of a text; None for what isn't one."""
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
    for cut in range(4):  # the last character may be cut in two
        try:
            text = head[: len(head) - cut].decode(encoding).strip()
        except UnicodeDecodeError:
            continue
        return text if text and "".join(text.split()).isprintable() else None
    return None


def words_for_text(head: bytes, size: int) -> str | None:
    """Return what a text is: a page, an answer in JSON, or a line; None for what isn't text."""
    text = _as_text(head)
    if text is None:
        return None
    if text.startswith("version https://git-lfs"):
        return _MAGIC[b"version https://git-lfs"]
    first = shown(text.splitlines()[0])
    if text.startswith("<"):
        return "a web page, not a weights file (a download that failed?)"
    if text.startswith(("{", "[")):
        whole = "a JSON document"
        if size < HEAD:
            try:
                json.loads(text)
            except ValueError:
                whole = "the beginning of a JSON document"
        return f"{whole}, not a weights file (a download that failed?): {first}"
    return f"text, not a weights file (a download that failed?): {first}"
