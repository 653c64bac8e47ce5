"""Export a network to another program: a diffusers folder, a safetensors file or a published `.pt`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from admfast.checkpoints import AmbiguousCheckpoint, ModelInfo, diffusers, load_network, write_weights
from admfast.checkpoints.config_to_flags import published_flags
from admfast.checkpoints.reading import WeightsSource
from admfast.checkpoints.writing import DTYPES, write_folder
from admfast.checks import boolean, one_of
from admfast.errors import CheckpointError, InvalidArgument, OutputError, invalid
from admfast.files.atomic import atomic_open, check_folder_path, check_not_existing, check_writable
from admfast.files.paths import user_path
from admfast.models.description import Description
from admfast.sampling.load import (
    LOW_RES_SIZE,
    find_system,
    model_file,
    reject_fixed_by_system,
    require_process,
    resolve_low_res_size,
    resolve_weights_source,
)

# File endings of the output formats; diffusers is a folder.
FORMATS: dict[str, tuple[str, ...]] = {
    "diffusers": (),
    "safetensors": (".safetensors",),
    "published": (".pt", ".pth"),
}
DESCRIPTION_FILE = "admfast.json"  # describes the exported network and its process
FOLDER_FILES = (
    "model_index.json",
    DESCRIPTION_FILE,
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        path: the file or folder.
        description: the network and its process, as recorded next to the weights.
        notes: settings that the other program needs and parts that were left out, one line each.
        flags: flags with which the published scripts load the `.pt`; else None.
    """

    path: Path
    description: Description
    notes: tuple[str, ...] = ()
    flags: str | None = None


