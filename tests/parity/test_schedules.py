"""Tests that schedules and respacings equal the published ones."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from admfast.diffusion import beta_schedule, make_schedule, space_timesteps
from admfast.errors import InvalidArgument
from tests.parity.golden import SCHEDULE_LIMIT, cases, compare, golden_root, load_json, load_npz


def _entries(file: str) -> list[object]:
    """Return one param for each entry of a JSON list of the schedules folder, or the skip of `cases`."""
    root = golden_root()
    if root is None or not (root / "schedules").is_dir():
        return cases("schedules")
    entries = load_json(root / "schedules" / file)
    return [pytest.param(entry, id=_name(entry)) for entry in entries]


def _name(entry: dict) -> str:
    return entry.get("file") or f"{entry['steps']}-{entry['respacing']}"


@pytest.mark.parametrize("entry", _entries("index.json"))
def test_schedule(entry):
    golden = load_npz(golden_root() / "schedules" / entry["file"])
    name, steps = entry["noise_schedule"], entry["diffusion_steps"]
    schedule = make_schedule(name, steps, entry["timestep_respacing"])
    assert schedule.num_timesteps == entry["num_timesteps"]
    compare(beta_schedule(name, steps), golden.pop("base_betas"), SCHEDULE_LIMIT, "base_betas")
    for array, expected in golden.items():
        compare(getattr(schedule, array), expected, SCHEDULE_LIMIT, array)


@pytest.mark.parametrize("path", cases("schedules", pattern="*.npz"))
def test_every_file_is_in_the_index(path: Path):
    index = load_json(path.parent / "index.json")
    assert path.name in [entry["file"] for entry in index]


@pytest.mark.parametrize("entry", _entries("respacing_edge_cases.json"))
def test_respacing_edge_case(entry):
    steps, spec = entry["steps"], entry["respacing"]
    if entry["ok"]:
        assert space_timesteps(steps, spec, published=True) == entry["timesteps"]
        assert space_timesteps(steps, spec) == entry["timesteps"]
        return
    assert issubclass(InvalidArgument, getattr(builtins, entry["error"]))
    with pytest.raises(InvalidArgument):
        space_timesteps(steps, spec, published=True)


@pytest.mark.parametrize("path", cases("sampling", "trajectories"))
def test_timesteps_of_a_trajectory(path: Path):
    """Compare the timestep map, and the t that the network got at each step of a published trajectory."""
    case, golden = load_json(path), load_npz(path)
    settings = case["diffusion"]
    schedule = make_schedule(
        settings["schedule"], settings["steps"], settings["respacing"], settings["rescale"]
    )
    assert schedule.num_timesteps == case["num_timesteps"]
    if case["timestep_map"] is not None:
        assert schedule.timestep_map.tolist() == case["timestep_map"]
    seen = golden["t_seen_by_model"]
    assert schedule.model_timesteps.dtype == seen.dtype
    for index, expected in zip(golden["t_index"], seen[:, 0], strict=True):
        assert schedule.model_t(int(index)) == expected
    assert np.array_equal(schedule.model_timesteps[golden["t_index"]], seen[:, 0])
