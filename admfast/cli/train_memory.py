"""`admfast inspect PRESET_OR_FILE --train`: the memory of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from admfast import checks
from admfast.checkpoints import load_network
from admfast.cli.options import options_of
from admfast.cli.train import resolved
from admfast.errors import invalid, nearest
from admfast.files.tables import table
from admfast.sampling.load import chosen_device
from admfast.training.memory import step_memory
from admfast.training.network import resolve_precision
from admfast.training.recipe import KINDS, Recipe
from admfast.training.recipes import DIGITS, PRESETS, describe_name


def print_memory(path: Path, set_: Iterable[str] | None, given: Mapping[str, Any]) -> None:
    """Print the memory of a training step for the network of a file, or for each kind of network of a preset.

    path: the file, or the name of the preset. given: recipe settings that have their own flags.
    Raises: InvalidArgument, CheckpointError.
    """
    options = {**options_of("--set", set_, also=None), **given}
    if "checkpointing" in given:
        options["checkpointing"] = checks.literal(given["checkpointing"])
    recipes = _of_file(path, options) if path.exists() else _of_preset(str(path), options)
    for number, recipe in enumerate(recipes):
        print("\n" * bool(number) + table(_rows(resolve_precision(recipe, chosen_device(None)))))


def _of_file(path: Path, options: dict[str, Any]) -> list[Recipe]:
    """Return the recipe that trains a file's network further, by default with the settings of digits32."""
    network = load_network(path)[1].config
    kind = next(kind for kind, config in KINDS.items() if type(network) is config)
    return [resolved(kind, DIGITS, str(path), options)]


def _of_preset(name: str, options: dict[str, Any]) -> list[Recipe]:
    """Return the recipe of every kind that has a preset of this name."""
    kinds = [kind for kind in KINDS if name in PRESETS[kind]]
    if not kinds:
        known = list(dict.fromkeys(preset for kind in KINDS for preset in PRESETS[kind]))
        hint = describe_name(name) or nearest(name, known)
        raise invalid("path", name, f"a file, or a preset of `admfast train`; {hint}")
    return [resolved(kind, name, None, options) for kind in kinds]


def _rows(recipe: Recipe) -> list[tuple[str, str]]:
    found = step_memory(recipe)
    at_once = recipe.microbatch or recipe.batch_size
    images = f"batch {recipe.batch_size}, {at_once} at once, {recipe.network.image_size} px"
    settings = f"{images}, {recipe.precision}, checkpointing {recipe.checkpointing}"
    names = {
        "parameters": found.parameters,
        "gradients": found.gradients,
        "moments of AdamW": found.moments,
        "averages": found.averages,
        "kept for the backward pass": found.saved_for_backward,
    }
    return [
        (recipe.kind, settings),
        *((name, _in_words(size)) for name, size in names.items()),
        ("peak of a step", f"{_in_words(found.peak)} in one process, without the memory of the libraries"),
    ]


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
