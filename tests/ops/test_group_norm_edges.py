"""Tests of the normalisation's edge cases: sources without channels, and errors that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.errors import InvalidArgument
from admfast.ops import TABLES, group_norm_silu
from tests.ops.test_group_norm import refused
from tests.ops.tolerance import assert_within

IMPLEMENTATIONS = TABLES["group_norm_silu"].names()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def with_gradients(tensors: dict[str, Tensor], options: dict[str, Any], impl: str) -> list[Tensor]:
    """Return the output and the gradient of its squared sum in every tensor."""
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    y = group_norm_silu(**leaves, **options, impl=impl)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("empty", ["x", "x2"])
@pytest.mark.parametrize("resample", [None, "down"])
def test_a_source_without_channels_adds_nothing(impl, layout, empty, resample):
    full = torch.randn(2, 8, 4, 6).contiguous(memory_format=layout)
    none = torch.empty(2, 0, 4, 6).contiguous(memory_format=layout)
    tensors = {"x": none, "x2": full} if empty == "x" else {"x": full, "x2": none}
    tensors |= {"weight": torch.randn(8), "bias": torch.randn(8)}
    options = dict(groups=4, resample=resample)
    if refused(impl, tensors, options):
        return
    found = with_gradients(tensors, options, impl)
    assert [t.shape for t in found[1:]] == [t.shape for t in tensors.values()]
    alone = {"x": full, "weight": tensors["weight"], "bias": tensors["bias"]}
    reference = with_gradients(alone, options, "reference")
    truth = with_gradients({name: t.double() for name, t in alone.items()}, options, "reference")
    del found[1 if empty == "x" else 2]
    kinds = (("output", 1), ("input gradient", 1), *[("parameter gradient", full.numel() // 8)] * 2)
    for got, plain, exact, (kind, length) in zip(found, reference, truth, kinds, strict=True):
        assert_within(got, plain, exact, kind, kind, length)


HERE = dict(x=(2, 6, 4, 4), weight=(6,), bias=(6,), scale=(2, 6), shift=(2, 6))
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("groups=2.0: a whole number", dict(groups=2.0)),
    ("groups=None: a whole number", dict(groups=None)),
    ("groups=True: a whole number", dict(groups=True)),
    ("groups=-3: a whole number", dict(groups=-3)),
    ("eps=nan: a finite number", dict(eps=float("nan"))),
    ("eps=inf", dict(eps=float("inf"))),
    ("eps=-1e-05", dict(eps=-1e-5)),
    ("eps=None", dict(eps=None)),
    ("eps='1e-5'", dict(eps="1e-5")),
    ("x='list'", dict(x=[1.0])),
    ("x.dtype=torch.float8_e4m3fn", dict(x=torch.ones(2, 6, 4, 4).to(torch.float8_e4m3fn))),
    ("x.dtype=torch.complex64", dict(x=torch.ones(2, 6, 4, 4, dtype=torch.complex64))),
    ("x.layout=torch.sparse_coo", dict(x=torch.ones(2, 6, 4, 4).to_sparse())),
    ("weight='NoneType'", dict(weight=None)),
    ("bias='NoneType'", dict(bias=None)),
    ("x2.shape", dict(x2=torch.ones(2, 6, 4))),
    ("impl=3", dict(impl=3)),
]
for _name, _shape in (HERE | dict(x2=(2, 6, 4, 4))).items():
    if _name != "x":
        WRONG.append((f"{_name}.device='meta': cpu", {_name: torch.ones(_shape, device="meta")}))
        for _dtype in (torch.complex64, torch.int64, torch.float8_e4m3fn):
            WRONG.append(
                (f"{_name}.dtype={_dtype}: a floating dtype", {_name: torch.ones(_shape).to(_dtype)})
            )


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize(("message", "changes"), WRONG, ids=lambda value: value if type(value) is str else "")
def test_wrong_arguments_are_named_whatever_runs(message, changes, impl):
    arguments = {name: torch.ones(shape) for name, shape in HERE.items()} | dict(groups=3, impl=impl)
    with pytest.raises(InvalidArgument) as caught:
        group_norm_silu(**(arguments | changes))
    assert str(caught.value).startswith(message), caught.value
