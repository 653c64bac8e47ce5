"""`admfast inspect PRESET_OR_FILE --train`: the memory of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from admfast import checks
from admfast.checkpoints import load_network
from admfast.cli.options import parse_settings
from admfast.cli.train import resolve_recipe
from admfast.errors import allowed_names, invalid
from admfast.files.tables import table
from admfast.host import resolve_device
from admfast.training.memory import step_memory
from admfast.training.network import resolve_precision
from admfast.training.recipe import KINDS, Recipe
from admfast.training.recipes import DIGITS, PRESETS, describe_name


def print_memory(path: Path, set_: Iterable[str] | None, settings: Mapping[str, Any]) -> None:
    """Print the memory of a training step for the network of a file, or for each kind of network of a preset.

    path: the file, or the name of the preset. settings: recipe settings that have their own flags.
    Raises: InvalidArgument, CheckpointError.
    """
    options = {**parse_settings("--set", set_, extra_names=None), **settings}
    if "checkpointing" in settings:
        options["checkpointing"] = checks.parse_literal(settings["checkpointing"])
    recipes = _recipe_for_file(path, options) if path.exists() else _recipes_for_preset(str(path), options)
    for number, recipe in enumerate(recipes):
        print("\n" * bool(number) + table(_rows(resolve_precision(recipe, resolve_device(None)))))


def _recipe_for_file(path: Path, options: dict[str, Any]) -> list[Recipe]:
    """Return the recipe that trains a file's network further, by default with the settings of digits32."""
    network = load_network(path)[1].config
    kind = next(kind for kind, config in KINDS.items() if type(network) is config)
    return [resolve_recipe(kind, DIGITS, str(path), options)]


def _recipes_for_preset(name: str, options: dict[str, Any]) -> list[Recipe]:
    """Return the recipe of every kind that has a preset of this name."""
    kinds = [kind for kind in KINDS if name in PRESETS[kind]]
    if not kinds:
        known_presets = list(dict.fromkeys(preset for kind in KINDS for preset in PRESETS[kind]))
        hint = describe_name(name) or allowed_names(name, known_presets)
        raise invalid("path", name, f"a file, or a preset of `admfast train`; {hint}")
    return [resolve_recipe(kind, name, None, options) for kind in kinds]


def _rows(recipe: Recipe) -> list[tuple[str, str]]:
    memory = step_memory(recipe)
    microbatch = recipe.microbatch or recipe.batch_size
    images = f"batch {recipe.batch_size}, {microbatch} at once, {recipe.network.image_size} px"
    run_text = f"{images}, {recipe.precision}, checkpointing {recipe.checkpointing}"
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "moments of AdamW": memory.moments,
        "averages": memory.averages,
        "kept for the backward pass": memory.saved_for_backward,
    }
    return [
        (recipe.kind, run_text),
        *((name, _format_bytes(size)) for name, size in parts.items()),
        (
            "peak of a step",
            f"{_format_bytes(memory.peak)} in one process, without the memory of the libraries",
        ),
    ]


def _format_bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
