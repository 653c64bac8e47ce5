"""The models of the page, loaded once for its tests."""

from __future__ import annotations

import pytest

from admfast.app.models import AppModel, load_models


@pytest.fixture(scope="session")
def models() -> dict[str, AppModel]:
    return load_models(device="cpu")
