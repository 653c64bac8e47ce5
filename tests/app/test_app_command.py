"""Tests of `admfast app` before it serves: options, a missing package, and a wrong address."""

from __future__ import annotations

import re
import socket
import sys

import pytest

from admfast.app.models import SHIPPED
from admfast.cli.main import main


@pytest.fixture
def served(monkeypatch) -> list:
    """Return the list that gets the arguments of each call of `serve`, which serves nothing."""
    pytest.importorskip("nicegui", reason="the page's packages aren't installed: pip install -e '.[app]'")
    calls: list = []
    monkeypatch.setattr("admfast.app.server.serve", lambda *arguments: calls.append(arguments))
    return calls


def test_only_this_machine_is_let_in_by_default(served):
    with socket.socket() as taken:  # another program may have the port
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    assert main(["app", "--device", "cpu", "--port", str(port)]) == 0
    [(models, host, shown_port, opens_browser)] = served
    assert (tuple(models), host, shown_port, opens_browser) == (SHIPPED, "127.0.0.1", port, True)


@pytest.mark.parametrize(
    "options, line",
    [
        (["--host", "no host"], "--host='no host': "),
        (["--host", "192.0.2.1"], "--host='192.0.2.1': "),
        (["--port", "0"], "--port=0: a whole number from 1 to 65535"),
        (["--port", "99999"], "--port=99999: "),
        (["--model", "nothing"], "--model='nothing': "),
        (["--device", "toaster"], "--device='toaster': "),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line(served, options, line, capsys):
    free = [] if "--port" in options else ["--port", "8499"]
    assert main(["app", "--no-open", *free, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"admfast: {line}") and errors.count("\n") == 1 and served == []


def test_a_port_that_is_taken_is_one_line(served, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["app", "--port", str(taken.getsockname()[1])]) == 2
    assert re.match(r"admfast: --port=\d+: a free port", capsys.readouterr().err)


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("admfast.app.") and "models" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err == 'admfast: nicegui is not installed: pip install "admfast[app]"\n'


def test_the_help_needs_no_packages_of_the_page(capsys):
    before = set(sys.modules)
    assert main(["app", "--help"]) == 0
    text = capsys.readouterr().out
    assert not {"nicegui", "uvicorn"} & (set(sys.modules) - before)
    for option in ("--model", "--weights", "--device", "--host", "--port", "--no-open"):
        assert option in text
