"""Tests of the named spacings of timesteps, and of timesteps between whole ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig, Schedule, make_schedule
from admfast.diffusion.schedule import TIMESTEP_SCALE
from admfast.errors import InvalidArgument

PROCESSES = [("linear", 1000), ("cosine", 400)]
COUNTS = [1, 2, 7, 10, 100]


def kept(schedule: str, total: int, spec: object) -> np.ndarray:
    return make_schedule(schedule, total, spec).timestep_map


def log_snr_at(schedule: str, total: int, t: np.ndarray) -> np.ndarray:
    bar = make_schedule(schedule, total, None).alphas_cumprod
    return np.interp(t, np.arange(total), np.log(bar / (1 - bar)))


@pytest.mark.parametrize("count", [*COUNTS, 250])
@pytest.mark.parametrize(("schedule", "total"), PROCESSES)
def test_uniform_counts_equal_steps_from_the_last_timestep_down(schedule, total, count):
    found = kept(schedule, total, f"uniform{count}")
    trailing = np.round(np.arange(total, 0, -total / count)).astype(int) - 1
    assert found.dtype == np.int64 and found.tolist() == sorted(trailing.tolist())


@pytest.mark.parametrize(("schedule", "total"), PROCESSES)
def test_uniform_keeps_all(schedule, total):
    assert kept(schedule, total, f"uniform{total}").tolist() == list(range(total))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("schedule", "total"), PROCESSES)
def test_quadratic(schedule, total, count):
    roots = np.sqrt(kept(schedule, total, f"quadratic{count}"))
    assert roots == pytest.approx(np.arange(1, count + 1) / count * np.sqrt(total - 1))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("schedule", "total"), PROCESSES)
def test_log_snr_spacing_ends_one_step_before_timestep_0(schedule, total, count):
    t = kept(schedule, total, f"log-snr{count}")
    values = log_snr_at(schedule, total, np.append(0, t))
    assert t[-1] == total - 1 and np.diff(values) == pytest.approx((values[-1] - values[0]) / count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("schedule", "total"), PROCESSES)
def test_karras_spacing_has_both_ends(schedule, total, count):
    t = kept(schedule, total, f"karras{count}")
    roots = np.exp(-log_snr_at(schedule, total, t) / 14)
    assert t[-1] == total - 1 and (count == 1 or abs(t[0]) < 1e-6)
    assert np.diff(roots) == pytest.approx((roots[-1] - roots[0]) / max(count - 1, 1))


def test_between_timesteps_the_log_snr_is_linear():
    whole = make_schedule("linear", 1000, "")
    between = make_schedule("linear", 1000, [10, 20.25, 500])
    assert between.timestep_map.tolist() == [10, 20.25, 500]
    bar = between.alphas_cumprod
    expected = log_snr_at("linear", 1000, between.timestep_map)
    assert np.log(bar / (1 - bar)) == pytest.approx(expected)
    assert bar[[0, 2]] == pytest.approx(whole.alphas_cumprod[[10, 500]])
    assert between.timesteps_at(expected) == pytest.approx(between.timestep_map)
    twice = between.respaced([0, 0.5, 2])
    assert twice.timestep_map.tolist() == [10, 15.125, 500] and twice.origin is between.origin


@pytest.mark.parametrize("rescale", [False, True])
def test_the_network_sees_fractions_in_float32(rescale):
    config = DiffusionConfig(steps=500, rescale_timesteps=rescale)
    process = config.build([0, 100.5])
    seen = process.model_t(torch.tensor([0, 1]))
    factor = TIMESTEP_SCALE / 500 if rescale else 1.0
    assert seen.dtype == torch.float32 and seen.tolist() == [0, 100.5 * factor]
    assert not process.schedule.integer_t and config.build([0, 100]).schedule.integer_t is not rescale


def test_a_list_as_text_and_a_config_keep_fractions():
    config = DiffusionConfig(respacing=[999, 0.5])
    assert config == DiffusionConfig.from_flags(**config.to_dict()) and hash(config)
    assert config.build().schedule.timestep_map.tolist() == [0.5, 999]
    assert DiffusionConfig().build("[0.5, 999]").schedule.timestep_map.tolist() == [0.5, 999]


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("uniform0", "'uniform0'"),
        ("karras1001", "'karras1001'"),
        ("uniform", "'uniform'"),
        ([0.5, 0.5], r"\[0.5, 0.5\]"),
        ([0.5, 999.5], "999.5"),
        ([-0.5, 3], "-0.5"),
        ([0.5, float("nan")], "nan"),
        ("[0.5,x]", "'x'"),
        ("[1e2,x]", "'x'"),
    ],
)
def test_a_wrong_spacing_is_named(spec, value):
    with pytest.raises(InvalidArgument, match=rf"^respacing( timestep)?={value}"):
        make_schedule("linear", 1000, spec)


def test_a_log_snr_that_the_process_does_not_reach_is_refused():
    schedule = make_schedule("linear", 1000)
    with pytest.raises(InvalidArgument, match="^log_snr="):
        schedule.timesteps_at([0.0, 100.0])
    with pytest.raises(InvalidArgument, match="^log_snr=-inf"):
        Schedule.from_betas([0.5, 1.0]).timesteps_at(0.0)


@pytest.mark.parametrize("spacing", ["log-snr5", "karras5"])
def test_a_spacing_by_noise_needs_a_signal_at_every_timestep(spacing):
    with pytest.raises(InvalidArgument, match=f"^respacing='{spacing}'"):
        make_schedule("linear", 20, spacing)
    with pytest.raises(InvalidArgument, match="^steps="):
        make_schedule("linear", 20, [3, 18.5])
