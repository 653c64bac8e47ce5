"""Tests of DiffusionConfig: the meaning of its settings, and the values that it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from admfast.diffusion import DiffusionConfig, LossType, MeanType, VarType
from admfast.errors import InvalidArgument


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({}, (MeanType.EPSILON, VarType.FIXED_LARGE, LossType.MSE)),
        ({"learn_sigma": True}, (MeanType.EPSILON, VarType.LEARNED_RANGE, LossType.MSE)),
        ({"sigma_small": True}, (MeanType.EPSILON, VarType.FIXED_SMALL, LossType.MSE)),
        (
            {"learn_sigma": True, "sigma_small": True},
            (MeanType.EPSILON, VarType.LEARNED_RANGE, LossType.MSE),
        ),
        ({"predict_xstart": True}, (MeanType.START_X, VarType.FIXED_LARGE, LossType.MSE)),
        ({"use_kl": True}, (MeanType.EPSILON, VarType.FIXED_LARGE, LossType.RESCALED_KL)),
        (
            {"use_kl": True, "rescale_learned_sigmas": True},
            (MeanType.EPSILON, VarType.FIXED_LARGE, LossType.RESCALED_KL),
        ),
        (
            {"rescale_learned_sigmas": True},
            (MeanType.EPSILON, VarType.FIXED_LARGE, LossType.RESCALED_MSE),
        ),
        (
            {"mean_type": "PREVIOUS_X", "var_type": VarType.LEARNED, "loss_type": "KL"},
            (MeanType.PREVIOUS_X, VarType.LEARNED, LossType.KL),
        ),
    ],
    ids=lambda value: "-".join(value) or "default" if isinstance(value, dict) else "",
)
def test_types(settings, types):
    config = DiffusionConfig(**settings)
    assert config.types == types
    built = config.build()
    assert (built.mean_type, built.var_type, built.loss_type) == types


def test_build_may_keep_other_steps():
    config = DiffusionConfig(respacing="250", rescale_timesteps=True)
    assert config.build().num_timesteps == 250
    assert config.build("ddim25").num_timesteps == 25
    assert config.build([0, 500]).schedule.timestep_map.tolist() == [0, 500]
    assert config.build("").num_timesteps == 1000
    assert config.build().schedule.rescale_timesteps


def test_none_is_the_process_without_respacing():
    config = DiffusionConfig(respacing=None)
    assert config.build().schedule.betas[0] == 1e-4
    assert config.build(None).num_timesteps == 1000
    assert config.build("").schedule.betas.tolist() != config.build().schedule.betas.tolist()


def test_it_is_a_value():
    config = DiffusionConfig(respacing=[0, 10], mean_type="START_X")
    assert config == DiffusionConfig(respacing=(0, 10), mean_type=MeanType.START_X)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 10  # type: ignore[misc]


def test_published_flag_names():
    config = DiffusionConfig.from_flags(diffusion_steps=400, timestep_respacing="27", noise_schedule="cosine")
    assert config == DiffusionConfig(noise_schedule="cosine", steps=400, respacing="27")
    assert DiffusionConfig.from_flags(timestep_respacing=None).respacing == ""
    assert DiffusionConfig.from_flags(respacing=None).respacing is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiffusionConfig(noise_schedule="cosin"), "noise_schedule='cosin': nearest: cosine"),
        (lambda: DiffusionConfig(steps=0), "steps=0"),
        (lambda: DiffusionConfig(steps=10), "steps=10: a linear schedule"),
        (lambda: DiffusionConfig(learn_sigma="yes"), "learn_sigma='yes': True or False"),
        (lambda: DiffusionConfig(respacing="1001"), "respacing='1001'"),
        (lambda: DiffusionConfig(respacing="0"), "respacing='0': at least one step"),
        (lambda: DiffusionConfig(mean_type="X0"), "mean_type='X0'"),
        (
            lambda: DiffusionConfig(mean_type="START_X", predict_xstart=True),
            "predict_xstart=True: off where mean_type is given",
        ),
        (lambda: DiffusionConfig(var_type="LEARNED", learn_sigma=True), "learn_sigma=True"),
        (lambda: DiffusionConfig(loss_type="KL", use_kl=True), "use_kl=True"),
        (lambda: DiffusionConfig().build("ddim1001"), "respacing='ddim1001'"),
        (lambda: DiffusionConfig.from_flags(learn_sigmas=True), "learn_sigmas=True: .*nearest: learn_sigma"),
        (lambda: DiffusionConfig.from_flags(steps=10, diffusion_steps=10), "the same setting as steps"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()
