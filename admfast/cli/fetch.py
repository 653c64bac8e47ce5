"""`admfast fetch NAME`: download released weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admfast.checkpoints import fetch
from admfast.errors import OutputError, allowed_names, invalid
from admfast.files.atomic import folder_removed_if_empty
from admfast.files.paths import user_path
from admfast.models.presets import MODELS, SYSTEMS, ModelPreset


def run_fetch(
    names: Annotated[
        list[str],
        typer.Argument(help="Systems (all their files), models or file names; see `admfast models`."),
    ],
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
    models_to_fetch, out = resolve_models(names), user_path("out", out)
    with folder_removed_if_empty(out):
        for model in models_to_fetch:
            path = out / model.file
            if path.exists() and not overwrite:
                _accept_existing(path, model)
                continue
            result = fetch(
                model.name, out, base_url=base_url, overwrite=overwrite, timeout=timeout, retries=retries
            )
            checked_by = ", ".join(result.checked) or "nothing, as no size or hash is known"
            print(f"{result.path.resolve()}: {result.size:,} bytes, checked by {checked_by}")


def resolve_models(names: list[str]) -> list[ModelPreset]:
    """Resolve names of systems, models and files to the released models, each once, in order.

    Raises:
        InvalidArgument: for an unknown name (the error names the nearest), or a model that ships with the
            package.
    """
    models_to_fetch: dict[str, ModelPreset] = {}
    for name in names:
        if name in SYSTEMS:
            models = SYSTEMS[name].models
        else:
            model = MODELS.get(name) or MODELS.get(name.removesuffix(".pt"))
            if model is None:
                raise invalid(
                    "names", name, f"no such system or model; {allowed_names(name, [*SYSTEMS, *MODELS])}"
                )
            models = (model,)
        for model in models:
            if model.shipped:
                raise invalid("names", name, f"nothing to fetch: {model.name} ships with the package")
            models_to_fetch[model.name] = model
    return list(models_to_fetch.values())


def _accept_existing(path: Path, model: ModelPreset) -> None:
    """Accept an existing file; raise OutputError if its size is not the published one."""
    size = path.stat().st_size
    if model.size is not None and size != model.size:
        raise OutputError(
            f"{path}: has {size:,} bytes, not the published {model.size:,}; --overwrite replaces it"
        )
    print(f"{path.resolve()}: is there already ({size:,} bytes), left as it is")
