"""Cut a call of `group_norm_silu` into programs, by a table of shapes; nothing is searched at run time.

A chosen launch is a pure function of the shape, so that a call can be captured in a graph and is bit for bit
the same every time. Triton's interpreter pays for programs and loop trips, not for elements: it gets larger
blocks. `tests/kernels/` compiles every launch that an ADM shape leads to and refuses spilled registers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

MULTIPROCESSORS = 132  # H100; only how finely the work is cut depends on it
RESIDENT = 8 * MULTIPROCESSORS  # programs of 4 warps and 64 registers a thread that run at once
INTERPRETED = bool(triton.knobs.runtime.interpret)  # read here as the decorators read it: once


@dataclass(frozen=True)
class OneRead:
    """A program takes all positions of `groups` whole groups, `unroll` tiles of [block_p, block_c] a trip."""

    groups: int
    block_p: int
    block_c: int
    unroll: int
    warps: int
    align: int = 1  # divides the channels of a program: how wide its loads may be

    @property
    def block(self) -> dict[str, int]:
        return dict(BLOCK_P=self.block_p, BLOCK_C=self.block_c, UNROLL=self.unroll)

    def share(self, depth: int) -> dict[str, Any]:
        """The arguments that say which channels a program takes, of groups of `depth`."""
        pieces = self.groups * depth // self.align
        return dict(pieces=pieces, ALIGN=self.align, SINGLE=single(self.groups, depth))


@dataclass(frozen=True)
class TwoPass:
    """Sums over chunks of positions, their merge, and an elementwise pass over [apply_p, block_c] tiles.

    A program of the sums takes `chunk` positions, `unroll` tiles of [block_p, block_c] a trip.
    """

    block_p: int
    block_c: int
    unroll: int
    chunk: int
    warps: int
    apply_p: int
    apply_warps: int

    @property
    def block(self) -> dict[str, int]:
        return dict(BLOCK_P=self.block_p, BLOCK_C=self.block_c, UNROLL=self.unroll)

    def chunks(self, positions: int) -> int:
        return -(-positions // self.chunk)

    def spans(self, others: int, positions: int) -> dict[str, int]:
        """Return the positions that a program of the elementwise pass takes, and the number of programs.

        What it does once for its channels is 1.5 times the instructions of a tile, which would cost more than
        memory does: where `others` programs for every span fill the multiprocessors, it takes up to 8 tiles.
        """
        tiles = -(-positions // self.apply_p)
        each = max(min(-(-others * tiles // RESIDENT), 8), 1)
        return dict(span=each * self.apply_p, spans=-(-tiles // each))


@dataclass(frozen=True)
class Merge:
    """A program merges all chunks, at most `block_k`, of `groups` whole groups."""

    groups: int
    block_k: int
    block_c: int
    warps: int

    @property
    def block(self) -> dict[str, int]:
        return dict(BLOCK_K=self.block_k, BLOCK_C=self.block_c)

    def share(self, depth: int) -> dict[str, Any]:
        """The arguments that say which channels a program takes, of groups of `depth`."""
        return dict(width=self.groups * depth, SINGLE=single(self.groups, depth))


@dataclass(frozen=True)
class Shape:
    """The sizes that decide a launch: images, positions, channels, groups, bytes an element, sources."""

    n: int
    p: int
    c: int
    groups: int
    itemsize: int
    sources: int = 1

    @property
    def depth(self) -> int:
        """Channels of a group."""
        return self.c // self.groups


@dataclass(frozen=True)
class Call:
    """One kernel launch: what is passed to it by name, constexpr or not."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    registers: int = 128

    @property
    def options(self) -> dict[str, int]:
        """Return what the compiler is told.

        Registers a thread are always limited: left alone, the compiler aims at an occupancy and spills some.
        128 let two programs of 8 warps share a multiprocessor, or four of 4; what holds more, or can do with
        less, says so.
        """
        return dict(num_warps=self.warps, maxnreg=self.registers)

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def single(groups: int, depth: int) -> bool:
    """Tell whether a program has one group, too wide for the square of channels that several groups take."""
    return groups == 1 and depth > 64


