"""Shared fixtures of the tests of the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed torch, and unset ADMFAST_IMPL so that it can't choose the implementation."""
    torch.manual_seed(0)
    monkeypatch.delenv("ADMFAST_IMPL", raising=False)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Make torch fill new tensors with NaN, through its deterministic mode."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return torch.set_num_threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
