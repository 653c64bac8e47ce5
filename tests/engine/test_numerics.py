"""Tests of the process-wide settings that a pipeline changes while it works and then restores."""

from __future__ import annotations

import contextlib

import pytest
import torch

from admfast import host
from admfast.engine.numerics import fixed_numerics
from tests.small import pipeline

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("first_out", [0, 1], ids=["first in, first out", "last in, first out"])
def test_calls_that_overlap_leave_the_process_as_it_was(first_out):
    # Calls of two threads may end in any order.
    before = tf32()
    calls = [contextlib.ExitStack(), contextlib.ExitStack()]
    calls[0].enter_context(fixed_numerics(CUDA, tf32=True))
    calls[1].enter_context(fixed_numerics(CUDA, tf32=False))
    assert tf32() == (False, False)
    calls[first_out].close()
    assert tf32() == ((False, False) if first_out == 0 else (True, True))
    calls[1 - first_out].close()
    assert tf32() == before


@pytest.fixture
def threads():
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("asked, there, used", [(4, 2, 2), (2, 4, 2), (1, 1, 1)])
@pytest.mark.usefixtures("threads")
def test_no_more_threads_than_processors(asked, there, used, monkeypatch):
    monkeypatch.setattr(host, "usable_cpus", lambda: there)
    torch.set_num_threads(asked)
    seen: list[int] = []
    pipeline().sample(seeds=[1], steps=1, callback=lambda _: seen.append(torch.get_num_threads()))
    assert seen == [used] and torch.get_num_threads() == asked
    with pytest.raises(ZeroDivisionError), fixed_numerics(CPU):
        raise ZeroDivisionError
    assert torch.get_num_threads() == asked
