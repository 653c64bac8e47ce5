"""`admfast models`: list or describe the systems and models that have presets."""

from __future__ import annotations

from typing import Annotated

import typer

from admfast.errors import CheckpointError, allowed_names, invalid
from admfast.files.tables import table
from admfast.models.presets import MODELS, SYSTEMS, ModelPreset, SystemPreset


def run_models(
    name: Annotated[
        str | None, typer.Argument(help="System or model to describe in full (default: list all of them).")
    ] = None,
    files: Annotated[
        bool,
        typer.Option(
            "--files", help="List the weights files too, with bytes and URL (default: systems only)."
        ),
    ] = False,
) -> None:
    """List the systems that can be sampled, or describe one of them or one of their models."""
    if name is None:
        print(table([_system_line(system) for system in SYSTEMS.values()], _SYSTEM_HEADER))
        if files:
            print()
            print(table([_model_line(model) for model in MODELS.values()], _MODEL_HEADER))
        return
    if name in SYSTEMS:
        print(table(_system_rows(SYSTEMS[name])))
        return
    model = MODELS.get(name) or MODELS.get(name.removesuffix(".pt"))
    if model is None:
        raise invalid("name", name, f"no such system or model; {allowed_names(name, [*SYSTEMS, *MODELS])}")
    print(table(_model_rows(model)))


_SYSTEM_HEADER = ("system", "image", "classes", "guidance", "steps", "published FID, taken with", "models")
_MODEL_HEADER = ("model", "kind", "parameters", "bytes", "checked by", "from")


def _system_line(system: SystemPreset) -> tuple[str, ...]:
    """Return one line of the list of systems."""
    try:
        image, classes = f"{system.image_size}", str(system.num_classes or "-")
    except CheckpointError:  # a shipped file that this installation lacks
        image, classes = "?", "?"
    steps = f"{system.steps}+{system.upsampler_steps}" if system.upsampler else str(system.steps)
    # The published FID was not always measured with our defaults: that of 64x64 is without guidance.
    fid = "-"
    if system.published:
        fid = f"{system.published[0].fid:.2f}, {system.published[0].conditions}"
    models = ", ".join(model.name for model in system.models)
    return system.name, image, classes, f"{system.guidance:g}", steps, fid, models


def _system_rows(system: SystemPreset) -> list[tuple[str, str]]:
    """Return everything about one system."""
    rows = [
        ("system", f"{system.name}: {system.summary}"),
        ("image", f"{system.image_size}x{system.image_size}, {system.channels} channels"),
        ("classes", str(system.num_classes or "none")),
        ("diffusion", f"{system.diffusion.file}, {system.steps} steps"),
    ]
    if system.classifier is not None:
        scale = f"guidance scale {system.guidance:g} by default"
        rows.append(("classifier", f"{system.classifier.file}, {scale}"))
    if system.upsampler is not None:
        steps = f"{system.upsampler_steps} steps, from {system.upsampler.low_res_size} pixels"
        rows.append(("upsampler", f"{system.upsampler.file}, {steps}"))
    for metric in system.published:
        numbers = {"FID": metric.fid, "sFID": metric.sfid, "precision": metric.precision}
        numbers |= {"recall": metric.recall, "Inception Score": metric.inception_score}
        text = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items() if value is not None)
        rows.append(("published", f"{text} ({metric.source}: {metric.conditions})"))
    rows.append(("source", system.diffusion.source))
    return rows


def _model_line(model: ModelPreset) -> tuple[str, ...]:
    """Return one line of the list of models."""
    try:
        kind = model.config.kind
    except CheckpointError:
        kind = "not in this installation"
    return (
        model.name,
        kind,
        f"{model.parameters:,}" if model.parameters else "-",
        f"{model.size:,}" if model.size else "-",
        "sha256" if model.sha256 else "md5" if model.md5 else "-",
        model.url or "this package",
    )


def _model_rows(model: ModelPreset) -> list[tuple[str, str]]:
    """Return everything about one model."""
    location = str(model.shipped_path) if model.shipped else str(model.url)
    rows = [("model", model.name), ("source", model.source), ("file", location)]
    if model.parameters is not None:
        rows.append(("parameters", f"{model.parameters:,}"))
    for title, value in (("bytes", model.size), ("sha256", model.sha256), ("md5", model.md5)):
        if value is not None:
            rows.append((title, f"{value:,}" if isinstance(value, int) else value))
    published = "published with the torso in float16" if model.use_fp16 else "published in float32"
    default = "float32" if model.config.kind == "classifier" else "bfloat16 on a GPU"
    rows.append(("precision", f"{published}; by default {default}"))
    rows += [(key, str(value)) for key, value in model.config.to_dict().items()]
    if model.diffusion is not None:
        rows += [(key, str(value)) for key, value in model.diffusion.to_dict().items()]
    systems = [system.name for system in SYSTEMS.values() if model in system.models]
    rows.append(("used in", ", ".join(systems) or "no system"))
    return rows
