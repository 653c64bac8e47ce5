"""All-pairs covers of an op's options, and the dtypes and memory layouts that are among the options."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor

# The only dtype of an implementation, where it isn't float32.
_DTYPES = {("conv", "direct"): torch.bfloat16, ("attention", "cpp"): torch.bfloat16}
CANDIDATES = 60  # random cases tried for each one kept; more give a slightly smaller cover


def all_pairs(times: int = 1, /, **options: list[Any]) -> list[dict[str, Any]]:
    """Return few cases {option: value} such that any two values of two options occur together in a case.

    The result is the same on every call. `times` such covers follow one another, each with other combinations
    of three or more options.
    """
    generator = random.Random(0)
    names = list(options)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(options[a])), range(len(options[b])))
    }
    cases = []
    for _ in range(times):
        missing = set(pairs)
        while missing:
            a, i, b, j = min(missing)
            best: dict[str, int] = {}
            gained: set[tuple[str, int, str, int]] = set()
            for _ in range(CANDIDATES):
                case = {name: generator.randrange(len(options[name])) for name in names} | {a: i, b: j}
                gain = {(p, case[p], q, case[q]) for p, q in itertools.combinations(names, 2)} & missing
                if len(gain) > len(gained):
                    best, gained = case, gain
            missing -= gained
            cases.append({name: options[name][index] for name, index in best.items()})
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def case_id(case: dict[str, Any]) -> str:
    """Return a readable test id for a case."""
    return "-".join(str(value) for value in case.values()).replace(" ", "")


def dtype_of(op: str, impl: str | None) -> torch.dtype:
    """Return a dtype that an implementation supports: float32, unless it has only another one."""
    return _DTYPES.get((op, impl or ""), torch.float32)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Return the values of `t` in a layout: "contiguous", "channels_last", "sliced" or "expanded".

    "sliced" takes every other element of a larger tensor that is NaN elsewhere. "expanded" repeats the first
    image for all images, without a copy.
    """
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        inner, last = t.shape[2:-1], t.shape[-1]
        whole = torch.full(
            (*t.shape[:2], *(size + 3 for size in inner), 2 * last + 3), float("nan"), dtype=t.dtype
        )
        return whole[(..., *(slice(2, -1) for _ in inner), slice(3, None, 2))].copy_(t)
    return t[:1].expand_as(t) if layout == "expanded" else t
