"""Tests of graph capture on any machine, with a fake torch.cuda that records the calls."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch

from admfast.engine.capture import WARM_UPS, capture
from admfast.engine.guidance import RowKind
from admfast.ops import TABLES
from tests.engine.test_step import step_of

DEVICE = torch.device("cuda:1")


class Stream:
    """A fake stream that records what it waits for."""

    def __init__(self, device: torch.device = DEVICE, priority: int = 0):
        self.device, self.priority, self.waited = device, priority, []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)

    wait_event = wait_stream

    def record_event(self) -> object:
        return f"event of {id(self)}"


class Cuda:
    """A fake torch.cuda for captures: the current stream, and captures that an error leaves unjoined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.home = self.current = Stream()
        self.capturing: Stream | None = None
        self.asked: list[object] = []
        self.replays = 0
        stand_ins = {
            "device": contextlib.nullcontext,
            "synchronize": lambda device: None,
            "Stream": Stream,
            "stream": self.stream,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "current_stream": self.current_stream,
            "graph_pool_handle": lambda: (0, 1),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: setattr(self, "replays", self.replays + 1)),
            "graph": self.graph,
        }
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.cleared: list[bool] = []
        self.ended: list[tuple] = []
        self.trivial = 0
        for name, value in {
            "_cuda_clearCublasWorkspaces": lambda: self.cleared.append(self.capturing is not None),
            "_cuda_endAllocateToPool": lambda device, pool: self.ended.append(("end", device, pool)),
            "_cuda_releasePool": lambda device, pool: self.ended.append(("release", device, pool)),
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        self.asked.append(device)
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode, pool=None, stream=None):
        assert capture_error_mode == "thread_local"
        if pool is None:  # the small capture that releases the generator
            self.trivial += 1
            yield
            return
        assert stream is not None and stream.device == DEVICE
        before, self.capturing, self.current = self.current, stream, stream
        try:
            yield
        except BaseException as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):  # ends the capture without breaking it
                self.current = before
                raise
            # torch raises this error too, and leaves the capture's stream current.
            raise RuntimeError("CUDA error: operation failed due to a capture that was not joined")  # noqa: B904
        finally:
            self.capturing = None
        self.current = before


def prepared(body) -> SimpleNamespace:
    """Return the attributes of a step that `capture` uses."""
    state = SimpleNamespace(x=SimpleNamespace(device=DEVICE))
    run = {RowKind(gradient=True): body, RowKind(): body}
    return SimpleNamespace(state=state, bodies=run, counters=torch.zeros(2), refusal=None, choices={})


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_warm_up_and_captures_run_on_one_stream_of_the_step_s_device(cuda):
    seen = []
    step = prepared(lambda: seen.append((cuda.current, cuda.capturing is not None)))
    capture(step)
    assert len({stream for stream, _ in seen}) == 1 and seen[0][0] is not cuda.home
    assert [captured for _, captured in seen] == [False] * 2 * WARM_UPS + [True] * 2
    assert set(cuda.asked) == {DEVICE} and cuda.current is cuda.home and step.refusal is None
    for replay in step.bodies.values():
        replay()
    assert cuda.replays == 2


def test_what_a_row_takes_is_seen_before_the_capture(cuda):
    step = prepared(lambda: TABLES["normal"].choose("reference"))
    capture(step)
    names = {kind: [choice.name for choice in choices] for kind, choices in step.choices.items()}
    assert step.captured and names == dict.fromkeys(step.bodies, ["reference"])


def failing(cuda, error: BaseException):
    """Return a body that raises only during capture."""

    def body() -> None:
        if cuda.capturing is not None:
            raise error

    return body


def test_a_refusal_is_told_by_its_first_error_and_leaves_the_stream(cuda, caplog):
    step = prepared(failing(cuda, RuntimeError("operation not permitted when stream is capturing\nmore")))
    before = dict(step.bodies)
    with caplog.at_level(logging.WARNING, logger="admfast"):
        capture(step)
    assert step.refusal == "operation not permitted when stream is capturing" and step.bodies == before
    assert "no CUDA graph of the step (operation not permitted" in caplog.text
    assert cuda.current is cuda.home


