"""Tests of prepared steps on a CUDA device: capture, replay, and other work on the device meanwhile."""

from __future__ import annotations

import dataclasses
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from admfast.engine.compiled import FIRST_TORCH_TRACING_GRADIENTS
from admfast.engine.guidance import RowGuidance
from admfast.engine.options import EngineOptions
from admfast.engine.precision import POLICIES
from admfast.engine.step import Batch
from admfast.errors import Unavailable
from admfast.ops.update import as_seeds
from admfast.sampling.pipeline import Pipeline
from admfast.solvers import ddpm
from tests.small import PROCESS, pipeline, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LABELS, SEEDS = [0, 3, 1, 2], [3, 2**63, 7, 8]
FP32 = POLICIES["fp32"]


def made(**settings) -> Pipeline:
    """Return the small guided pipeline on the device."""
    pipe = pipeline(**settings)
    pipe.net.cuda()
    pipe.classifier.cuda()
    return pipe


def images(pipe: Pipeline, **settings) -> Tensor:
    return pipe.sample(**{"classes": LABELS, "seeds": SEEDS, "output": "float", **settings})


def near(got: Tensor, wanted: Tensor, limit: float = 1e-4) -> bool:
    """Compare with a limit, not bit by bit: cuDNN's algorithm may add in any order."""
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
    assert all(step.refusal is None for step in pipe.engine._steps.values())
    assert all(run.__name__ == "replay" for s in pipe.engine._steps.values() for run in s.bodies.values())
    assert near(got, again)
    assert near(got, images(made(options=EAGER), **SETTINGS[name]))
    assert near(got.cpu(), images(pipeline(), **SETTINGS[name]), 1e-3)


def test_the_report_says_what_was_captured_and_why_not():
    pipe, eager = made(), made(options=EAGER)
    images(pipe)
    images(eager)
    (captured,), (launched,) = pipe.last_run.stages, eager.last_run.stages
    assert captured.not_replayed_reason is None and "graph" in launched.not_replayed_reason
    assert captured.implementations() == launched.implementations()
    pipe.net.register_forward_hook(lambda *_: None)
    images(pipe)
    assert "hook" in pipe.last_run.stages[0].not_replayed_reason


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_other_precisions_are_captured_too(precision):
    pipe = made(policy=POLICIES[precision])
    got, wanted = images(pipe), images(made(policy=FP32))
    assert 0 < float((got - wanted).abs().mean()) < 0.1
    assert all(step.refusal is None for step in pipe.engine._steps.values())


def filled(pipe: Pipeline, steps: int = 8):
    table = ddpm().table(PROCESS.build(str(steps)))
    batch = Batch(
        table=table,
        shape=(4, 1, 8, 8),
        seeds=as_seeds(SEEDS).cuda(),
        labels=torch.tensor(LABELS).cuda(),
        guidance=(RowGuidance(2.0),) * steps,
    )
    step = pipe.engine.step(batch)
    step.fill(batch, randn(4, 1, 8, 8).cuda())
    return step, table


def test_a_replay_allocates_copies_and_waits_for_nothing():
    step, _ = filled(made())
    step.advance(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        with record_function("three rows"):
            for i in (1, 2, 3):
                step.advance(i)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    names = [event.name for event in seen.events()]
    rows, *_ = (e for e in seen.events() if e.name == "three rows" and e.device_type == DeviceType.CPU)
    start, end = rows.time_range.start, rows.time_range.end
    launches = [name for name in names if "GraphLaunch" in name]
    assert len(launches) == 3, sorted(set(names))
    # Only synchronizations during the rows count: the test and the profiler synchronize afterwards.
    waits = [e.name for e in seen.events() if "Synchronize" in e.name and start <= e.time_range.start <= end]
    assert not waits
    moved = [name for name in names if "Memcpy" in name and ("HtoD" in name or "DtoH" in name)]
    allocated = [name for name in names if name.startswith(("cudaMalloc", "cudaFree"))]
    assert not moved and not allocated


def test_a_user_s_other_stream_and_thread_may_work_meanwhile():
    wanted = images(made())
    stop = threading.Event()

    def busy() -> int:
        done = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                # No random numbers: during a capture no other thread may use the default generator.
                a = torch.full((256, 256), 1 / 256, device="cuda")
                (a @ a).sum()
                done += 1
        return done

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(busy)
        try:
            pipe = made()
            got = images(pipe)
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                on_side = images(pipe)
            side.synchronize()
        finally:
            stop.set()
    assert worker.result() > 0
    assert near(got, wanted) and near(on_side, wanted)


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
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, logger="admfast"):
        got = images(pipe)
    assert torch.cuda.current_stream() == stream
    assert any("no CUDA graph of the step" in record.getMessage() for record in caplog.records)
    assert all(step.refusal for step in pipe.engine._steps.values())
    monkeypatch.undo()
    assert near(got, images(made(options=EAGER)))


