"""Prepared steps on a CUDA device: captured, replayed, alone and beside a user's own work."""

from __future__ import annotations

import dataclasses
import logging
import threading

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from admfast.engine.options import EngineOptions
from admfast.engine.precision import POLICIES
from admfast.engine.step import Batch, StepKey
from admfast.ops.noise import Stream, as_seeds
from admfast.pipeline import Pipeline
from admfast.solvers import make_table
from tests.small import PROCESS, pipeline, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LABELS, SEEDS = [0, 3, 1, 2], [3, 2**63, 7, 8]
FP32 = POLICIES["fp32"]


def made(**settings) -> Pipeline:
    """The small guided pipeline on the device."""
    pipe = pipeline(**settings)
    pipe.net.cuda()
    pipe.classifier.cuda()
    return pipe


def images(pipe: Pipeline, **settings) -> Tensor:
    return pipe.sample(**{"classes": LABELS, "seeds": SEEDS, "output": "float", **settings})


def near(got: Tensor, wanted: Tensor, limit: float = 1e-4) -> bool:
    return float((got - wanted).abs().max()) <= limit * float(wanted.abs().max())


EAGER = EngineOptions(graph=False, branches=False)
SETTINGS = {
    "ddpm": {},
    "ddim": {"solver": "ddim", "steps": 7},
    "unguided": {"guidance": 0},
    "partly guided": {"guidance_interval": (200, 800), "steps": 6},
    "recorded noise": {"step_noise": randn(4, 4, 1, 8, 8), "noise": randn(4, 1, 8, 8)},
}


@pytest.mark.parametrize("branches", [True, False], ids=["branches", "one stream"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_replayed_step_is_the_eager_one(name, branches):
    pipe = made(options=EngineOptions(branches=branches))
    got, again = images(pipe, **SETTINGS[name]), images(pipe, **SETTINGS[name])
    assert all(step.refused is None for step in pipe._engine._steps.values())
    assert all(run.__name__ == "replay" for s in pipe._engine._steps.values() for run in s.run.values())
    assert torch.equal(got, again)
    assert near(got, images(made(options=EAGER), **SETTINGS[name]))
    assert near(got.cpu(), images(pipeline(), **SETTINGS[name]), 1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_other_precisions_are_captured_too(precision):
    pipe = made(policy=POLICIES[precision])
    got, wanted = images(pipe), images(made(policy=FP32))
    assert 0 < float((got - wanted).abs().mean()) < 0.1
    assert all(step.refused is None for step in pipe._engine._steps.values())


def filled(pipe: Pipeline, steps: int = 8):
    table = make_table("ddpm", PROCESS.build(str(steps)))
    x = randn(4, 1, 8, 8).cuda()
    batch = Batch(x, as_seeds(SEEDS).cuda(), torch.tensor(LABELS).cuda(), scale=2.0)
    key = StepKey.of(table, batch, [True] * steps, True, Stream.STEPS)
    step = pipe._engine.step(key)
    step.fill(table, batch)
    return step, table


def test_a_replay_allocates_copies_and_waits_for_nothing():
    step, _ = filled(made())
    step.advance(0, True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for i in (1, 2, 3):
            step.advance(i, True)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    names = [event.name for event in seen.events()]
    launches = [name for name in names if "GraphLaunch" in name]
    assert len(launches) == 3, sorted(set(names))
    waits = [name for name in names if "Synchronize" in name]
    assert len(waits) <= 1, waits  # the test's own
    moved = [name for name in names if "Memcpy" in name and ("HtoD" in name or "DtoH" in name)]
    allocated = [name for name in names if name.startswith(("cudaMalloc", "cudaFree"))]
    assert not moved and not allocated


def test_a_user_s_other_stream_and_thread_may_work_meanwhile():
    wanted = images(made())
    stop = threading.Event()

    def busy() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                a = torch.randn(256, 256, device="cuda")
                (a @ a).sum()

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        pipe = made()
        got = images(pipe)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            on_side = images(pipe)
        side.synchronize()
    finally:
        stop.set()
        worker.join()
    assert torch.equal(got, wanted) and torch.equal(on_side, wanted)


def test_changed_weights_reach_a_captured_graph():
    pipe, fresh = made(), made()
    images(pipe)
    for net in (pipe.net, fresh.net):
        with torch.no_grad():
            net.out[2].bias.add_(0.3)
            net.middle_block[0].out_layers[3].weight.mul_(1.1)
    assert near(images(pipe), images(fresh))


def test_what_cannot_be_captured_runs_row_by_row_and_says_why(monkeypatch, caplog):
    pipe = made()
    forward = type(pipe.net).forward

    def reading(self, x, *rest, **options):
        x.sum().item()
        return forward(self, x, *rest, **options)

    monkeypatch.setattr(type(pipe.net), "forward", reading)
    with caplog.at_level(logging.WARNING, logger="admfast"):
        got = images(pipe)
    assert any("no CUDA graph of the step" in record.getMessage() for record in caplog.records)
    assert all(step.refused for step in pipe._engine._steps.values())
    monkeypatch.undo()
    assert near(got, images(made(options=EAGER)))


def test_several_steps_are_kept_apart():
    pipe = made()
    four, two = images(pipe), images(pipe, classes=LABELS[:2], seeds=SEEDS[:2])
    assert near(two, four[:2]) and torch.equal(images(pipe), four)
    assert len(pipe._engine._steps) == 2


def test_an_engine_runs_a_compiled_step():
    pipe = made(options=dataclasses.replace(EngineOptions(), compile=True))
    assert near(images(pipe, steps=2), images(made(options=EAGER), steps=2), 1e-3)


def test_no_row_of_a_trajectory_waits_for_the_device():
    step, table = filled(made(options=EngineOptions(rows_at_a_time=3)))
    step.advance(0, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, len(table)):
            step.advance(i, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(step.state.x).all() and int(step.counters[0]) == len(table)
