"""Tests of the processes of a run; those of `tests/training/test_train_processes.py` start several."""

from __future__ import annotations

import pytest
import torch

from admfast.distributed import World, join_processes


def test_a_batch_is_shared_evenly():
    assert list(World(1, 3).local_samples(6)) == [2, 3]
    with pytest.raises(ValueError, match="batch_size"):
        World(1, 4).local_samples(6)


def test_one_process_has_no_group_and_exchanges_nothing():
    with join_processes("cpu") as world:
        assert world == World(0, 1, torch.device("cpu")) and world.is_first
        assert not torch.distributed.is_initialized()
    values = torch.arange(3.0)
    assert world.all_reduce_sum(values) is values and world.all_gather(values) is values
    assert world.all_reduce_max(3) == 3