def test_several_steps_are_kept_apart():
    pipe = made()
    four, two = images(pipe), images(pipe, classes=LABELS[:2], seeds=SEEDS[:2])
    assert near(two, four[:2]) and near(images(pipe), four)
    assert len(pipe.engine._steps) == 2


def test_an_engine_runs_a_compiled_step():
    pipe = made(options=dataclasses.replace(EngineOptions(), compile=True))
    plain = {"steps": 2, "guidance": 0.0}
    assert near(images(pipe, **plain), images(made(options=EAGER), **plain), 1e-3)
    if torch.__version__ < FIRST_TORCH_TRACING_GRADIENTS:
        with pytest.raises(Unavailable, match="compile"):
            images(pipe, steps=2)
    else:
        assert near(images(pipe, steps=2), images(made(options=EAGER), steps=2), 1e-3)


def test_no_row_of_a_trajectory_waits_for_the_device():
    step, table = filled(made(options=EngineOptions(rows_at_a_time=3)))
    step.advance(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, len(table)):
            step.advance(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(step.state.x).all() and int(step.counters[0]) == len(table)


def test_a_lack_of_memory_in_the_side_branch_is_one(monkeypatch):
    pipe = made()
    forward, stream = type(pipe.classifier).forward, torch.cuda.current_stream()

    def full(self, *args, **options):
        if torch.cuda.is_current_stream_capturing():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *args, **options)

    monkeypatch.setattr(type(pipe.classifier), "forward", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        images(pipe, classes=0, seeds=1)
    assert torch.cuda.current_stream() == stream
    monkeypatch.undo()
    assert torch.isfinite(images(pipe)).all()


def test_cudnn_s_search_is_given_back(monkeypatch):
    before, seen, pipe = torch.backends.cudnn.benchmark, [], made()
    forward = type(pipe.net).forward

    def noting(self, *args, **options):  # not a hook, which would prevent the capture
        seen.append(torch.backends.cudnn.benchmark)
        return forward(self, *args, **options)

    monkeypatch.setattr(type(pipe.net), "forward", noting)
    images(pipe)
    assert set(seen) == {True} and torch.backends.cudnn.benchmark == before


def test_a_hook_is_called_at_every_row_of_a_captured_step_s_pipeline():
    pipe, seen = made(), []
    wanted = images(pipe, steps=5)
    handle = pipe.net.middle_block[0].in_layers[0].register_forward_hook(lambda *_: seen.append(1))
    images(pipe, steps=5)
    handle.remove()
    assert len(seen) == 5 and near(images(pipe, steps=5), wanted) and len(seen) == 5


def test_calls_on_two_streams_do_not_meet_in_the_buffers():
    pipe, streams = made(), [torch.cuda.Stream(), torch.cuda.Stream()]
    settings = [{"seeds": [4 * i + k for k in range(4)], "steps": 5} for i in range(8)]
    wanted = [images(pipe, **given) for given in settings]
    torch.cuda.synchronize()
    found = []
    for i, given in enumerate(settings):
        with torch.cuda.stream(streams[i % 2]):
            # Long enough that the next call begins before the last copy of this one is done.
            torch.cuda._sleep(20_000_000)
            found.append(images(pipe, **given))
        if i == 4:
            pipe.engine.release()
    torch.cuda.synchronize()
    assert all(near(a, b) for a, b in zip(found, wanted, strict=True))


def test_threads_on_streams_of_their_own_get_the_images_of_one_after_another():
    pipe = made()
    settings = [{"seeds": [4 * i + k for k in range(4)], "steps": 8} for i in range(3)]
    wanted = [images(pipe, **given) for given in settings]

    def work(given: dict) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = images(pipe, **given)
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, settings))
    assert all(near(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("move", ["assigned", "a part converted"])
def test_a_graph_of_freed_memory_is_not_replayed(move):
    pipe, wanted = made(), images(made())
    images(pipe)
    if move == "assigned":
        pipe.net.load_state_dict({k: v.clone() for k, v in pipe.net.state_dict().items()}, assign=True)
    else:
        pipe.net.middle_block.to(torch.float32)
    torch.cuda.empty_cache()
    filler = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(64)]
    assert near(images(pipe), wanted) and len(filler) == 64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    first = images(made())  # now torch's own capture stream belongs to device 0
    pipe = pipeline()
    pipe.net.to("cuda:1")
    pipe.classifier.to("cuda:1")
    got = images(pipe)
    assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert all(step.refusal is None for step in pipe.engine._steps.values())
    assert near(got.cpu(), first.cpu())
