"""Tests of the summary at the end of a test run: the seconds of each group."""

from __future__ import annotations

import re
from pathlib import Path

pytest_plugins = ["pytester"]
CONFTEST = Path(__file__).with_name("conftest.py")
SLEEP = "import time\n\ndef test_one():\n    time.sleep({})\n"


def test_each_folder_and_each_file_beside_them_has_its_time(pytester):
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    for path, text in {
        "tests/ops/test_a.py": SLEEP.format(0.4) + "    assert False\n",
        "tests/ops/deeper/test_b.py": SLEEP.format(0.4),
        "tests/files/test_c.py": SLEEP.format(0.2),
        "tests/test_d.py": "import pytest\n\n@pytest.mark.skip\ndef test_no(): ...\n",
    }.items():
        file = pytester.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    lines = pytester.runpytest_inprocess("-p", "no:cacheprovider").stdout.lines
    start = next(i for i, line in enumerate(lines) if "seconds of each group" in line)
    times = [re.fullmatch(r" +(\d+\.\d)  (\S+)", line).groups() for line in lines[start + 1 : start + 4]]
    assert [group for _, group in times] == ["ops", "files", "test_d.py"]
    assert all(float(time) >= least for (time, _), least in zip(times, (0.8, 0.2, 0.0), strict=True))