def run(calls: list[Call], device: torch.device) -> None:
    """Launch one after another on the current stream of `device`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            for call in calls:
                call.run()
        return
    for call in calls:
        call.run()


def pow2(value: int) -> int:
    """The least power of two that isn't below `value`."""
    return 1 << max(value - 1, 0).bit_length()


# Bytes that one program may look at twice: two programs share a first-level cache of 256 KB, and one that is
# alone on its multiprocessor, with 16 KB on the way at a time, takes longer over more than three launches do.
SHARE = 64 << 10
LINE, SECTOR = 128, 32  # bytes that memory is asked for at once, and the least that it gives


def choose(shape: Shape, backward: bool) -> OneRead | TwoPass:
    """The launch of a forward, or of a backward, on `shape`."""
    if INTERPRETED:
        return _interpreted(shape)
    return _one_read(shape, backward) or _two_pass(shape, backward)


def _one_read(shape: Shape, backward: bool) -> OneRead | None:
    """The launch that reads once, or None where a share doesn't fit or would be read in crumbs."""

    def programs(groups: int) -> int:
        return shape.n * -(-shape.groups // groups)

    def row(groups: int) -> int:
        return groups * shape.depth * shape.itemsize

    tensors = 2 if backward else 1  # x, and dy
    # As many whole groups a program as make up a line, while there is work for every multiprocessor.
    groups = 1
    while (
        2 * groups <= shape.groups
        and row(2 * groups) <= LINE
        and tensors * shape.p * row(2 * groups) <= SHARE
        and programs(2 * groups) >= MULTIPROCESSORS
    ):
        groups *= 2
    if tensors * shape.p * row(groups) > SHARE:
        return None
    # Few programs: launches are saved. Many: bandwidth counts, and a row below a sector wastes it.
    if programs(groups) > 2 * MULTIPROCESSORS and row(groups) < SECTOR:
        return None
    # Blocks depend on the row alone, so that few kernels serve all shapes; a small image is masked.
    width = groups * shape.depth
    block_c, unroll = max(pow2(width), 16), 2 if backward else 4
    align = min(width & -width, 16 // shape.itemsize)
    return OneRead(groups, max(2048 // block_c, 1), block_c, unroll, warps=8, align=align)


def _two_pass(shape: Shape, backward: bool) -> TwoPass:
    block_c = min(64, pow2(shape.c))
    block_p, unroll = 2048 // block_c, 2 if backward else 4
    blocks = -(-shape.c // block_c)
    # A multiprocessor holds three programs of the statistics of one source (72 registers a thread), two of
    # two sources or of the gradient's sums (93 to 124). One wave, or two, and never a few programs more,
    # which would run alone at the end. The merge holds all chunks of its channels at once.
    held = 3 if shape.sources == 1 and not backward else 2
    programs = 4 // held * held * MULTIPROCESSORS
    most = min(128, max(8192 // pow2(shape.depth), 1))
    wanted = min(max(programs // (shape.n * blocks), 1), most)
    trip = block_p * unroll
    chunk = -(-shape.p // (wanted * trip)) * trip
    return TwoPass(block_p, block_c, unroll, chunk, warps=8, apply_p=block_p, apply_warps=4)


def _interpreted(shape: Shape) -> OneRead | TwoPass:
    """One read below 512 positions, so that a small test meets it and a large one the other.

    A block has at most 2^20 elements, there as on a GPU; so has the square of channels that adds up groups.
    """
    if shape.p <= 512:
        groups = max(min(shape.groups, 1024 // shape.depth), 1)
        block_c = pow2(groups * shape.depth)
        return OneRead(groups, min(pow2(shape.p), (1 << 20) // block_c), block_c, unroll=1, warps=1)
    block_c = min(pow2(shape.c), 1024)
    return TwoPass(1024, block_c, 1, chunk=2048, warps=1, apply_p=1024, apply_warps=1)


def merge(shape: Shape, chunks: int) -> Merge:
    """Whole groups of about 32 channels a program: what it reads is little, how long it takes is latency."""
    groups = 1
    while 2 * groups <= shape.groups and 2 * groups * shape.depth <= 32:
        groups *= 2
    block_k = pow2(chunks) if shape.depth > 64 else max(pow2(chunks), 16)  # few kernels, or small tiles
    block_c = pow2(groups * shape.depth)
    return Merge(groups, block_k, block_c, warps=4 if block_k * block_c <= 2048 else 8)
