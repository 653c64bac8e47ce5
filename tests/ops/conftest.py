"""Share fixtures among the tests of the ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same numbers for every test, and let no environment choose the implementation."""
    torch.manual_seed(0)
    monkeypatch.delenv("ADMFAST_IMPL", raising=False)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill with NaN what torch allocates."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
