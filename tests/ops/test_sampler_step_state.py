"""Tests of the update's state: versions of the tensors that it writes, and states that it refuses."""

from __future__ import annotations

import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.ops import SamplerState
from tests.ops.anywhere import runnable, sampler_step
from tests.ops.test_sampler_step_call import SHAPE, buffers, filled, randn

IMPLEMENTATIONS = runnable("sampler_step")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_versions_count_the_writes(impl):
    state, arguments = filled()
    versions = [t._version for t in buffers(state)]
    sampler_step(state, impl=impl, **arguments)
    assert all(t._version > before for t, before in zip(buffers(state), versions, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_backward_through_the_old_state_is_noticed(impl):
    state, arguments = filled()
    leaf = randn(*SHAPE, seed=9).requires_grad_(True)
    loss = (leaf * state.x).sum()
    sampler_step(state, impl=impl, **arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, None])
def test_buffers_that_share_memory_are_refused(impl):
    state, arguments = filled()
    x, x0, saved, history = buffers(state)
    whole = torch.zeros(x.numel() + 1)
    shifted = whole[1:].view(x.shape)
    for shared, message in (
        (SamplerState(x, x, saved, history), "state.x0='memory of state.x'"),
        (SamplerState(x, x0, x, history), "state.x='memory of state.saved'"),
        (SamplerState(x, history[2], saved, history), "state.x0='memory of state.history'"),
        (SamplerState(whole[:-1].view(x.shape), shifted, saved, history), "state.x0='memory of state.x'"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}: memory of its own"):
            sampler_step(shared, impl=impl, **arguments)
