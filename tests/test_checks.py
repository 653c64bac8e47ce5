"""Tests of the checks of single arguments: accepted values, returned forms, and errors that name them."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from admfast import checks
from admfast.errors import InvalidArgument

IMAGES = torch.zeros(2, 3, 4, 4)
META = torch.tensor(2, device="meta")


@pytest.mark.parametrize(
    "found, expected",
    [
        (checks.whole_number("n", np.int16(3), 1), 3),
        (checks.whole_number("n", 3, 1, 3), 3),
        (checks.whole_number("n", torch.tensor(3), 1, 3), 3),
        (checks.whole_number("n", np.array(3), 1, 3), 3),
        (checks.whole_number("n", -1, 1, special=-1), -1),
        (checks.whole_numbers("n", torch.tensor([0, 2]), 0, 2), [0, 2]),
        (checks.whole_numbers("n", [torch.tensor(1), np.int64(2)], 0), [1, 2]),
        (checks.whole_numbers("n", range(2), 0), [0, 1]),
        (checks.whole_numbers("n", 5, 0), [5]),
        (checks.as_list("12"), ["12"]),
        (checks.finite_float("x", 0, least=0, most=0), 0.0),
        (checks.finite_float("x", Fraction(1, 2), above=0, below=1), 0.5),
        (checks.finite_float("x", np.float32(0.5)), 0.5),
        (checks.finite_float("x", np.array(0.5)), 0.5),
        (checks.finite_float("x", torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)), 0.5),
        (checks.interval("x", torch.tensor([200, 800])), (200.0, 800.0)),
        (checks.interval("x", (torch.tensor(0.5), 1)), (0.5, 1.0)),
        (checks.boolean("s", False), False),
        (checks.boolean("s", np.bool_(True)), True),
        (checks.boolean("s", np.array(False)), False),
        (checks.boolean("s", torch.tensor(True)), True),
        (checks.one_of("kind", "b", "abc"), "b"),
    ],
)
def test_a_value_comes_back_in_one_form(found, expected):
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value",
    [
        0,
        4,
        2.0,
        True,
        None,
        "2",
        torch.tensor([2]),
        torch.tensor(2.0),
        torch.tensor(True),
        np.bool_(1),
        META,
        [2],
        -1,
    ],
)
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(InvalidArgument, match="^n="):
        checks.whole_number("n", value, 1, 3)


@pytest.mark.parametrize(
    "value, ends",
    [
        (0, {"above": 0}),
        (-1, {"least": 0}),
        (1, {"below": 1}),
        (1.5, {"most": 1}),
        (float("nan"), {}),
        (float("inf"), {}),
        (True, {}),
        ("1", {}),
        (None, {}),
        (torch.tensor(True), {}),
        (torch.tensor([1.0]), {}),
        (torch.tensor(1j), {}),
        (np.array(True), {}),
        (META, {}),
    ],
)
def test_what_is_no_number_in_range_is_refused(value, ends):
    with pytest.raises(InvalidArgument, match="^x="):
        checks.finite_float("x", value, **ends)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda value=value: checks.boolean("given", value) for value in (1, "no", None, np.int8(1), META)),
        *(
            lambda value=value: checks.boolean("given", value)
            for value in (torch.tensor([True]), torch.ones(()))
        ),
        lambda: checks.one_of("given", "d", "abc"),
        lambda: checks.one_of("given", np.array(["a"]), "abc"),
        lambda: checks.optional_callables(other=None, given=3),
        lambda: checks.float_tensor("given", IMAGES.long()),
        lambda: checks.float_tensor("given", IMAGES.to_sparse()),
        lambda: checks.float_tensor("given", IMAGES.numpy()),
        lambda: checks.float_tensor("given", IMAGES, torch.device("meta")),
        lambda: checks.image_tensor("given", IMAGES, (2, 3, 4, 5)),
        lambda: checks.image_tensor("given", IMAGES[:0]),
    ],
)
def test_what_is_of_another_kind_is_refused(call):
    with pytest.raises(InvalidArgument, match=r"^given[.=]"):
        call()


@pytest.mark.parametrize("check", [checks.whole_number, checks.finite_float])
def test_where_no_tensor_may_be_read_one_is_refused(check):
    with pytest.raises(InvalidArgument, match="^n="):
        check("n", torch.tensor(2), least=1, allow_tensor=False)
    assert check("n", np.int64(2), least=1, allow_tensor=False) == 2


def test_a_tensor_is_handed_on_as_it_is():
    assert (
        checks.image_tensor("x", IMAGES, (2, 3, 4, 4))
        is IMAGES
        is checks.float_tensor("x", IMAGES, IMAGES.device)
    )


NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("spoiled", [[], *([value] for value in NOT_FINITE), NOT_FINITE], ids=str)
@pytest.mark.parametrize("low, high", [(0, 255), (0, 2.5), (3, 200), (0, 65535)])
def test_levels_are_no_images_of_floats_whatever_else_is_not_finite(low, high, spoiled):
    levels = torch.tensor([low, high, low, *spoiled], dtype=torch.float32).view(1, 1, 1, -1)
    with pytest.raises(InvalidArgument, match=f"^x=.*{low} to {high:g}.*-1, 1"):
        checks.image_range("x", levels)


@pytest.mark.parametrize("spoiled", [[], *([value] for value in NOT_FINITE)], ids=str)
@pytest.mark.parametrize("values", [(-1, 1), (0, 1), (0, 2), (-140, 140), ()], ids=str)
def test_images_and_what_guidance_takes_beyond_are_taken(values, spoiled):
    images = torch.tensor([*values, *spoiled] or [0.0]).view(1, 1, 1, -1)
    assert checks.image_range("x", images) is images


def test_an_unknown_name_is_refused_with_the_nearest_and_all_that_are_allowed():
    names = ["fast", "exact", "slow"]
    with pytest.raises(InvalidArgument, match="^mode='fats': nearest: fast.*; one of: fast, exact, slow$"):
        checks.one_of("mode", "fats", names)
    with pytest.raises(InvalidArgument, match="^mode='7': one of: fast, exact, slow$"):
        checks.one_of("mode", "7", names)


@pytest.mark.parametrize("text, allowed", [("0", 0), ("7", 7), ("", 3)])
def test_whole_numbers_of_the_environment(monkeypatch, text, allowed):
    monkeypatch.setenv("RANK", text)
    assert checks.integer_in_environment("RANK", 3) == allowed


@pytest.mark.parametrize("text, least", [("\u00b2", 0), ("-1", 0), ("x", 0), ("0", 1)])
def test_other_texts_of_the_environment_are_named(monkeypatch, text, least):
    monkeypatch.setenv("RANK", text)
    with pytest.raises(InvalidArgument, match="^RANK="):
        checks.integer_in_environment("RANK", 1, least)
