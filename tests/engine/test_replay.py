"""Tests of operations that are recorded on a CPU and repeated: same bits, and when the body runs instead."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.engine.options import EngineOptions
from admfast.engine.precision import POLICIES
from admfast.engine.replay import Replay
from admfast.models.hooks import count_hooks_made, skip_hook_checks
from tests.small import cascade, pipeline

SETTINGS: dict[str, Any] = dict(classes=[0, 3], seeds=[5, 6], steps=9, output="float", batch_size=2)
EAGER = EngineOptions(graph=False)


def replays(pipe: Any) -> list[Replay]:
    return [replay for step in pipe.engine._steps.values() for replay in step.replays.values()]


@pytest.fixture
def surveyed_now():
    """Run the test as a row of a prepared step whose networks have no hooks."""
    with skip_hook_checks(count_hooks_made()), torch.no_grad():
        yield


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_interval": (300, 800)},
        {"solver": "ddim:eta=0.5"},
        {"guidance": 0.0},
        {"step_noise": torch.linspace(-1, 1, 9 * 2 * 64).view(9, 2, 1, 8, 8)},
    ],
    ids=["guided", "both kinds", "ddim", "plain", "given noise"],
)
def test_a_replayed_run_has_the_bits_of_an_eager_one(precision, settings):
    pipe = pipeline(policy=POLICIES[precision])
    wanted = pipeline(policy=POLICIES[precision], options=EAGER).sample(**SETTINGS | settings)
    assert torch.equal(pipe.sample(**SETTINGS | settings), wanted)
    found = replays(pipe)
    assert found and all(replay.reason_not_replayed is None for replay in found if replay._calls)
    assert any(replay.reason_not_replayed is None for replay in found)
    # The second run repeats every row, with other seeds in between.
    pipe.sample(**SETTINGS | settings | {"seeds": [8, 9]})
    assert torch.equal(pipe.sample(**SETTINGS | settings), wanted)


def test_a_cascade_is_replayed():
    wanted, pipe = cascade(options=EAGER).sample(**SETTINGS), cascade()
    assert torch.equal(pipe.sample(**SETTINGS), wanted)
    assert replays(pipe) and replays(pipe.upsampler)


def test_new_weights_are_used():
    pipe, plain = pipeline(), pipeline(options=EAGER)
    before = pipe.sample(**SETTINGS)
    for own in (pipe, plain):
        with torch.no_grad():
            own.net.out[-1].weight.mul_(1.5)
    after = pipe.sample(**SETTINGS)
    assert not torch.equal(after, before)
    assert torch.equal(after, plain.sample(**SETTINGS))


def test_forms_of_many_batch_sizes_are_renewed():
    """A convolution keeps its forms for two sizes only, a replay may hold a third one."""
    pipe, plain = pipeline(), pipeline(options=EAGER)
    sizes = [dict(SETTINGS, seeds=range(n), batch_size=n) for n in (1, 2, 3)]
    for settings in sizes:
        pipe.sample(**settings)
    for own in (pipe, plain):
        with torch.no_grad():
            for parameter in own.net.parameters():
                parameter.mul_(1.1)
    for settings in sizes:
        assert torch.equal(pipe.sample(**settings), plain.sample(**settings))


def test_a_hook_sees_every_row():
    pipe, seen = pipeline(), []
    pipe.sample(**SETTINGS)
    handle = pipe.net.middle_block[0].register_forward_hook(lambda *_: seen.append(1))
    pipe.sample(**SETTINGS)
    assert len(seen) == SETTINGS["steps"]
    handle.remove()


def test_a_hook_made_by_a_callback_sees_the_rows_after_it():
    pipe, seen = pipeline(), []

    def callback(*_: Any) -> None:
        if not seen:
            pipe.net.middle_block[0].register_forward_hook(lambda *_: seen.append(1))
            seen.append(0)

    pipe.sample(**SETTINGS, callback=callback)
    assert sum(seen) == SETTINGS["steps"] - 1


def test_a_dispatch_mode_sees_every_row():
    from torch.utils.flop_counter import FlopCounterMode

    pipe, plain = pipeline(), pipeline(options=EAGER)
    counts = []
    for own in (pipe, plain):
        own.sample(**SETTINGS)
        with FlopCounterMode(display=False) as counter:
            own.sample(**SETTINGS)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_dropped_step_is_freed_at_once():
    pipe = pipeline()
    pipe.sample(**SETTINGS)
    (step,) = pipe.engine._steps.values()
    left = weakref.ref(step.state.x)
    gc.collect()
    gc.disable()
    try:
        del step
        pipe.engine.release()
        assert left() is None
    finally:
        gc.enable()


# The recorder


def test_rows_are_recorded_checked_and_repeated(surveyed_now):
    x, calls = torch.zeros(3), []

    def body() -> None:
        calls.append(1)
        y = x + 1
        x.copy_(y.view(3, 1).squeeze(1))

    replay = Replay(body)
    for _ in range(6):
        replay()
    assert len(calls) == 3 and x.tolist() == [6.0, 6.0, 6.0]
    replay.forget()
    replay()
    assert len(calls) == 4 and replay.reason_not_replayed


def test_what_changes_outside_of_torch_is_noticed(surveyed_now):
    """The third row differs from its recording, so the body goes on."""
    x, calls = torch.zeros(3), []

    def body() -> None:
        calls.append(1)
        x.add_(float(len(calls)))

    replay = Replay(body)
    for _ in range(5):
        replay()
    assert "another result" in str(replay.refusal) and x.tolist() == [15.0] * 3


def test_a_value_read_by_the_host_is_refused(surveyed_now):
    x = torch.ones(1)

    def body() -> None:
        x.mul_(2 if float(x) < 100 else 1)

    replay = Replay(body)
    for _ in range(9):
        replay()
    assert "reads a value" in str(replay.refusal) and x.item() == 128


def test_an_error_while_recording_is_raised_and_recorded_again(surveyed_now):
    x, fail = torch.zeros(2), [False, True, False, False, False]

    def body() -> None:
        if fail.pop(0):
            raise RuntimeError("once")
        x.add_(1)

    replay = Replay(body)
    replay()
    with pytest.raises(RuntimeError, match="once"):
        replay()
    for _ in range(3):
        replay()
    assert replay.reason_not_replayed is None and not fail[1:] and x.tolist() == [4.0, 4.0]


def test_gradients_and_saved_results_are_recorded(surveyed_now):
    """A function's saved output comes back as another tensor object, which no operation returns."""
    x, out = torch.linspace(-1, 1, 8), torch.zeros(8)

    def body() -> None:
        with torch.enable_grad():
            given = x.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(given.sigmoid().exp().sum(), given)
        out.add_(g)
        x.mul_(0.5)

    eager = [x.clone(), out.clone()]
    replay = Replay(body)
    for _ in range(6):
        replay()
    got = [x.clone(), out.clone()]
    assert replay.reason_not_replayed is None
    for t, before in zip((x, out), eager, strict=True):
        t.copy_(before)
    for _ in range(6):
        body()
    assert torch.equal(got[0], x) and torch.equal(got[1], out)


def test_intermediate_results_are_not_kept(surveyed_now):
    x: Tensor = torch.zeros(4)
    made: list[weakref.ref] = []

    def body() -> None:
        y = x + 1
        made.append(weakref.ref(y))
        x.copy_(y)

    replay = Replay(body)
    for _ in range(4):
        replay()
    assert all(ref() is None for ref in made)