def test_a_lack_of_memory_in_a_capture_is_one(cuda):
    step = prepared(failing(cuda, torch.cuda.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        capture(step)
    assert cuda.current is cuda.home and step.refusal is None and not cuda.ended


def test_a_capture_that_can_not_end_gives_back_its_pool_and_the_generator(cuda, monkeypatch):
    step = prepared(failing(cuda, RuntimeError("not permitted")))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device=None: zeros(size))
    for version, ended in (("2.11.0", True), ("2.13.0", False)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        cuda.ended.clear()
        capture(step)
        assert cuda.ended == ([("end", 1, (0, 1)), ("release", 1, (0, 1))] if ended else [])
    assert cuda.trivial == 1


def test_an_error_in_a_capture_leaves_nothing_of_the_attempt_behind(cuda):
    class Activation:
        pass

    alive: list[weakref.ref] = []

    def body() -> None:
        if cuda.capturing is not None:
            activation = Activation()
            alive.append(weakref.ref(activation))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    gc.disable()
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            capture(prepared(body))
        del caught
        assert alive[0]() is None
    finally:
        gc.enable()


def test_a_step_whose_capture_was_refused_is_freed_without_the_collector(cuda, monkeypatch):
    def update(*_: object, **__: object) -> None:
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    step, _, _ = step_of()
    monkeypatch.setattr(f"{__name__}.DEVICE", step.state.x.device)
    step.update = update
    capture(step)
    assert step.refusal is not None
    dropped = weakref.ref(step)
    gc.collect()
    gc.disable()
    try:
        del step
        assert dropped() is None
    finally:
        gc.enable()


def test_a_capture_runs_without_python_s_collector_and_between_clean_workspaces(cuda):
    seen = []
    capture(prepared(lambda: seen.append((cuda.capturing is not None, gc.isenabled()))))
    assert seen == [(False, True)] * 2 * WARM_UPS + [(True, False)] * 2 and gc.isenabled()
    assert cuda.cleared == [False, False]


def test_an_interrupt_in_a_capture_is_no_refusal(cuda):
    step = prepared(failing(cuda, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        capture(step)
    assert cuda.current is cuda.home and step.refusal is None


def test_a_lack_of_memory_before_the_capture_is_not_its_own(cuda):
    step = prepared(failing(cuda, RuntimeError("not permitted")))
    try:
        raise torch.cuda.OutOfMemoryError("of the caller's larger batch")
    except torch.cuda.OutOfMemoryError:
        capture(step)
    assert step.refusal == "not permitted"


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_searches_while_a_step_is_captured(cuda, monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    before, seen = torch.backends.cudnn.benchmark, []
    capture(prepared(lambda: seen.append(torch.backends.cudnn.benchmark)))
    assert set(seen) == {not deterministic} and torch.backends.cudnn.benchmark == before


# Several streams


def test_branches_fork_from_the_current_stream_of_their_device(monkeypatch):
    step, _, _ = step_of()
    cuda = Cuda(monkeypatch)
    step.classifier_stream = Stream()
    step.body(RowKind(gradient=True))
    assert cuda.asked == [step.state.x.device]
    assert step.classifier_stream.waited == [cuda.home] and cuda.home.waited == [step.classifier_stream]


@pytest.mark.parametrize("part", ["_net_output", "_guidance_gradient"])
def test_branches_join_when_one_fails(monkeypatch, part):
    step, _, _ = step_of()
    cuda = Cuda(monkeypatch)
    step.classifier_stream = Stream()

    def fails(*arguments: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step, part, fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step.body(RowKind(gradient=True))
    assert cuda.home.waited == [step.classifier_stream]


def test_buffers_pass_from_stream_to_stream(monkeypatch):
    step, _, _ = step_of()
    recorded = []
    buffer = SimpleNamespace(record_stream=recorded.append)
    monkeypatch.setattr(step, "_buffers", lambda: [buffer])
    step._allocation_stream, step._last_use, other = Stream(), "the end of the last batch", Stream()
    step._wait_for_last_use(step._allocation_stream)
    assert step._allocation_stream.waited == ["the end of the last batch"] and recorded == []
    step._wait_for_last_use(other)
    assert other.waited == ["the end of the last batch"] and recorded == [other]


def test_a_batch_leaves_its_step_after_its_images_were_copied(monkeypatch):
    from admfast.engine.step import PreparedStep
    from tests.small import pipeline

    left = []
    monkeypatch.setattr(PreparedStep, "mark_last_use", lambda step: left.append(step.counters.tolist()[0]))
    pipeline().sample(seeds=[1], steps=3)
    assert left == [0, 3]
