"""Tests of choosing an implementation: by argument, by environment, or else the first that can run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, Implementation, OpTable, attention, dispatch, group_norm_silu
from admfast.ops.dispatch import IMPL_VARIABLE


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(IMPL_VARIABLE, raising=False)


@pytest.fixture
def table(monkeypatch):
    """Return an op with three implementations: unavailable, small numbers only, and the reference."""
    monkeypatch.setattr(dispatch, "TABLES", dict(TABLES))
    return OpTable(
        "toy",
        [
            Implementation("absent", lambda x: ("absent", x), reason_missing=lambda: "no such device"),
            Implementation(
                "small", lambda x: ("small", x), reason_unsupported=lambda x: None if x < 10 else "x is large"
            ),
            Implementation("reference", lambda x: ("reference", x)),
        ],
    )


def run(table: OpTable, x: int, impl: str | None = None):
    return table.choose(impl, x).forward(x)[0]


def test_the_first_that_is_there_and_supports_the_call(table):
    assert run(table, 1) == "small"
    assert run(table, 11) == "reference"


@pytest.mark.parametrize("name", ["small", "reference"])
def test_by_argument(table, name):
    assert run(table, 1, name) == name


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        ("", "small"),
        (" , ", "small"),
        ("reference", "reference"),
        ("toy=reference", "reference"),
        ("small,toy=reference", "reference"),
        ("toy=reference,small", "reference"),
        ("attention=sdpa,reference", "reference"),
        ("attention=sdpa", "small"),
        (" toy = reference , attention = sdpa ", "reference"),
    ],
)
def test_by_environment(table, monkeypatch, value, chosen):
    monkeypatch.setenv(IMPL_VARIABLE, value)
    assert run(table, 1) == chosen


def test_the_argument_wins_over_the_environment(table, monkeypatch):
    monkeypatch.setenv(IMPL_VARIABLE, "reference")
    assert run(table, 1, "small") == "small"


@pytest.mark.parametrize(
    ("name", "x", "reason"), [("absent", 1, "no such device"), ("small", 11, "x is large")]
)
def test_asked_for_by_name_never_falls_back(table, monkeypatch, name, x, reason):
    with pytest.raises(Unavailable, match=f"^impl='{name}': toy can't run on it here: {reason}$"):
        run(table, x, name)
    for value in (name, f"toy={name}"):
        monkeypatch.setenv(IMPL_VARIABLE, value)
        with pytest.raises(Unavailable, match=f"^{IMPL_VARIABLE}='{value}': .*{reason}"):
            run(table, x)


def test_support_is_not_asked_of_what_is_not_there(table):
    def never(_x):
        raise AssertionError("asked")

    table.implementations[0] = Implementation(
        "absent", None, reason_missing=lambda: "gone", reason_unsupported=never
    )
    assert run(table, 1) == "small"


def test_unknown_names_are_refused_with_the_nearest(table, monkeypatch):
    with pytest.raises(InvalidArgument, match="^impl='referense': .*toy.*nearest: reference"):
        run(table, 1, "referense")
    monkeypatch.setenv(IMPL_VARIABLE, "referense")
    with pytest.raises(InvalidArgument, match=f"^{IMPL_VARIABLE}='referense': .*nearest: reference"):
        run(table, 1)
    monkeypatch.setenv(IMPL_VARIABLE, "toi=reference")
    with pytest.raises(
        InvalidArgument, match=f"^{IMPL_VARIABLE}='toi=reference': no op .*'toi'; nearest: toy"
    ):
        run(table, 1)
    monkeypatch.setenv(IMPL_VARIABLE, "toy=")
    with pytest.raises(InvalidArgument, match=f"^{IMPL_VARIABLE}='toy=': .*toy"):
        run(table, 1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("toy=reference,toi=small", "no op is called 'toi'; nearest: toy"),
        ("reference,atention=sdpa", "no op is called 'atention'; nearest: attention"),
        ("=reference", "no op is called ''"),
        ("reference,small", "two names for every op: 'reference' and 'small'"),
        ("toy=small,toy=reference", "two implementations of toy: 'small' and 'reference'"),
        ("attention=sdpa,toy=smal", "no implementation of toy is called 'smal'; nearest: small"),
    ],
)
def test_a_wrong_setting_is_refused_by_every_op_and_shown_whole(table, monkeypatch, value, reason):
    monkeypatch.setenv(IMPL_VARIABLE, value)
    with pytest.raises(InvalidArgument) as caught:
        run(table, 1)
    assert str(caught.value).startswith(f"{IMPL_VARIABLE}={value!r}: {reason}"), caught.value
    if "smal'" not in reason:
        with pytest.raises(InvalidArgument):
            attention(torch.randn(1, 2, 6), 1)


def test_where_nothing_serves_every_reason_is_said(table):
    del table.implementations[2]
    with pytest.raises(Unavailable, match="^toy: .*absent: no such device; small: x is large"):
        run(table, 11)


def test_what_was_measured_comes_first_where_it_can_run(table):
    first = {1: "reference", 2: "absent", 11: "small", 12: None}
    table.prefer = first.get
    assert [run(table, x) for x in first] == ["reference", "small", "reference", "reference"]
    assert run(table, 1, "small") == "small", "a named implementation has priority"
    table.prefer = lambda x: "referense"
    with pytest.raises(InvalidArgument, match="'referense'"):
        run(table, 1)


def test_choices_can_be_watched(table, monkeypatch):
    with dispatch.record_choices() as seen, dispatch.record_choices() as inner:
        run(table, 11)
        run(table, 1, "small")
        monkeypatch.setenv(IMPL_VARIABLE, "reference")
        run(table, 1)
    run(table, 1)
    against = {"absent": "no such device", "small": "x is large"}
    assert (
        seen
        == inner
        == [
            dispatch.Choice("toy", "reference", None, against),
            dispatch.Choice("toy", "small", "impl"),
            dispatch.Choice("toy", "reference", IMPL_VARIABLE),
        ]
    )


def test_who_watches_sees_its_own_thread_alone(table):
    def elsewhere():
        with dispatch.record_choices() as other:
            run(table, 11)
        return other

    with ThreadPoolExecutor(1) as threads, dispatch.record_choices() as seen:
        other = threads.submit(elsewhere).result()
        with dispatch.record_choices() as inner:
            pass
        run(table, 1)
    assert [choice.name for choice in other] == ["reference"] and inner == []
    assert [choice.name for choice in seen] == ["small"], "the inner watcher must not remove the outer one"
    assert not dispatch.choices_are_recorded()


@pytest.mark.parametrize("op", TABLES)
def test_every_op_has_its_reference_last_and_names_once(op):
    names = TABLES[op].names()
    assert TABLES[op].op == op and names[-1] == "reference" and len(set(names)) == len(names)
    reference = TABLES[op].implementations[-1]
    assert reference.reason_missing() is None and reference.reason_unsupported() is None


def test_the_environment_reaches_the_ops(monkeypatch):
    seen = []
    for op in ("attention", "group_norm_silu"):
        table = TABLES[op]
        original = table.implementations[-1].forward

        def watched(*args, _op=op, _original=original, **kwargs):
            seen.append(_op)
            return _original(*args, **kwargs)

        entry = Implementation("reference", watched)
        monkeypatch.setattr(table, "implementations", [*table.implementations[:-1], entry])
    monkeypatch.setenv(IMPL_VARIABLE, "reference")
    attention(torch.randn(1, 2, 6), 1)
    group_norm_silu(torch.randn(1, 2, 3), torch.ones(2), torch.zeros(2), 1)
    assert seen == ["attention", "group_norm_silu"]
