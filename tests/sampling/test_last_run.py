"""Tests of a pipeline's report of its last run: how rows ran and why, implementations, and seconds."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch

from admfast.engine.options import PLAIN, EngineOptions
from admfast.engine.precision import POLICIES
from admfast.models.convolution import FoldableConv
from admfast.models.layers import Attention, Norm
from admfast.ops import dispatch
from admfast.ops.dispatch import IMPL_VARIABLE
from admfast.sampling.guides import Guide
from admfast.sampling.last_run import RunReport, StageReport, make_report
from admfast.sampling.loop import RunRecord
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import plan
from admfast.sampling.request import SampleRequest
from tests.small import cascade, pipeline

GIVEN: dict[str, Any] = {"classes": [1, 2], "seeds": [3, 4]}


def last(pipe: Pipeline, **settings: Any) -> RunReport:
    """Sample two images, by default guided in four rows, and return the report."""
    pipe.sample(**{**GIVEN, **settings})
    assert pipe.last_run is not None
    return pipe.last_run


def base(pipe: Pipeline, **settings: Any) -> StageReport:
    return last(pipe, **settings).stages[0]


def calls(stage: StageReport, op: str) -> int:
    return sum(stage.implementations().get(op, {}).values())


def modules(net: torch.nn.Module, kind: type) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, kind)]


def test_nothing_is_said_before_the_first_run():
    pipe = pipeline()
    assert pipe.last_run is None
    pipe.check(**GIVEN)
    assert pipe.last_run is None


def test_a_guided_run_is_described():
    pipe = pipeline()
    report = last(pipe, seeds=range(5), batch_size=2)
    (stage,) = report.stages
    assert (report.images, report.device, stage.stage) == (5, "cpu", "base")
    assert (stage.images, stage.batches, stage.batch, stage.sides) == (5, 3, 2, (8, 8))
    assert (stage.rows, stage.guided_rows, stage.not_prepared_reason, stage.layerwise_networks) == (
        4,
        4,
        None,
        (),
    )
    assert stage.folded and stage.policy == "fp32" and stage.precision == pipe.policy.parts()
    assert stage.not_replayed_reason is None and stage.not_compiled_reason
    assert report.peak_memory > 2**20


def test_a_short_run_is_not_replayed():
    assert "rows" in str(base(pipeline(), steps=2).not_replayed_reason)
    without = pipeline(options=EngineOptions(graph=False))
    assert "graph" in str(base(without).not_replayed_reason)
    hooked = pipeline()
    hooked.net.register_forward_hook(lambda *_: None)
    assert "hook" in str(base(hooked).not_replayed_reason)


def test_calls_are_those_of_the_networks_layers():
    pipe = pipeline()
    plain, guided = base(pipe, guidance=0.0), base(pipe)
    for op, kind in (("group_norm_silu", Norm), ("attention", Attention)):
        assert calls(plain, op) == len(modules(pipe.net, kind))
        assert calls(guided, op) == calls(plain, op) + len(modules(pipe.classifier, kind))
    # A skip convolution with two sources is two convolutions.
    convolutions = modules(pipe.net, FoldableConv)
    assert calls(plain, "conv") == len(convolutions) + sum(conv.split > 0 for conv in convolutions)
    assert calls(guided, "conv") > calls(plain, "conv") + len(modules(pipe.classifier, FoldableConv))
    for stage in (plain, guided):
        assert calls(stage, "sampler_step") == calls(stage, "normal") == 1


def test_the_classifier_is_seen_where_it_guides_some_rows_alone():
    pipe = pipeline()
    everywhere = base(pipe)
    part = base(pipe, guidance_interval=(0, 400))
    assert 0 < part.guided_rows < part.rows
    assert part.implementations() == everywhere.implementations()


def test_kept_steps_are_described_as_new_ones():
    pipe = pipeline()
    first, again = base(pipe), base(pipe)
    assert first.ops == again.ops


@pytest.mark.parametrize("options", [None, PLAIN], ids=["prepared", "plain"])
def test_the_reference_shows_and_who_asked_for_it(options, monkeypatch):
    pipe = pipeline(options=options or EngineOptions())
    before = base(pipe)
    with dispatch.override_impl("reference"):
        stage = base(pipe)
    assert {choice.implementation for choice in stage.ops} == {"reference"}
    assert {choice.requested_by for choice in stage.ops} == {IMPL_VARIABLE}
    assert base(pipe).ops == before.ops
    monkeypatch.setenv(IMPL_VARIABLE, "attention=reference,conv=library")
    found = base(pipe).implementations()
    assert set(found["attention"]) == {"reference"}
    assert options is not None or set(found["conv"]) == {"library"}


def test_an_implementation_asked_for_by_argument_shows():
    found = {choice.op: choice for choice in base(pipeline(), impl="reference").ops}
    assert (
        found["sampler_step"].implementation == "reference" and found["sampler_step"].requested_by == "impl"
    )
    assert found["attention"].requested_by is None


@pytest.mark.parametrize(
    "given, name",
    [
        ({"guidance_fn": lambda x, t: torch.zeros_like(x)}, "guides"),
        ({"guides": [Guide(lambda x, t: torch.zeros_like(x))]}, "guides"),
        ({"denoised_fn": lambda x0: x0}, "denoised_fn"),
    ],
    ids=["guidance_fn", "guides", "denoised_fn"],
)
def test_python_functions_are_why_no_step_was_prepared(given, name):
    pipe = pipeline()
    stage = base(pipe, **given)
    assert stage.not_prepared_reason is not None and name in stage.not_prepared_reason
    assert calls(stage, "group_norm_silu") >= len(modules(pipe.net, Norm))
    assert (calls(stage, "sampler_step"), stage.seconds.rows > 0) == (1, True)
    assert base(pipe).not_prepared_reason is None


def test_functions_and_prepared_steps_take_the_same_implementations():
    plain = pipeline(options=EngineOptions(prepared=False))
    functions, prepared = base(plain), base(pipeline())
    assert "prepared=False" in functions.not_prepared_reason and prepared.not_prepared_reason is None
    assert functions.implementations() == prepared.implementations()
    assert functions.guided_rows == prepared.guided_rows and functions.threads == prepared.threads


def test_a_network_that_is_not_folded_has_convolutions_of_torch_s_own():
    stage = base(pipeline(options=PLAIN))
    assert not stage.folded and "conv" not in stage.implementations()


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
def test_a_hook_lets_blocks_run_layer_by_layer(options):
    pipe = pipeline(options=options)
    conv = modules(pipe.classifier, FoldableConv)[1]
    hook = conv.register_forward_hook(lambda *_: None)
    assert base(pipe).layerwise_networks == ("classifier",)
    assert base(pipe, guidance=0.0).layerwise_networks == ()
    hook.remove()
    assert base(pipe).layerwise_networks == ()


def test_a_hook_is_why_nothing_was_compiled():
    pipe = pipeline(options=EngineOptions(compile=True))
    pipe.net.register_forward_hook(lambda *_: None)
    assert "hook" in base(pipe).not_compiled_reason


def test_half_precision_says_what_each_part_computes_in():
    stage = base(pipeline(policy=POLICIES["bf16"]))
    assert stage.policy == "bf16" and stage.precision["torso"] == "bfloat16"
    # Only the last layer is in float32, which Winograd needs.
    assert stage.implementations()["conv"].get("winograd", 0) <= 1


def test_a_cascade_has_two_stages():
    report = last(cascade())
    first, second = report.stages
    assert (first.stage, second.stage) == ("base", "upsampler")
    assert (first.rows, second.rows, second.guided_rows) == (4, 3, 0)
    assert (first.sides, second.sides, first.images, second.images) == ((8, 8), (16, 16), 2, 2)
    assert first.implementations() != second.implementations()


def test_threads_are_those_asked_for():
    assert base(pipeline(options=EngineOptions(threads=1))).threads == 1


# Seconds


@pytest.mark.parametrize("given", [{}, {"denoised_fn": lambda x0: x0}], ids=["prepared", "functions"])
def test_seconds_add_up(given):
    begun = time.perf_counter()
    report = last(cascade(), batch_size=1, **given)
    spent = time.perf_counter() - begun
    parts = report.pixels
    for stage in report.stages:
        seconds = stage.seconds
        assert 0 < seconds.first_row < seconds.rows and seconds.folding > 0 and seconds.preparing > 0
        assert seconds.callbacks == 0
        later = stage.batches * stage.rows - 1
        assert seconds.first_row + later * stage.mean_later_row == pytest.approx(seconds.rows)
        parts += seconds.folding + seconds.preparing + seconds.rows
    assert 0 < parts <= report.seconds <= spent


def test_callbacks_are_told_from_rows():
    report = last(pipeline(), callback=lambda progress: time.sleep(0.02))
    seconds = report.stages[0].seconds
    assert seconds.callbacks >= 4 * 0.02
    assert seconds.rows + seconds.callbacks <= report.seconds


def test_the_first_row_is_that_of_the_first_batch():
    pipe = pipeline()
    planned = plan(SampleRequest(**GIVEN), pipe)
    step, record = pipe.engine.step(planned), RunRecord()
    for rows, first in ((5.0, 2.0), (7.0, 4.0)):
        spent = {"folding": 0.5, "preparing": 0.25, "rows": rows, "first_row": first, "callbacks": 0.0}
        record.add(planned, step, [], spent)
    (stage,) = make_report(record, pipe).stages
    assert (stage.seconds.rows, stage.seconds.first_row, stage.seconds.folding) == (12.0, 2.0, 1.0)
    assert stage.mean_later_row == pytest.approx(10 / 7) and stage.images == 4


def test_a_single_row_has_no_later_one():
    stage = base(pipeline(), steps=1, batch_size=2)
    assert stage.mean_later_row is None and 0 < stage.seconds.first_row <= stage.seconds.rows


def test_float_images_need_no_pixels():
    assert last(pipeline(), output="float").pixels == 0.0


# Which run is reported, and as what


def test_it_is_the_run_that_ended_last():
    pipe = pipeline()
    inside = []

    def other(progress) -> None:
        if progress.done == 1:
            worker = threading.Thread(target=lambda: inside.append(last(pipe, seeds=[1], classes=[0])))
            worker.start()
            worker.join(60)

    outer = last(pipe, callback=other)
    assert [report.images for report in (*inside, outer)] == [1, 2] and pipe.last_run.images == 2


def test_a_run_that_failed_is_not_reported():
    pipe = pipeline()
    report = last(pipe)

    def fails(progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipe.sample(0, 0, callback=fails)
    assert pipe.last_run.stages == report.stages


def test_reports_are_values(monkeypatch):
    report = last(cascade())
    stored = report.to_dict()
    assert json.loads(json.dumps(stored)) == stored
    assert stored["stages"][1]["seconds"]["rows"] == report.stages[1].seconds.rows
    assert stored["stages"][0]["sides"] == [8, 8]
    with pytest.raises(AttributeError):
        report.images = 3


def test_the_table_holds_every_op_and_both_stages():
    report = last(cascade())
    text = str(report)
    for stage in report.stages:
        assert stage.stage in text
        for op, names in stage.implementations().items():
            assert op in text and all(f"{name} {count}" in text for name, count in names.items())
    assert max(map(len, text.splitlines())) < 160
    assert " row" not in text, "what a user asks for are steps"
