"""`admfast fetch NAME`: download released weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admfast.checkpoints import fetch
from admfast.cli.commands import UsageProblem
from admfast.errors import OutputError, allowed_names, invalid
from admfast.evaluation.published_weights import PUBLISHED_WEIGHTS
from admfast.files.atomic import folder_removed_if_empty
from admfast.files.download import RemoteFile, download
from admfast.files.paths import user_path
from admfast.models.presets import MODELS, SYSTEMS, ModelPreset


def run_fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Systems (all their files), models or file names, see `admfast models`; "
            f"or weights for `admfast evaluate`: {', '.join(PUBLISHED_WEIGHTS)}."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files; made if it is missing.")] = Path("models"),
    base_url: Annotated[
        str | None,
        typer.Option(
            help="URL of a folder with the released files (default: $ADMFAST_MIRROR, else as published)."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files (default: keep them).")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer or the next data.")] = 30.0,
    retries: Annotated[
        int, typer.Option(min=0, help="Times to resume the download after a broken connection.")
    ] = 3,
) -> None:
    """Download released weights, resume broken downloads, and check sizes and hashes that are known."""
    if not names:
        raise UsageProblem(f"Missing argument 'NAMES...': {allowed_names('', _known_names())}.")
    files, out = resolve_names(names), user_path("out", out)
    with folder_removed_if_empty(out):
        for place, file in files.items():
            path = out / place
            if path.exists() and not overwrite:
                _accept_existing(path, file.size)
                continue
            if isinstance(file, ModelPreset):
                result = fetch(
                    file.name, out, base_url=base_url, overwrite=overwrite, timeout=timeout, retries=retries
                )
            else:
                remote = file.mirrored(base_url)
                with folder_removed_if_empty(path.parent):
                    result = download(remote, path, overwrite=overwrite, timeout=timeout, retries=retries)
            checked_by = ", ".join(result.checked) or "nothing, as no size or hash is known"
            print(f"{result.path.resolve()}: {result.size:,} bytes, checked by {checked_by}")


def resolve_names(names: list[str]) -> dict[str, ModelPreset | RemoteFile]:
    """Resolve names of systems, models, files and feature networks to files, each once, in order.

    Returns:
        The files by their paths in the folder of weights.

    Raises:
        InvalidArgument: for an unknown name (the error names the nearest), or a model that ships with the
            package.
    """
    files: dict[str, ModelPreset | RemoteFile] = {}
    for name in names:
        if name in PUBLISHED_WEIGHTS:
            files |= PUBLISHED_WEIGHTS[name]
            continue
        if name in SYSTEMS:
            models = SYSTEMS[name].models
        else:
            model = MODELS.get(name) or MODELS.get(name.removesuffix(".pt"))
            if model is None:
                allowed = allowed_names(name, _known_names())
                raise invalid("names", name, f"no such system, model or feature network; {allowed}")
            models = (model,)
        for model in models:
            if model.shipped:
                raise invalid("names", name, f"nothing to fetch: {model.name} ships with the package")
            files[model.file] = model
    return files


def _known_names() -> list[str]:
    return [*SYSTEMS, *MODELS, *PUBLISHED_WEIGHTS]


def _accept_existing(path: Path, published_size: int | None) -> None:
    """Accept an existing file; raise OutputError if its size is not the published one."""
    size = path.stat().st_size
    if published_size is not None and size != published_size:
        raise OutputError(
            f"{path}: has {size:,} bytes, not the published {published_size:,}; --overwrite replaces it"
        )
    print(f"{path.resolve()}: is there already ({size:,} bytes), left as it is")
