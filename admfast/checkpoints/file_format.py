"""Recognise the format of a file by its first bytes, without looking at its name."""

from __future__ import annotations

import json
import re
import struct

from admfast.errors import show_value

HEAD_BYTES = 512  # number of bytes that are examined
MAX_HEADER = 100_000_000  # largest safetensors header in bytes, the limit of the safetensors library

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
# Beginnings of pickles of protocols 0 and 1: torch.save's magic number, a dict or list, or a global name.
_EARLY_PICKLE = re.compile(rb"L\d+L\n\.|\([dl]p\d+\n|[}\]]q\0|c[\w.]+\n\w+\n(p\d+\n|q|\()")
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def detect_format(head: bytes, size: int) -> str:
    """Return the format of a weights file: "zip", "pickle" or "safetensors".

    Args:
        head: the first `HEAD_BYTES` bytes of the file.
        size: of the whole file, in bytes.

    Raises:
        ValueError: if it has none of these formats; the message says what the file is.
    """
    if size == 0:
        raise ValueError("the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"PK\x05\x06"):
        raise ValueError("an empty zip archive")
    for magic, description in _MAGIC.items():
        if head.startswith(magic):
            raise ValueError(description)
    if head[257:262] == b"ustar":
        raise ValueError("a tar archive: unpack it first, or save the weights anew with torch.save")
    if not head.strip(b"\0"):
        raise ValueError("damaged: it begins with zeros (a download that was not finished?)")
    if _EARLY_PICKLE.match(head):
        return "pickle"
    text = describe_text(head, size)
    if text is not None:
        raise ValueError(text)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if head[8:9] == b"{" and length <= MAX_HEADER or 2 <= length <= size - 8 and head[:1] != b"\x80":
        return "safetensors"
    if head[:1] != b"\x80":
        raise ValueError("damaged, or no file of torch.save or safetensors")
    return "pickle"


def _decode_text(head: bytes) -> str | None:
    """Return the first bytes of a file as text; None if they aren't text."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    for cut in range(4):  # the last character may be cut in two
        try:
            text = head[: len(head) - cut].decode(encoding).strip()
        except UnicodeDecodeError:
            continue
        return text if text and "".join(text.split()).isprintable() else None
    return None


def describe_text(head: bytes, size: int) -> str | None:
    """Return a description of a text (a web page, JSON, or other text); None if it isn't text."""
    text = _decode_text(head)
    if text is None:
        return None
    if text.startswith("version https://git-lfs"):
        return _MAGIC[b"version https://git-lfs"]
    first = show_value(text.splitlines()[0])
    if text.startswith("<"):
        return "a web page, not a weights file (a download that failed?)"
    if text.startswith(("{", "[")):
        kind = "a JSON document"
        if size < HEAD_BYTES:
            try:
                json.loads(text)
            except ValueError:
                kind = "the beginning of a JSON document"
        return f"{kind}, not a weights file (a download that failed?): {first}"
    return f"text, not a weights file (a download that failed?): {first}"
