"""What all tests share: the interpreter where there is no GPU, and the time of each group at the end.

Without a CUDA device the Triton kernels are tested through Triton's interpreter. Triton reads the variable
when a kernel's decorator runs, hence here, before anything is imported. What is chosen by default stays the
same: the interpreter runs only where it is named.
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
    """Round no factor of a float32 product to TF32, as torch's convolutions on a GPU do unless told.

    A test about TF32 sets itself what it is about; what the process had comes back after each test.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(params=["fp32", "bf16"])
def default_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Run the test as on a CPU without AMX and as on one with it, whose default precisions these are."""
    monkeypatch.setattr("admfast.engine.precision.has_amx", lambda: request.param == "bf16")
    assert policy("auto", torch.device("cpu")) is POLICIES[request.param]
    return POLICIES[request.param]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process Windows' rules for files, locks and memory."""
    for name in elsewhere.UNIX_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "msvcrt", elsewhere.MSVCRT)
    for place, name, value in elsewhere.windows_rules():
        monkeypatch.setattr(place, name, value, raising=False)


@pytest.fixture(params=["own", "windows"])
def system(request: pytest.FixtureRequest) -> str:
    """Run the test by the rules of this machine, and by those of Windows."""
    if request.param != "own":
        request.getfixturevalue(request.param)
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each group: a folder of tests/, or a file that lies beside the folders."""
    seconds: collections.Counter[str] = collections.Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            path = report.nodeid.partition("::")[0].removeprefix("tests/")
            seconds[path.partition("/")[0]] += report.duration
    terminalreporter.section("seconds of each group")
    for group, time in seconds.most_common():
        terminalreporter.line(f"{time:8.1f}  {group}")