def export(
    source: WeightsSource,
    out: str | PathLike[str],
    *,
    to: str,
    weights: str | PathLike[str] | None = None,
    preset: str | None = None,
    scheduler: str = "ddim",
    dtype: torch.dtype | None = torch.float32,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write a network in another program's format, whole or not at all; weights are only rounded to `dtype`.

    "diffusers" writes a folder for `DDIMPipeline.from_pretrained(out)`: model_index.json, unet/, scheduler/,
    and admfast.json, which describes the network and its process. qkv rows [3, h, d], or legacy [h, 3, d],
    become to_q, to_k and to_v, [h, d] each (`checkpoints.diffusers` lists all names). With N steps, where N
    divides the number of steps of the process, and `use_clipped_model_output=True`, its images are those of
    `solver="ddim"`, `respacing="ddimN"` and the same noise, up to rounding. diffusers needn't be installed.
    "safetensors" writes a file for `admfast.load`, and its description in a `.json` file next to it.
    "published" writes the plain state dict that the published code loads (`.pt`), its description in a
    `.json` file, and, if the published scripts can build the network, their flags in a `.flags` file.

    Args:
        source: as for `admfast.load`; of a system, the diffusion model is exported.
        out: a folder for "diffusers", else a file with the format's ending.
        to: "diffusers", "safetensors" or "published".
        weights, preset, options: as for `admfast.load`.
        scheduler: of a diffusers folder. "ddim" leaves out the variance channels, which diffusers' DDIM does
            not accept; "ddpm" keeps them, for `DDPMPipeline`.
        dtype: on disk: float32, float16 or bfloat16; None keeps the dtype of the source.
        overwrite: replace existing files.

    Raises:
        InvalidArgument: for a wrong argument, and for a field of the network or its process that the other
            program can't represent. Nothing is written then.
        CheckpointError: as `admfast.load`.
        OutputError: if a file exists already, or can't be written.
    """
    out = _check_output_path(out, one_of("to", to, FORMATS), boolean("overwrite", overwrite))
    if one_of("scheduler", scheduler, diffusers.SCHEDULERS) != "ddim" and to != "diffusers":
        raise invalid("scheduler", scheduler, "only with to='diffusers'")
    if dtype is not None and dtype not in DTYPES:
        raise invalid("dtype", dtype, "float32, float16 or bfloat16, or None")
    net, info, notes = _load_network(source, weights, preset, options, dtype)
    if to == "diffusers":
        return _to_diffusers(net, info, out, scheduler, notes)
    description = Description(info.config, info.diffusion, info.training)
    if to == "safetensors":
        write_weights(out, net.state_dict(), description, dtype)
        return Exported(out, description, notes)
    return _to_published(net, info, out, description, dtype, notes)


def _check_output_path(out: str | PathLike[str], to: str, overwrite: bool) -> Path:
    """Return the path to write; reject one that exists, can't be written, or has another format's ending."""
    path = user_path("out", out, FORMATS[to])
    if to == "diffusers":
        if path.suffix in (ending for format_endings in FORMATS.values() for ending in format_endings):
            raise invalid("out", str(path), "a folder for to='diffusers', not a weights file")
        check_folder_path(path)
        existing = [path] if path.is_dir() and any(path.iterdir()) else []
        if existing and overwrite and not (path / DESCRIPTION_FILE).is_file():
            reason = f"not replaced, because it is not an export (no {DESCRIPTION_FILE})"
            raise OutputError(f"out={str(path)!r}: {reason}")
    else:
        check_writable(path)
        endings = (".json", ".flags") if to == "published" else (".json",)
        existing = [path, *map(path.with_suffix, endings)]
    if not overwrite:
        check_not_existing("out", existing)
    return path


def _load_network(
    source: WeightsSource,
    weights: str | PathLike[str] | None,
    preset: str | None,
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> tuple[nn.Module, ModelInfo, tuple[str, ...]]:
    """Return the network on the CPU, its `ModelInfo`, and a note on parts of a system that are left out."""
    system, notes = find_system("source", source), tuple[str, ...]()
    low_res_size = options.get(LOW_RES_SIZE)
    if system is not None:
        reject_fixed_by_system(system, {**({} if preset is None else {"preset": preset}), **options})
        model = system.diffusion
        source, preset = model_file(system, model, weights), model.released_name
        others = ", ".join(part.name for part in system.models if part is not model)
        notes = (f"the diffusion model of {system.name}, without {others}",) if others else ()
    else:
        source = resolve_weights_source("source", source, weights)
    options = {name: value for name, value in options.items() if name != LOW_RES_SIZE}
    try:
        net, info = load_network(source, preset=preset, dtype=dtype, **options)
    except AmbiguousCheckpoint as question:
        raise CheckpointError(f"{question} [options of export, or --set on the command line]") from None
    return net, _with_low_res_size(info, resolve_low_res_size(info, low_res_size)), notes


def _with_low_res_size(info: ModelInfo, low_res_size: int | None) -> ModelInfo:
    """Return `info` with an upsampler's `low_res_size` in its recipe, which the exported file records."""
    if low_res_size is None:
        return info
    recipe = {**info.training.get("recipe", {}), LOW_RES_SIZE: low_res_size}
    return replace(info, training={**info.training, "recipe": recipe})


def _to_diffusers(
    net: nn.Module, info: ModelInfo, folder: Path, scheduler: str, notes: tuple[str, ...]
) -> Exported:
    """Write a folder that diffusers reads."""
    diffusers.check_network(info.config)
    config: Any = info.config
    process = require_process(info.path, info.diffusion)
    diffusers.check_process(process, scheduler)
    drops_variance = scheduler == "ddim" and config.learn_sigma
    if drops_variance:
        notes += (
            f"out.2 keeps {config.in_channels} of {config.out_channels} rows: DDIM doesn't use the variance",
        )
    pipeline = diffusers.SCHEDULERS[scheduler][1]
    call = "num_inference_steps=50"
    if scheduler == "ddim":
        call += ", use_clipped_model_output=True"
    if config.num_classes is None:
        notes += (f"{pipeline}.from_pretrained({str(folder)!r})({call})",)
    else:
        notes += (
            f"{pipeline} passes no labels: call pipe.unet(x, t, class_labels=...) and pipe.scheduler.step",
        )
        if scheduler == "ddim":
            notes += ("pass use_clipped_model_output=True to scheduler.step, to match the published DDIM",)
    record = {"exported": {"to": "diffusers", "scheduler": scheduler, "variance_dropped": drops_variance}}
    description = Description(config, process, {**info.training, **record})
    contents = (
        _json(diffusers.model_index(scheduler)),
        description.to_json(),
        _json(diffusers.scheduler_config(process, scheduler)),
        _json(diffusers.unet_config(config, scheduler)),
        diffusers.convert_unet_state(net.state_dict(), config, scheduler),
    )
    write_folder(folder, dict(zip(FOLDER_FILES, contents, strict=True)))
    return Exported(folder, description, notes)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _to_published(
    net: nn.Module,
    info: ModelInfo,
    path: Path,
    description: Description,
    dtype: torch.dtype | None,
    notes: tuple[str, ...],
) -> Exported:
    """Write the published state dict, and next to it the flags that build its network."""
    flags = None
    try:
        flag_values = published_flags(info.config, info.diffusion, info.low_res_size)
        flags = " ".join(f"--{name} {value}" for name, value in flag_values.items() if value != "")
    except InvalidArgument as error:
        notes += (f"no flags of the published scripts build this network: {error}",)
    with contextlib.ExitStack() as stack:
        flags_path = path.with_suffix(".flags")
        if flags is not None:
            stack.enter_context(atomic_open(flags_path)).write(f"{flags}\n".encode())
        write_weights(path, net.state_dict(), description, dtype)
        if flags is None:
            flags_path.unlink(missing_ok=True)  # left by an earlier export
    return Exported(path, description, notes, flags)
