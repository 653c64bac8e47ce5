"""Tests of every op's cases: the reference runs them, wrong arguments are named, raw ops pass opcheck."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import admfast.ops
from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import ROOMS, TABLES
from admfast.ops.cases import Draw, all_cases
from tests.ops.tolerance import DEVICES, bits

EVERY = {cases.op: cases for cases in all_cases()}
RAW = [(op, impl) for op, cases in EVERY.items() for impl in cases.call_raw_ops]
NAMESPACES = {"triton": "admfast_triton"}  # all others: admfast
WRONG = [
    pytest.param(op, changes, name, id=f"{op}-{i}-{name}")
    for op, cases in EVERY.items()
    for i, (changes, name) in enumerate([*cases.wrong(), ({"impl": 3}, "impl")])
    if op in TABLES
]


def drawing(device: str) -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in arguments, including those in dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    return [t for one in value.values() for t in tensors_in(one)] if isinstance(value, dict) else []


def test_every_folder_is_a_room_and_every_op_has_calls():
    folders = {path.parent.name for path in Path(admfast.ops.__file__).parent.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert len(EVERY) == len(all_cases()) and set(TABLES) <= set(EVERY)
    for cases in EVERY.values():
        assert len(cases.small) > 1 and all(cases.small), cases.op
        assert cases.op not in TABLES or len(list(cases.wrong())) > 1, cases.op


@pytest.mark.parametrize("op", EVERY)
def test_every_case_is_a_call_that_the_reference_runs(op):
    cases = EVERY[op]
    for case in ({}, *cases.small):
        arguments = cases.arguments(drawing("cpu"), torch.float32, **case)
        before = copy.deepcopy(arguments)
        found = cases.call(**arguments, impl="reference")
        for t in found if isinstance(found, tuple) else (found,):
            assert t.numel() and torch.isfinite(t).all()
        same = [torch.equal(a, b) for a, b in zip(tensors_in(before), tensors_in(arguments), strict=True)]
        assert all(same) or not cases.differentiable
    for case in cases.real.values():  # only the sizes matter
        made = cases.arguments(lambda *shape: torch.empty(shape, device="meta"), torch.float32, **case)
        assert set(made) <= set(cases.arguments(drawing("cpu"), torch.float32, **cases.small[0])), case


@pytest.mark.parametrize(("op", "changes", "name"), WRONG)
def test_what_no_implementation_takes_is_refused_by_name(op, changes, name):
    cases = EVERY[op]
    for impl in [*cases.implementations, None]:
        given = cases.arguments(drawing("cpu"), torch.float32) | {"impl": impl} | changes
        before = [t.clone() for t in tensors_in(given)]
        with pytest.raises(InvalidArgument) as caught:
            cases.call(**given)
        message = str(caught.value)
        assert message.startswith((f"{name}=", f"{name}.")) and "\n" not in message, message
        same = zip(before, tensors_in(given), strict=True)
        assert all(t.device.type == "meta" or torch.equal(bits(t), bits(old)) for old, t in same)


# Raw ops


def given_to_raw_ops(op: str, impl: str, device: str, call: Callable[..., Any]) -> None:
    """Pass the raw op calls of every small case to `call`, for every dtype that the implementation takes."""
    cases = EVERY[op]
    for case in cases.small:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if impl == "triton" else 2]:
            arguments = cases.arguments(drawing(device), dtype, **case)
            try:
                cases.call(**copy.deepcopy(arguments), impl=impl)
            except Unavailable:
                continue
            cases.call_raw_ops[impl](call, **arguments)


def missing(op: str, impl: str, device: str) -> str | None:
    """Return why an implementation doesn't run on a device, or None if it does."""
    if impl in ("cuda", "cpp") and (impl == "cuda") != (device == "cuda"):
        return f"not on {device}"
    return TABLES[op].find(impl).reason_missing() if op in TABLES else None


def raw_op(impl: str, name: str) -> Any:
    """Return a registered op, or skip the test if the name is a launcher that isn't registered."""
    namespace = getattr(torch.ops, NAMESPACES.get(impl, "admfast"))
    return getattr(namespace, name) if hasattr(namespace, name) else pytest.skip(f"{name} is no torch op")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "impl"), RAW)
def test_raw_ops_pass_opcheck(op, impl, device):
    if reason := missing(op, impl, device):
        pytest.skip(reason)
    # Triton's raw ops register no autograd: their autograd Function has the gradient.
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if impl == "triton" else ["test_autograd_registration"]

    def call(name: str, *arguments: Any) -> Any:
        raw = raw_op(impl, name)
        torch.library.opcheck(raw.default, arguments, test_utils=checks)
        return raw(*arguments)

    given_to_raw_ops(op, impl, device, call)


def test_no_raw_op_is_left_out():
    seen = set()

    def calling(impl: str) -> Callable[..., Any]:
        def call(name: str, *arguments: Any) -> Any:
            found = raw_op(impl, name)
            seen.add(f"{NAMESPACES.get(impl, 'admfast')}::{name}")
            return found(*arguments)

        return call

    for op, impl in RAW:
        if not missing(op, impl, "cpu"):
            with contextlib.suppress(pytest.skip.Exception):
                given_to_raw_ops(op, impl, "cpu", calling(impl))
    schemas = torch._C._jit_get_all_schemas()
    ours = {s.name for s in schemas if s.name.startswith(("admfast::", "admfast_triton::")) and s.arguments}
    assert seen and seen >= ours
