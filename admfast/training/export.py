"""Write the network that a run has trained to a weights file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from admfast.checkpoints import write_weights
from admfast.checkpoints.snapshots import AVERAGES_FOLDER, list_snapshots, read_run_average
from admfast.errors import CheckpointError, invalid
from admfast.files.atomic import check_not_existing
from admfast.files.paths import user_path
from admfast.models.description import Description
from admfast.training.ema import combine, reconstruction_factors
from admfast.training.folder import find_run_folder, read_run_file, recipe_from_description


def export_run(
    run: str | PathLike[str],
    path: str | PathLike[str],
    average: str | None = None,
    width: float | None = None,
    dtype: torch.dtype | None = torch.float32,
    overwrite: bool = False,
) -> Description:
    """Write an average of a run's weights, with the description that `admfast.load` reads.

    Args:
        run: folder of the run. path: the weights file, .safetensors, or .pt as published.
        average: name of an average in the newest intact snapshot ("0.9999"); None takes the first.
        width: relative width of a power-function average to reconstruct from the stored ones; give it instead
            of `average`, for runs with ema_power.
        dtype: see `write_weights`.
        overwrite: replace an existing file, or a description beside it.

    Returns: the description. Raises: CheckpointError, InvalidArgument, OutputError.
    """
    run_path = find_run_folder(run)
    if not overwrite:
        weights_path = user_path("out", path)
        check_not_existing("out", [weights_path, weights_path.with_suffix(".json")])
    if width is None:
        state, description = read_run_average(run_path, average)
    else:
        if average is not None:
            raise invalid("width", width, "an average by name, or a width, not both")
        state, description = _reconstruct_average(run_path, width)
    write_weights(path, state, description, dtype)
    return description


def _reconstruct_average(run: Path, width: float) -> tuple[dict[str, torch.Tensor], Description]:
    """Return the power-function average of a width at the run's last stored step."""
    description = read_run_file(run)
    recipe = recipe_from_description(description)
    if not recipe.ema_power:
        raise invalid("width", width, "only for a run with ema_power, which stores the averages for it")
    stored = list_snapshots(run, AVERAGES_FOLDER)
    if not stored:
        raise CheckpointError(f"{run / AVERAGES_FOLDER}: holds no stored averages yet")
    profiles, states = [], []
    for snapshot in stored:
        for name, state in snapshot.read().items():
            profiles.append((snapshot.step, float(name.removeprefix("power-"))))
            states.append(state)
    last_step = stored[0].step
    factors = reconstruction_factors(profiles, (last_step, width))
    training_facts = {**description.training, "step": last_step, "average": f"power-{width:g}, put together"}
    return combine(states, factors), Description(description.network, description.diffusion, training_facts)
