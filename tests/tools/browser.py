"""Find the headless browser of the tests."""

from __future__ import annotations

import shutil

import pytest


def require_chromium() -> str:
    """Return the path of Chromium; skip the module's tests without it."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed", allow_module_level=True)
    return found
