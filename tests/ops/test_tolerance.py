"""Tests of the tolerance rule and of all-pairs covers, which the other tests of the ops use."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.cover import all_pairs
from tests.ops.tolerance import assert_same_formula, assert_within, unmodified


def rounded(truth: torch.Tensor) -> torch.Tensor:
    return truth.to(torch.float32)


TRUTH = torch.linspace(-1, 1, 1001, dtype=torch.float64)


def test_takes_the_rounding_of_the_reference():
    assert_within(rounded(TRUTH), rounded(TRUTH), TRUTH, "rounded")


@pytest.mark.parametrize("where", [slice(0, 1), slice(None)], ids=["one element", "all a little"])
def test_refuses_an_error_beyond_it(where):
    out = rounded(TRUTH)
    unit = torch.finfo(torch.float32).eps
    out[where] += 4 * unit if where == slice(0, 1) else unit
    with pytest.raises(AssertionError, match="largest error" if where == slice(0, 1) else "rms error"):
        assert_within(out, rounded(TRUTH), TRUTH, "off")


def test_refuses_nan_where_there_is_a_number_and_a_number_where_there_is_nan():
    out, truth = rounded(TRUTH), TRUTH.clone()
    out[3] = float("nan")
    with pytest.raises(AssertionError, match="largest error nan"):
        assert_within(out, rounded(TRUTH), truth, "nan")
    truth[5] = float("inf")
    with pytest.raises(AssertionError, match="NaN or infinities"):
        assert_within(rounded(TRUTH), rounded(TRUTH), truth, "inf")


def test_a_formula_in_float64_is_held_to_float64():
    x = TRUTH.float()
    assert_same_formula(lambda d: x.to(d).exp(), lambda d: 1 / (-x.to(d)).exp(), "exp")
    with pytest.raises(AssertionError, match="largest error"):
        assert_same_formula(lambda d: x.exp().to(d), lambda d: x.to(d).exp(), "rounded to float32 on the way")


def test_float32_is_exact_in_every_test():
    # cuDNN rounds the factors of convolutions to TF32 by default, by far more than the tolerance allows.
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_unmodified_sees_a_write_and_a_lost_sign_of_zero():
    x = torch.zeros(3)
    with pytest.raises(AssertionError, match="x was written to"), unmodified(x=x):
        x[1] = -0.0


def test_every_pair_occurs_and_the_cover_is_small():
    options = {"a": [1, 2, 3, 4], "b": [1, 2, 3], "c": [True, False], "d": ["x", "y", "z"]}
    cases = all_pairs(**options)
    for p, q in itertools.combinations(options, 2):
        assert {(case[p], case[q]) for case in cases} == set(itertools.product(options[p], options[q]))
    assert len(cases) < 20 and cases == all_pairs(**options)
