"""Tests of a run's profile: counted work, the machine's rate of products, and advice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from admfast import guides
from admfast.checkpoints.describe import count_forward_work, count_guidance_flops
from admfast.engine.options import PLAIN, EngineOptions
from admfast.engine.precision import INT8_WITHOUT_AMX, POLICIES
from admfast.ops import dispatch, native
from admfast.sampling import profile
from admfast.sampling.last_run import RunReport
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.profile import find_advice, measure_product_rate, profile_text, rates
from tests.small import cascade, pipeline, unet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Make the measurement of products short: small matrices and a time limit of 0 seconds."""
    monkeypatch.setattr(profile, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(profile, "PRODUCT_SIDE", {"cpu": 64})


def last(pipe: Pipeline, **settings: Any) -> RunReport:
    pipe.sample(**{"classes": [1, 2], "seeds": [3, 4], **settings})
    assert pipe.last_run is not None
    return pipe.last_run


def test_the_work_is_that_of_all_rows_of_all_images():
    pipe = cascade()
    report = last(pipe, seeds=range(3), batch_size=2, guidance_interval=(0, 400))
    found = rates(report, pipe)
    guided = report.stages[0].guided_rows
    assert 0 < guided < 4
    work = 4 * count_forward_work(pipe.config).flops + guided * count_guidance_flops(pipe.classifier.config)
    assert found["base"].flops == 3 * work
    assert found["upsampler"].flops == 3 * 3 * count_forward_work(pipe.upsampler.config).flops
    for stage in report.stages:
        rate = found[stage.stage]
        assert rate.flops_per_second == rate.flops / stage.seconds.rows and rate.product > 0
        assert rate.share == pytest.approx(rate.flops_per_second / rate.product)


def test_the_work_has_that_of_second_outputs():
    weak = unet(7, model_channels=64)
    pipe = pipeline(classifier=None, null_class=True, weak=weak)
    guided = [guides.by_null_class(2.0, (0, 400)), guides.by_weak_network(2.0, (500, 999))]
    report = last(pipe, guidance=0, guides=guided)
    stage = report.stages[0]
    assert 0 < stage.null_class_rows < 4 and 0 < stage.weak_network_rows < 4
    own, other = (count_forward_work(net.config).flops for net in (pipe.net, weak))
    work = (4 + stage.null_class_rows) * own + stage.weak_network_rows * other
    assert rates(report, pipe)["base"].flops == 2 * work and own != other


def test_work_follows_the_sides_that_were_sampled():
    pipe = pipeline(classifier=None, guidance=0.0)
    small, large = (rates(last(pipe, size=size), pipe)["base"].flops for size in (8, (16, 8)))
    # Convolutions cost in proportion to the pixels, attention to their square.
    assert 2 * small < large < 4 * small


def test_a_rate_is_that_of_the_fastest_product(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 4.0, 4.0, 4.5, 5.0])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(profile, "MEASURE_SECONDS", 4.2)
    # The products take from 1 to 3 and from 4 to 4.5. The loop reads the clock between them.
    assert measure_product_rate(CPU, torch.float32, 1, False, 8) == 2 * 8**3 / 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_run_on_the_step_s_threads_and_leave_them(dtype, monkeypatch):
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append((a.dtype, torch.get_num_threads())) or mm(a, b))
    before = torch.get_num_threads()
    measure_product_rate(CPU, dtype, 1, False, 8)
    assert set(seen) == {(dtype, 1)} and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("policy", "rate", "notes"),
    [
        (POLICIES["fp32"], 1.0, (True, False)),
        (POLICIES["fp32"], 1e18, (False, False)),
        (INT8_WITHOUT_AMX, 1.0, (False, True)),
        (INT8_WITHOUT_AMX, 1e18, (False, True)),
    ],
)
def test_a_share_that_may_exceed_one_is_explained(policy, rate, notes, monkeypatch):
    report, pipe = last(pipeline()), pipeline(policy=policy)
    monkeypatch.setattr(profile, "measure_product_rate", lambda *_: rate)
    shown = profile_text(report, pipe)
    assert ("Winograd" in shown, "8-bit" in shown) == notes


# Advice


def advice(pipe: Pipeline, **settings: Any) -> list[str]:
    return find_advice(last(pipe, **settings), pipe)


def said(texts: list[str], word: str) -> bool:
    return any(word in text for text in texts)


def test_rules_speak_where_they_hold_alone():
    pipe = pipeline()
    assert not any(said(advice(pipe), word) for word in ("guides", "ADMFAST_IMPL", "bf16", "hook", "fold"))
    assert said(advice(pipe, guidance_fn=lambda x, t: 0 * x), "guides")
    with dispatch.override_impl("attention=reference"):
        texts = advice(pipe)
    assert said(texts, "ADMFAST_IMPL") and said(texts, "attention")


def test_a_missing_extension_is_said_with_the_reason(monkeypatch):
    pipe = pipeline()
    report = last(pipe)
    for reason in ("not built: for a test", None):
        monkeypatch.setattr(native, "reason_missing", lambda reason=reason: reason)
        assert said(find_advice(report, pipe), "extension") == said(
            find_advice(report, pipe), "not built: for a test"
        )
        assert said(find_advice(report, pipe), "extension") == (reason is not None)


def test_small_batches_are_said_and_large_ones_are_not():
    pipe = pipeline()
    report = last(pipe)
    assert said(find_advice(report, pipe), "batches of 2")
    # 2 * 9 * 32^2 FLOP per pixel and image reach 128 million at 109 images of 8x8.
    (stage,) = report.stages
    for batch, small in ((108, True), (109, False)):
        changed = dataclasses.replace(report, stages=(dataclasses.replace(stage, batch=batch),))
        assert said(find_advice(changed, pipe), f"batches of {batch}") == small


def test_half_precision_on_a_cpu_is_said_where_there_is_no_amx(monkeypatch):
    pipe = pipeline(policy=POLICIES["bf16"])
    for amx in (False, True):
        monkeypatch.setattr(profile, "has_amx", lambda amx=amx: amx)
        assert said(advice(pipe), "bf16") == (not amx)


def test_options_that_are_off_are_said():
    texts = advice(pipeline(options=PLAIN))
    assert said(texts, "prepared=False") and said(texts, "fold")
    hooked = pipeline()
    hooked.net.input_blocks[0][0].register_forward_hook(lambda *_: None)
    hooked.net.middle_block[0].in_layers[2].register_forward_hook(lambda *_: None)
    assert said(advice(hooked), "hook")


def test_callbacks_that_take_long_are_said():
    import time

    pipe = pipeline(options=EngineOptions(threads=1))
    last(pipe)
    report = last(pipe, callback=lambda progress: time.sleep(0.05))
    assert said(find_advice(report, pipe), "callbacks took")


def test_at_most_three_things_are_said_and_the_text_holds_them():
    pipe = pipeline(options=PLAIN, policy=POLICIES["bf16"])
    with dispatch.override_impl("reference"):
        report = last(pipe)
    texts = find_advice(report, pipe)
    assert len(texts) == 3
    shown = profile_text(report, pipe)
    assert all(text in shown for text in texts) and "share" in shown
