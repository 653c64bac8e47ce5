"""Tests that a solver is a value: it keeps its options and rows, and its text holds every option."""

from __future__ import annotations

import pickle

import pytest

from admfast.errors import InvalidArgument
from admfast.sampling.request import SampleRequest
from admfast.solvers import SOLVERS, Solver, ddim, parse_solver
from tests.small import pipeline


def rows_of(process, *, clip, option=None):
    return ddim().table(process, clip)


def rows_of_eta_1(process, *, clip, option=None):
    return ddim(eta=1.0).table(process, clip)


def mine(*, option=None) -> Solver:
    return Solver("mine", rows_of, {"option": option})


@pytest.mark.parametrize(
    "value", [True, False, None, 3, 0.5, "log", "3", "true", "a,b", [1, 2.5], [True, None]]
)
def test_its_text_holds_every_option(value, monkeypatch):
    monkeypatch.setitem(SOLVERS, "mine", mine)
    found = parse_solver(str(mine(option=value)))
    assert found == mine(option=value) and type(found.options["option"]) is type(value)
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    "text, value", [("True", True), ("None", None), (".5", 0.5), ("log", "log"), (" [1, 2] ", [1, 2])]
)
def test_options_are_read_as_people_write_them(text, value, monkeypatch):
    monkeypatch.setitem(SOLVERS, "mine", mine)
    assert parse_solver(f"mine: option = {text}").options["option"] == value


def test_an_option_is_said_once():
    with pytest.raises(InvalidArgument, match="^solver="):
        parse_solver("ddim:eta=0.5,eta=0.7")


def test_options_do_not_change():
    with pytest.raises(TypeError):
        parse_solver("ddim").options["eta"] = 1.0
    given = {"option": 1}
    solver = Solver("mine", rows_of, given)
    given["option"] = 2
    assert solver.options == {"option": 1}


def test_solvers_of_one_name_have_each_its_own_rows():
    first, second = (Solver("mine", rows) for rows in (rows_of, rows_of_eta_1))
    assert first != second
    images = [
        pipeline().sample([1], [0], steps=3, solver=solver, output="float") for solver in (first, second)
    ]
    assert (images[0] - images[1]).abs().max() > 0.01


def test_json_holds_registered_solvers_alone():
    with pytest.raises(InvalidArgument, match="^solver="):
        SampleRequest(solver=Solver("ddim", rows_of, {"eta": 0.0})).to_json()
