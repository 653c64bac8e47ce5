"""Noise as a pure function of (seed, stream, row, element), with the same bits on every machine.

Philox4x32-10 (Salmon et al. 2011) turns a 128-bit counter and a 64-bit key into four 32-bit integers. Here
the key is the image's seed (low word first) and the counter is (element div 4 low, element div 4 high, row,
stream), where `element` is the index in the logical [C, H, W] image, independent of its layout in memory. In
a block of four integers r0..r3, elements 0 and 1 use (r0, r1) and elements 2 and 3 use (r2, r3). Box-Muller
turns each pair into two normals:

    u = float(r_a) * 2^-32 + 2^-33          in (0, 1], never 0
    R = sqrt(-2 ln u),  angle = 2 pi r_b / 2^32
    z_even = R cos(angle),  z_odd = R sin(angle)

ln, sin and cos are the polynomials below, evaluated by Horner's scheme in float32, where every product and
every sum is rounded separately; sqrt and the conversion from integers are those of IEEE 754. With the
coefficients below (rounded to float32) the polynomials are within 1.9e-8, 2.4e-8 and 5.4e-8 of ln(1 + f),
sin(pi/2 f) and cos(pi/2 f), all less than half a unit in the last place of float32 at 1. The C++ and CUDA
code does the same operations in the same order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.ops import native
from admfast.ops.dispatch import Implementation, OpTable

Word = TypeVar("Word", int, Tensor)

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float.fromhex, text.split()))


# ln(1 + f) = f * P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], lowest power first.
LOG_COEFFICIENTS = _floats(
    "0x1.000000p+0 -0x1.fffff2p-2 0x1.555780p-2 -0x1.0007b8p-2 0x1.98bf94p-3 -0x1.52d0e0p-3 "
    "0x1.31821cp-3 -0x1.28981ap-3 0x1.6efe58p-4"
)
# sin(pi/2 f) = f * P(f^2) and cos(pi/2 f) = P(f^2) on [-1/2, 1/2].
SIN_COEFFICIENTS = _floats("0x1.921fb6p+0 -0x1.4abbbap-1 0x1.465ec6p-4 -0x1.2d9bb8p-8")
COS_COEFFICIENTS = _floats("0x1.000000p+0 -0x1.3bd392p+0 0x1.03af5cp-2 -0x1.4e5ed6p-6")
# ln 2 as a sum of two: the product of the first with an exponent is exact in float32.
LN2_HIGH = float.fromhex("0x1.62e4p-1")
LN2_LOW = float.fromhex("0x1.7f7d1cp-20")


class Stream(IntEnum):
    """The streams of an image's noise; no two overlap."""

    X_T = 0
    STEPS = 1
    UPSAMPLER_X_T = 2
    UPSAMPLER_STEPS = 3
    AUGMENTATION = 4


def philox4x32_10(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Return the four output words of Philox4x32 with ten rounds.

    Words are in 0..2^32-1: int64 tensors that broadcast against each other, or Python ints (a hundred times
    faster for a few words). Tests compare it with the known-answer vectors published with the generator.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The low 64 bits of a wrapped int64 product are those of the unsigned product.
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32
        c2, c3 = ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + PHILOX_W[0]) & MASK32, (k1 + PHILOX_W[1]) & MASK32
    return c0, c1, c2, c3


def normal_ref(seeds: Tensor, shape: tuple[int, ...], row: int | Tensor, stream: int) -> Tensor:
    """Return standard normal noise [N, *shape], float32, one image per seed.

    Args:
        seeds: [N] int64, each the 64 bits of a seed.
        shape: logical shape of one image, usually (C, H, W).
        row: row of the solver's table, 0..2^32-1 (an int, or an integer tensor of one element).
        stream: see `Stream`.
    """
    elements = math.prod(shape)
    device = seeds.device
    block = torch.arange((elements + 3) // 4, dtype=torch.int64, device=device)[None]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    counter = (block & MASK32, block >> 32, zero + row, zero + int(stream))
    key = (seeds[:, None] & MASK32, (seeds[:, None] >> 32) & MASK32)
    r0, r1, r2, r3 = torch.broadcast_tensors(*philox4x32_10(counter, key))
    z = torch.stack([*_box_muller(r0, r1), *_box_muller(r2, r3)], dim=-1)  # [N, blocks, 4]
    return z.flatten(1)[:, :elements].reshape(len(seeds), *shape)


def normal(seeds: Tensor, shape: tuple[int, ...], row: int, stream: int, impl: str | None = None) -> Tensor:
    """Return the noise of `normal_ref`, on the device of `seeds`; every implementation gives the same bits.

    Raises: InvalidArgument for seeds that aren't [N] int64, sizes that aren't whole numbers of 0 or more, or
    a row or stream that isn't a whole number in 0..2^32-1; Unavailable for a named implementation that can't
    serve the call.
    """
    if not isinstance(seeds, Tensor):
        raise invalid("seeds", seeds, "an int64 tensor [N] (see as_seeds)")
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise invalid("seeds", (tuple(seeds.shape), seeds.dtype), "int64 [N]")
    if not isinstance(shape, (tuple, list)):
        raise invalid("shape", shape, "a tuple of sizes")
    for i, size in enumerate(shape):
        checks.whole_number(f"shape[{i}]", size, 0, allow_tensor=False)
    check_counter("row", row, seeds.device)
    check_counter("stream", stream, seeds.device)
    return TABLE.choose(impl, seeds, shape, row, stream).forward(seeds, shape, row, stream)


def _native(seeds: Tensor, shape: tuple[int, ...], row: int, stream: int) -> Tensor:
    return (
        native.ops()
        .normal(seeds.contiguous(), math.prod(shape), int(row), int(stream))
        .view(len(seeds), *shape)
    )


@native.fake("normal")
def _fake(seeds: Tensor, count: int, row: int, stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], count), dtype=torch.float32)


