"""Tests that noise is a pure function of (seed, stream, row, element), bit by bit, and standard normal."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.ops import TABLES, Stream, as_seeds, native, normal_ref
from admfast.ops.update.noise import (
    COS_COEFFICIENTS,
    LN2_HIGH,
    LN2_LOW,
    LOG_COEFFICIENTS,
    MASK32,
    SIN_COEFFICIENTS,
    _box_muller,
    _horner,
    _log,
    philox4x32_10,
)
from tests.ops.anywhere import normal, runnable
from tests.ops.tolerance import DEVICES, assert_within, bits

IMPLEMENTATIONS = runnable("normal")
SEEDS = [0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63, 2**64 - 1]
# The samples below have fixed seeds, so the tests are deterministic. A correct generator would fail a
# comparison for the fraction FALSE_ALARM of all choices of seeds.
FALSE_ALARM = 1e-6
Z_LIMIT = NormalDist().inv_cdf(1 - FALSE_ALARM / 2)


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


def draw(impl: str | None, seeds: list[int], shape: tuple[int, ...], row: int = 0, stream: int = 0):
    return normal(as_seeds(seeds), shape, row, stream, impl=impl)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# The test vectors of philox4x32 with ten rounds, from kat_vectors of the published Random123 library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, answer):
    out = philox4x32_10(words(*counter), words(*key))
    assert tuple(int(word) for word in out) == answer


def textbook_philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute Philox4x32-10 with Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_agrees_with_whole_number_arithmetic():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**32, size=(200, 6)).tolist()
    got = torch.stack(
        philox4x32_10(*(tuple(torch.tensor(values).T[part]) for part in (slice(0, 4), slice(4, 6)))), dim=1
    )
    assert got.tolist() == [textbook_philox(v[:4], v[4:]) for v in values]


def library_box_muller(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the pairs [..., 2] of two words by torch's log, cos and sin. As documented, u is float32."""
    u = (a.float() * 2.0**-32 + 2.0**-33).to(dtype)
    angle = b.to(dtype) * (2 * math.pi / 2**32)
    return (-2 * u.log()).sqrt()[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_the_counter_is_element_row_stream_and_the_key_is_the_seed(impl, seed):
    row, stream, blocks = 0x80000001, 0xFFFFFFFE, 64
    key = [seed % 2**32, seed >> 32]
    pairs = torch.tensor([textbook_philox([i, 0, row, stream], key) for i in range(blocks)]).reshape(-1, 2)
    truth, single = (library_box_muller(*pairs.T, d).flatten() for d in (torch.float64, torch.float32))
    assert_within(draw(impl, [seed], (4 * blocks,), row, stream)[0], single, truth, "64 blocks")


@pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
@pytest.mark.parametrize(
    ("seed", "row", "stream", "count"),
    [
        (0, 0, 0, 2**20),
        (2**64 - 1, MASK32, MASK32, 2**20 - 1),
        (0x0123456789ABCDEF, 999, int(Stream.STEPS), 2**20 + 2),
        (2**63, 1, int(Stream.AUGMENTATION), 2**18 + 3),
    ],
    ids=["zeros", "ones", "middle", "high-bit"],
)
def test_compiled_noise_equals_the_reference_bit_for_bit(seed, row, stream, count):
    a, b = draw("cpp", [seed], (count,), row, stream), draw("reference", [seed], (count,), row, stream)
    assert same(a, b), f"{int((bits(a) != bits(b)).sum())} of {count} differ"


@pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 255, 256, 257, 259, 511, 513])
def test_compiled_noise_equals_the_reference_for_every_remainder(count):
    for seeds in ([], [3], SEEDS):
        assert same(draw("cpp", seeds, (count,), 5, 1), draw("reference", seeds, (count,), 5, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_the_reference_is_the_same_on_every_device(device):
    seeds = as_seeds(SEEDS)
    there = normal_ref(seeds.to(device), (3, 32, 31), 7, 1)
    assert there.device.type == device and same(there.cpu(), normal_ref(seeds, (3, 32, 31), 7, 1))


def test_a_row_on_the_device_is_the_row():
    assert same(
        normal_ref(as_seeds([5, 6]), (7,), torch.tensor([9]), 1), normal_ref(as_seeds([5, 6]), (7,), 9, 1)
    )


def grid(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 400_001)


def exact(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    return np.polynomial.polynomial.polyval(x, coefficients)


def test_polynomials_are_as_near_as_the_docstring_says():
    f = grid(math.sqrt(0.5) - 1, math.sqrt(2) - 1)
    assert np.abs(f * exact(LOG_COEFFICIENTS, f) - np.log1p(f)).max() <= 1.9e-8
    f = grid(-0.5, 0.5)
    assert np.abs(f * exact(SIN_COEFFICIENTS, f * f) - np.sin(np.pi / 2 * f)).max() <= 2.4e-8
    assert np.abs(exact(COS_COEFFICIENTS, f * f) - np.cos(np.pi / 2 * f)).max() <= 5.4e-8
    half_a_unit = 2.0**-24
    assert 5.4e-8 < half_a_unit
    # ln 2 is split into two parts; the product of the first part with every exponent is exact.
    assert abs(LN2_HIGH + LN2_LOW - math.log(2)) < half_a_unit**2 * 2**4
    assert all(float(np.float32(e) * np.float32(LN2_HIGH)) == e * LN2_HIGH for e in range(-33, 1))


def test_the_polynomials_in_float32_are_within_the_tolerance_rule():
    f = torch.from_numpy(grid(-0.5, 0.5)).float()
    wide, angle = f.double(), f.double() * (math.pi / 2)
    assert_within(f * _horner(f * f, SIN_COEFFICIENTS), angle.sin().float(), angle.sin(), "sin")
    assert_within(_horner(f * f, COS_COEFFICIENTS), angle.cos().float(), (wide * (math.pi / 2)).cos(), "cos")
    u = torch.cat([torch.from_numpy(grid(2.0**-12, 1)).float(), 2.0 ** -torch.arange(34.0)])
    assert_within(_log(u), u.double().log().float(), u.double().log(), "log")


# Critical words: the smallest and largest, those that float32 rounds, and the borders of the quarter turns.
EDGES = [0, 1, 2, 3, 2**24 - 1, 2**24, 2**24 + 1, MASK32 - 128, MASK32 - 1, MASK32]
EDGES += [quarter * 2**30 + eighth + d for quarter in range(4) for eighth in (0, 2**29) for d in (-1, 0, 1)]
EDGES = sorted({edge % 2**32 for edge in EDGES})


def test_no_pair_of_words_gives_nan_or_infinity():
    a = torch.tensor(EDGES)[:, None].expand(-1, len(EDGES))
    b = torch.tensor(EDGES)[None].expand(len(EDGES), -1)
    even, odd = _box_muller(a, b)
    assert torch.isfinite(even).all() and torch.isfinite(odd).all()
    # u as documented: rounded to float32, from 2^-33 to 1.
    u = (a.float().double() * 2.0**-32 + 2.0**-33).float()
    assert float(u.min()) == 2.0**-33 and float(u.max()) == 1.0
    truth, single = (library_box_muller(a, b, dtype) for dtype in (torch.float64, torch.float32))
    assert_within(torch.stack([even, odd], dim=-1), single, truth, "edges")
    assert float(even[a == MASK32].abs().max()) == 0.0, "R must be 0 at u = 1"
    assert float(even.max()) == pytest.approx(math.sqrt(66 * math.log(2)), rel=2.0**-22), "R at u = 2^-33"


def sample(count: int = 2**20) -> torch.Tensor:
    return draw(None, [2024], (count,)).flatten().double()


def test_moments_are_those_of_a_standard_normal():
    z = sample()
    n = len(z)
    # The mean of z^k over n normal numbers has variance (E z^2k - (E z^k)^2) / n.
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        moment = (float((z**power).mean()) - expected) / math.sqrt(deviation / n)
        assert abs(moment) < Z_LIMIT, f"moment {power} is {moment:.2f} deviations off"


def test_distribution_is_that_of_a_standard_normal():
    z = sample().sort().values
    n = len(z)
    cdf = torch.special.ndtr(z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max())
    # Massart 2001: P(distance > d) <= 2 exp(-2 n d^2).
    assert distance < math.sqrt(math.log(2 / FALSE_ALARM) / (2 * n))


def test_tails_are_there():
    z = sample(2**22).abs()
    for limit in (3.0, 4.0, 4.5):
        p = 2 * NormalDist().cdf(-limit)
        seen, expected = int((z > limit).sum()), p * len(z)
        assert abs(seen - expected) < Z_LIMIT * math.sqrt(expected), (
            f"{seen} beyond {limit}, expected {expected}"
        )


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return sum(a b) / sqrt(n), which is nearly standard normal for independent normal numbers."""
    return float((a.double() * b.double()).sum()) / math.sqrt(a.numel())


def test_neighbours_and_their_squares_are_uncorrelated():
    z = sample()
    for lag in range(1, 9):
        assert abs(correlation(z[:-lag], z[lag:])) < Z_LIMIT, f"lag {lag}"
        a, b = (z[:-lag] ** 2 - 1) / math.sqrt(2), (z[lag:] ** 2 - 1) / math.sqrt(2)
        assert abs(correlation(a, b)) < Z_LIMIT, f"squares at lag {lag}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_seeds_rows_and_streams_are_all_different_and_uncorrelated(impl):
    places = [
        (seed, row, stream) for seed in (0, 1, 2**32, 2**64 - 1) for row in (0, 1, 2**31) for stream in Stream
    ]
    fields = [draw(impl, [seed], (4096,), row, stream).flatten() for seed, row, stream in places]
    matrix = torch.stack(fields).double()
    products = (matrix @ matrix.T) / math.sqrt(matrix.shape[1])
    pairs = products[torch.triu(torch.ones_like(products), diagonal=1).bool()]
    # The limit of the largest of many values: each gets its share of FALSE_ALARM.
    limit = NormalDist().inv_cdf(1 - FALSE_ALARM / 2 / len(pairs))
    assert float(pairs.abs().max()) < limit
    assert len({tuple(field[:4].tolist()) for field in fields}) == len(places)


def test_streams_are_numbered_as_they_are_published():
    assert [(stream.name, stream.value) for stream in Stream] == [
        ("X_T", 0), ("STEPS", 1), ("UPSAMPLER_X_T", 2), ("UPSAMPLER_STEPS", 3), ("AUGMENTATION", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_image_does_not_depend_on_its_batch_or_its_place_in_it(impl):
    shape, order = (3, 5, 7), [3, 0, 6, 1, 5, 2, 4]
    together = draw(impl, SEEDS, shape, 11, 1)
    assert same(draw(impl, [SEEDS[i] for i in order], shape, 11, 1), together[order])
    for i, seed in enumerate(SEEDS):
        assert same(draw(impl, [seed], shape, 11, 1), together[i : i + 1])
    assert same(draw(impl, [7, 7], shape, 11, 1)[0], draw(impl, [7], shape, 11, 1)[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_elements_are_counted_in_the_logical_image(impl):
    flat = draw(impl, [9], (3 * 5 * 7,))
    assert same(draw(impl, [9], (3, 5, 7)), flat.reshape(1, 3, 5, 7))
    assert same(draw(impl, [9], (3 * 5 * 7 + 40,))[:, : 3 * 5 * 7], flat), "a longer image differs"


@pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
def test_seeds_may_be_strided_and_are_not_written_to():
    seeds = as_seeds(range(10))
    before = seeds.clone()
    for impl in ("cpp", "reference"):
        assert same(normal(seeds[::3], (5,), 0, 0, impl=impl), draw("reference", [0, 3, 6, 9], (5,)))
    assert torch.equal(seeds, before)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(2), (3,), 0, 0), "seeds="),
        ((torch.zeros(2, 2, dtype=torch.int64), (3,), 0, 0), "seeds="),
        ((torch.zeros(2, dtype=torch.int32), (3,), 0, 0), "seeds="),
        ((as_seeds([1]), (3, -1), 0, 0), r"shape\[1\]="),
        ((as_seeds([1]), (3,), -1, 0), "row=-1"),
        ((as_seeds([1]), (3,), 2**32, 0), "row=4294967296"),
        ((as_seeds([1]), (3,), 0, -1), "stream=-1"),
        ((as_seeds([1]), (3,), 0, 2**32), "stream=4294967296"),
    ],
)
@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
def test_wrong_arguments_are_named(impl, arguments, name):
    with pytest.raises(InvalidArgument, match=f"^{name}"):
        normal(*arguments, impl=impl)


@pytest.mark.parametrize(
    "seeds",
    [
        [0, 1, 2**63, 2**64 - 1],
        (0, 1, 2**63, 2**64 - 1),
        np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64),
        torch.tensor([0, 1, 2**63, 2**64 - 1], dtype=torch.uint64),
        iter([0, 1, 2**63, 2**64 - 1]),
    ],
    ids=["list", "tuple", "numpy", "tensor", "iterator"],
)
def test_as_seeds_keeps_the_64_bits(seeds):
    got = as_seeds(seeds, 4)
    assert got.dtype == torch.int64 and got.tolist() == [0, 1, -(2**63), -1]


def test_as_seeds_of_nothing():
    assert as_seeds([]).shape == (0,) and as_seeds([]).dtype == torch.int64


@pytest.mark.parametrize(
    ("seeds", "count", "message"),
    [
        ([-1], None, "seeds=-1: 0 to 2"),
        ([0, 2**64], None, f"seeds={2**64}: 0 to 2"),
        (torch.tensor([-1]), None, "seeds=-1: 0 to 2"),
        ([1.5], None, r"seeds=\[1.5\]: whole numbers"),
        (["3"], None, r"seeds=\['3'\]: whole numbers"),
        (5, None, "seeds=5: whole numbers"),
        (torch.tensor([1.0]), None, "seeds=tensor.*: whole numbers"),
        ([1, 2], 3, "seeds=2: one seed for each of the 3 images"),
    ],
)
def test_as_seeds_refuses_by_name(seeds, count, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        as_seeds(seeds, count)


@pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
def test_the_raw_op_says_its_name():
    op = torch.ops.admfast.normal.default
    wrong = [(torch.zeros(2), 7, 3, 1), (as_seeds(range(4))[::2], 7, 3, 1), (as_seeds([1]), -1, 0, 0)]
    wrong += [(as_seeds([1]), 1, -1, 0), (as_seeds([1]), 1, 0, 2**32)]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="^normal: "):
            op(*arguments)


@pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
def test_the_raw_op_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def scaled(seeds):
        return torch.ops.admfast.normal(seeds, 12, 3, 1) * 2

    seeds = as_seeds([1, 2**64 - 1])
    assert same(scaled(seeds), draw("reference", [1, 2**64 - 1], (12,), 3, 1) * 2)


@pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
def test_the_noise_compiles_as_one_graph():
    def scaled(seeds):
        return normal(seeds, (3, 4), 3, Stream.STEPS) * 2

    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    seeds = as_seeds([1, 2**64 - 1])
    assert same(compiled(seeds), normal(seeds, (3, 4), 3, Stream.STEPS) * 2)


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_every_whole_number_is_a_counter(impl):
    if TABLES["normal"].find(impl).reason_missing():
        pytest.skip(f"{impl} is not available")
    kinds = (3, np.int64(3), torch.tensor(3), torch.tensor([3], dtype=torch.int32))
    first, *others = (normal(as_seeds([1]), (5,), kind, 1, impl=impl) for kind in kinds)
    assert all(torch.equal(first, other) for other in others)
