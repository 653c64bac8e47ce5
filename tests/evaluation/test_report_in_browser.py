"""Tests of the report in a headless browser: it opens without a network, and every image is shown."""

from __future__ import annotations

import numpy as np
import pytest

from admfast.evaluation import ArrayImages, evaluate, open_features
from admfast.evaluation.report import write_report
from tests.tools.browser import require_chromium

browsers = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = require_chromium()


def test_the_report_opens_alone(tmp_path):
    random = np.random.default_rng(0)
    samples, reference = (
        ArrayImages(random.integers(0, 256, (40, 32, 32, 1), dtype=np.uint8), np.arange(40) % 10, name)
        for name in ("samples", "reference")
    )
    path = tmp_path / "report.html"
    found = evaluate(samples, reference, open_features("digits32_classifier"))
    write_report(path, found, samples, reference, "imagenet64", {"seed": 0})
    requested, problems = [], []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        assert page.get_by_text("classifier score").first.is_visible()
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) > 40 and min(widths) > 0
        assert len(page.pdf()) > 10_000
        browser.close()
    assert problems == []
    assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]
