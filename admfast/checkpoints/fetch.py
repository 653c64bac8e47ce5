"""Download the weights of released models, and check that they fit."""

from __future__ import annotations

import zipfile
from functools import partial
from os import PathLike
from pathlib import Path

from admfast.checkpoints.differences import compare, fingerprint, network_shapes, shapes_of
from admfast.checkpoints.reading import read_weights
from admfast.errors import CheckpointError, invalid
from admfast.files.download import FetchedFile, RemoteFile, download
from admfast.files.paths import user_path
from admfast.models.presets import ModelPreset, preset


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
) -> FetchedFile:
    """Download one released file into `folder`.

    Args:
        name: name of the model or of its file, such as "64x64_diffusion" or "64x64_diffusion.pt".
        folder: an existing folder.
        base_url: URL of a folder that holds the released files under their names; None takes the environment
            variable ADMFAST_MIRROR, or the published URL if it is not set.
        overwrite, timeout, retries, wait, progress: see `admfast.files.download.download`.

    Returns:
        The file and the checks that it passed: its size (as published, or as given by the server), SHA-256 or
            MD5 if known, the checksums in the zip, and the model's keys and shapes.

    Raises:
        InvalidArgument: for an unknown name, a model that ships with the package, a base URL that isn't
            http(s), or a timeout that isn't positive.
        CheckpointError: if the server lacks the file or doesn't answer, if the connection breaks too often
            (the unfinished download is kept), or if the file isn't the published one (it is discarded).
        OutputError: if the file exists already, the disk is full, the folder can't be written, or another
            process is downloading the file.
    """
    model = preset(name)
    if model.url is None:
        raise invalid("name", name, f"nothing to fetch: it ships with the package ({model.shipped_path})")
    remote = RemoteFile(model.url, model.size, model.sha256, model.md5).mirrored(base_url)
    return download(
        remote,
        user_path("folder", folder) / model.file,
        partial(_check_model, model),
        overwrite=overwrite,
        timeout=timeout,
        retries=retries,
        wait=wait,
        progress=progress,
    )


def _check_model(model: ModelPreset, path: Path) -> tuple[str, ...]:
    """Check that a file holds the weights of a model; return the names of the checks."""
    shapes = shapes_of(read_weights(path, values=False).tensors)
    if fingerprint(shapes) != model.fingerprint:
        differences = compare(shapes, network_shapes(model.config)).summary(1)
        raise CheckpointError(f"not {model.name}: {differences}")
    # The older format of torch.save has no checksums.
    return ("zip checksums", "keys and shapes") if zipfile.is_zipfile(path) else ("keys and shapes",)
