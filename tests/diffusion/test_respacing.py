"""Tests of respacing: every way to write a spec, the properties of the steps, and the errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admfast.diffusion import space_timesteps
from admfast.errors import InvalidArgument

TOTAL = 1000


@pytest.mark.parametrize("total", [1, 7, 250, TOTAL])
def test_every_ddim_count_is_served(total):
    for count in range(1, total + 1):
        steps = space_timesteps(total, f"ddim{count}")
        gaps = np.diff(steps)
        assert len(steps) == count and steps[0] == 0 and steps[-1] < total
        assert count == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_ddim_takes_the_integer_stride_where_there_is_one():
    served = 0
    for count in range(1, TOTAL + 1):
        try:
            published = space_timesteps(TOTAL, f"ddim{count}", published=True)
        except InvalidArgument:
            continue
        served += 1
        stride = published[1] - published[0]
        assert published == list(range(0, TOTAL, stride)) == space_timesteps(TOTAL, f"ddim{count}")
        assert all(len(range(0, TOTAL, smaller)) != count for smaller in range(1, stride))
    assert served == len({len(range(0, TOTAL, stride)) for stride in range(1, TOTAL)})


def test_published_ddim_fails_on_191_counts_up_to_250():
    def fails(count: int) -> bool:
        try:
            space_timesteps(TOTAL, f"ddim{count}", published=True)
        except InvalidArgument:
            return True
        return False

    failing = [count for count in range(1, 251) if fails(count)]
    assert len(failing) == 191 and {37, 41, 60, 64} <= set(failing)


def test_the_float_stride_is_summed():
    """The published code sums a float stride; rounding linspace keeps other steps for 278 of the counts."""
    differing = 0
    for count in range(2, TOTAL + 1):
        steps = space_timesteps(TOTAL, str(count))
        assert steps[0] == 0 and steps[-1] == TOTAL - 1
        differing += steps != np.round(np.linspace(0, TOTAL - 1, count)).astype(int).tolist()
    assert differing == 278


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", list(range(12))),
        ("3", [0, 6, 11]),  # 5.5 rounds to the even 6
        (3, [0, 6, 11]),
        (np.int64(3), [0, 6, 11]),
        ("2,1,3", [0, 3, 4, 8, 10, 11]),  # 1.5 rounds to the even 2
        (" 2, 1 ,3 ", [0, 3, 4, 8, 10, 11]),
        ("0,2", [6, 11]),
        ("0", []),
        ("ddim4", [0, 3, 6, 9]),
        ("ddim5", [0, 2, 4, 7, 9]),  # no integer stride
        ([0, 10, 5], [0, 5, 10]),
        ((11,), [11]),
        (range(0, 12, 4), [0, 4, 8]),
        (np.array([1, 2]), [1, 2]),
        ("[0,10, 5]", [0, 5, 10]),
    ],
)
def test_forms_of_the_spec(spec, expected):
    steps = space_timesteps(12, spec)
    assert steps == expected
    assert all(type(step) is int for step in steps)


def test_a_published_list_holds_counts_per_section():
    assert space_timesteps(12, [2, 1, 3], published=True) == space_timesteps(12, "2,1,3")
    assert space_timesteps(12, [-1, 2], published=True) == space_timesteps(12, "0,2")


@given(data=st.data(), total=st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_sections_keep_their_counts(data, total):
    sections = data.draw(st.integers(1, min(total, 6)))
    sizes = [total // sections + (i < total % sections) for i in range(sections)]
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    steps = space_timesteps(total, ",".join(map(str, counts)))
    assert steps == sorted(set(steps)) and len(steps) == sum(counts)
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        inside = [step - start for step in steps if start <= step < start + size]
        assert len(inside) == count
        assert count < 1 or inside[0] == 0
        assert count < 2 or inside[-1] == size - 1
        assert np.all(np.abs(np.array(inside) - np.linspace(0, size - 1, count)) <= 0.5 + 1e-9) or count == 1
        start += size


@given(total=st.integers(1, 400), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_list_is_itself_sorted(total, data):
    wanted = data.draw(st.lists(st.integers(0, total - 1), min_size=1, unique=True))
    assert space_timesteps(total, wanted) == space_timesteps(total, str(wanted)) == sorted(wanted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dim25", "respacing='dim25': .*nearest: ddim25"),
        ("ddmi50", "nearest: ddim50"),
        ("DDIM10", "respacing='DDIM10': .*ddimN"),
        ("ddim", "respacing='ddim': .*nearest: ddim25"),
        ("ddim0", "respacing='ddim0': ddimN with N from 1 to 1000"),
        ("ddim-3", "N from 1 to 1000"),
        ("ddim1001", "N from 1 to 1000"),
        ("1001", "respacing='1001': section 0 of 1 takes a count from 0 to 1000"),
        ("400,400,400", "section 0 of 3 takes a count from 0 to 334"),
        ("10,-1", "respacing='10,-1': section 1 of 2"),
        ("10,,10", "respacing='10,,10'"),
        ("2.5", "respacing='2.5'"),
        (1001, "respacing=1001: a whole number from 0 to 1000"),
        (2.5, "respacing=2.5: a whole number"),
        (True, "respacing=True"),
        (None, "respacing=None"),
        ([0, 1000], "timestep=1000: a whole number from 0 to 999"),
        ([-1], "timestep=-1"),
        ([0, 1.5], "timestep=1.5"),
        ([3, 3], r"respacing=\[3, 3\]: each timestep once; 3 is there twice"),
        ([], "at least one timestep"),
        ("[]", "a list of timesteps from 0 to 999"),
        ("[0,x]", r"respacing='\[0,x\]': a list of timesteps"),
        ("[0,1000]", "timestep=1000"),
    ],
    ids=str,
)
def test_a_bad_spec_is_named_with_what_is_allowed(spec, message):
    with pytest.raises(InvalidArgument, match=message):
        space_timesteps(TOTAL, spec)


@pytest.mark.parametrize("spec", ["", "[0,10]", "ddim37", "dim25", []])
def test_published_refuses_what_is_ours(spec):
    with pytest.raises(InvalidArgument):
        space_timesteps(TOTAL, spec, published=True)


@pytest.mark.parametrize("total", [0, -1, 2.0, "1000", None])
def test_a_bad_length_is_named(total):
    with pytest.raises(InvalidArgument, match=re.escape(f"num_timesteps={total!r}: a whole number")):
        space_timesteps(total, "10")
