"""Shared set-up of all tests: Triton's interpreter, exact float32, fixtures, and the time of each group.

Without a CUDA device the tests run the Triton kernels in Triton's interpreter. Triton reads the variable
when a kernel is decorated, so it is set here before anything is imported. The default implementations stay
the same: the interpreter runs only where a test names `triton`.
"""

import collections
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from admfast.engine.precision import POLICIES, Policy, policy  # noqa: E402
from tests.tools import elsewhere  # noqa: E402


@pytest.fixture(autouse=True)
def float32_products_are_exact() -> Iterator[None]:
    """Turn off TF32, which torch's convolutions on a GPU use by default, and restore the settings afterwards.

    A test of TF32 turns it on itself.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(params=["fp32", "bf16"])
def default_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Run the test as on a CPU without AMX (default precision fp32) and as on one with AMX (bf16)."""
    monkeypatch.setattr("admfast.engine.precision.has_amx", lambda: request.param == "bf16")
    assert policy("auto", torch.device("cpu")) is POLICIES[request.param]
    return POLICIES[request.param]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process follow Windows' rules for files, locks and memory."""
    for name in elsewhere.UNIX_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "msvcrt", elsewhere.MSVCRT)
    for place, name, value in elsewhere.windows_rules():
        monkeypatch.setattr(place, name, value, raising=False)


@pytest.fixture(params=["own", "windows"])
def system(request: pytest.FixtureRequest) -> str:
    """Run the test twice: with this machine's rules, and with those of Windows."""
    if request.param != "own":
        request.getfixturevalue(request.param)
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each group: a folder of tests/, or a file directly in tests/."""
    seconds: collections.Counter[str] = collections.Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            path = report.nodeid.partition("::")[0].removeprefix("tests/")
            seconds[path.partition("/")[0]] += report.duration
    terminalreporter.section("seconds of each group")
    for group, time in seconds.most_common():
        terminalreporter.line(f"{time:8.1f}  {group}")
