"""Stand-in for `blobfile` that opens local paths only; the real package comes first if it is installed."""

from os import listdir
from os.path import basename, dirname, exists, isdir, join
from typing import IO, Any

__all__ = ["BlobFile", "basename", "dirname", "exists", "isdir", "join", "listdir"]


def BlobFile(path: str, mode: str = "r", **_: Any) -> IO[Any]:
    """Open a local file. Raises: ValueError for a remote path."""
    if "://" in path:
        raise ValueError(f"path={path!r}: a local path; remote ones need the package blobfile")
    return open(path, mode)