def _unsupported_for(device: str) -> Callable[..., str | None]:
    """Return the function that says why a compiled implementation for `device` can't serve a call."""
    return lambda seeds, *_: None if seeds.device.type == device else f"seeds are on {seeds.device.type}"


TABLE = OpTable(
    "normal",
    [
        Implementation("cuda", _native, native.reason_missing_cuda, _unsupported_for("cuda")),
        Implementation("cpp", _native, native.reason_missing, _unsupported_for("cpu")),
        Implementation("reference", normal_ref),
    ],
)


def as_seeds(seeds: object, count: int | None = None) -> Tensor:
    """Return seeds as an int64 tensor [N] of their 64-bit patterns.

    seeds: whole numbers in 0..2^64-1, in any iterable or integer tensor. count: the required number of seeds;
    None: any. Raises: InvalidArgument for anything else.
    """
    try:
        items = seeds.flatten().tolist() if isinstance(seeds, Tensor) else list(seeds)  # type: ignore[call-overload]
        values = [operator.index(seed) for seed in items]
    except TypeError:
        raise invalid("seeds", seeds, "whole numbers from 0 to 2^64 - 1, one for each image") from None
    for seed in values:
        if not 0 <= seed < 2**64:
            raise invalid("seeds", seed, "0 to 2^64 - 1")
    if count is not None and len(values) != count:
        raise invalid("seeds", len(values), f"one seed for each of the {count} images")
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in values]
    return torch.tensor(signed, dtype=torch.int64, device="cpu")


def check_counter(name: str, value: object, device: torch.device) -> None:
    """Raise InvalidArgument unless `value`, a word of the counter, is a whole number in 0..2^32-1.

    A tensor must be one int32 or int64 on `device`; its value is not read.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (torch.int32, torch.int64) or value.device != device:
            actual = (tuple(value.shape), value.dtype, str(value.device))
            raise invalid(name, actual, f"a whole number, or one int32 or int64 on {device}")
        return
    checks.whole_number(name, value, 0, MASK32, allow_tensor=False)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two float32 normals from two 32-bit words."""
    u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
    # torch's float32 sqrt on the CPU (MKL) is off by one unit in the last place in 0.7 % of cases. The root
    # in float64, rounded, is that of IEEE 754.
    radius = torch.sqrt((_log(u) * -2.0).double()).float()
    # The angle in quarter turns: the nearest quarter and a remainder f in [-1/2, 1/2), exact in integers.
    quarter = ((b + 2**29) >> 30) & 3
    remainder = ((b + 2**29) & (2**30 - 1)) - 2**29
    f = remainder.to(torch.float32) * 2.0**-30
    square = f * f
    sine, cosine = f * _horner(square, SIN_COEFFICIENTS), _horner(square, COS_COEFFICIENTS)
    odd, upper = (quarter & 1) == 1, quarter >= 2
    cos_angle = torch.where(odd, -sine, cosine)
    sin_angle = torch.where(odd, cosine, sine)
    return (
        radius * torch.where(upper, -cos_angle, cos_angle),
        radius * torch.where(upper, -sin_angle, sin_angle),
    )


def _log(u: Tensor) -> Tensor:
    """Return ln u for float32 u in (0, 1]."""
    bits = u.contiguous().view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # m = u / 2^exponent in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    return e * LN2_HIGH + (f * _horner(f, LOG_COEFFICIENTS) + e * LN2_LOW)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluate a polynomial; products and sums are separate operations, so that each is rounded."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x
        result = result + coefficient
    return result
