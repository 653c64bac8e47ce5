"""How a call of `group_norm_silu` is cut into programs: a table by shape, no search at run time.

A chosen launch is a pure function of the shape, so that a call can be captured in a graph and is bit for bit
the same every time. Triton's interpreter pays for programs and loop trips, not for elements: it gets larger
blocks. `tests/kernels/` compiles every launch that an ADM shape leads to and refuses spilled registers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

MULTIPROCESSORS = 132  # H100; only how finely the work is cut depends on it
INTERPRETED = bool(triton.knobs.runtime.interpret)  # read here as the decorators read it: once


@dataclass(frozen=True)
class OneRead:
    """One program holds all positions of `groups` whole groups in registers, in [block_p, block_c]."""

    groups: int
    block_p: int
    block_c: int
    warps: int


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

    def chunks(self, positions: int) -> int:
        return -(-positions // self.chunk)


@dataclass(frozen=True)
class Shape:
    """What a launch depends on: images, positions an image, channels, groups, bytes an element."""

    n: int
    p: int
    c: int
    groups: int
    itemsize: int

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

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, num_warps=self.warps)


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


# Values of a tile. 16 warps of 64 registers' worth of x is the most that leaves room for addresses; the
# backward holds x and du. Where programs abound, two must fit a multiprocessor so that one loads while
# another stores.
FORWARD_TILE, BACKWARD_TILE, CROWDED_TILE = 32768, 16384, 16384


def choose(shape: Shape, backward: bool) -> OneRead | TwoPass:
    """The launch of a forward, or of a backward, on `shape`."""
    if INTERPRETED:
        return _interpreted(shape)
    return _one_read(shape, BACKWARD_TILE if backward else FORWARD_TILE) or _two_pass(shape)


def _one_read(shape: Shape, largest: int) -> OneRead | None:
    """The launch that reads once, or None where a share doesn't fit or would be read in crumbs."""
    block_p = pow2(shape.p)

    def block_c(groups: int) -> int:
        return pow2(groups * shape.depth)

    # As many whole groups a program as make a row of a line of 128 bytes, while there is work for all.
    groups = 1
    while (
        2 * groups <= shape.groups
        and 2 * groups * shape.depth * shape.itemsize <= 128
        and block_p * block_c(2 * groups) <= min(largest, CROWDED_TILE)
        and shape.n * -(-shape.groups // (2 * groups)) >= MULTIPROCESSORS
    ):
        groups *= 2
    tile = block_p * block_c(groups)
    if shape.n * -(-shape.groups // groups) > 2 * MULTIPROCESSORS:
        # Many programs: bandwidth counts, not launches. A row below a sector of 32 bytes wastes it.
        if groups * shape.depth * shape.itemsize < 32:
            return None
        largest = min(largest, CROWDED_TILE)
    if tile > largest:
        return None
    return OneRead(groups, block_p, block_c(groups), warps=min(max(tile // 512, 4), 16))


def _two_pass(shape: Shape) -> TwoPass:
    block_c = min(64, pow2(shape.c))
    block_p, unroll = 2048 // block_c, 4
    blocks = -(-shape.c // block_c)
    # Four programs a multiprocessor; the merge holds all chunks of its channels at once.
    most = min(128, max(16384 // pow2(shape.depth), 1))
    wanted = min(-(-4 * MULTIPROCESSORS // (shape.n * blocks)), most)
    trip = block_p * unroll
    chunk = -(-shape.p // wanted)
    chunk = -(-chunk // trip) * trip
    return TwoPass(block_p, block_c, unroll, chunk, warps=8, apply_p=2048 // block_c, apply_warps=4)


def _interpreted(shape: Shape) -> OneRead | TwoPass:
    """One read below 512 positions, so that a small test meets it and a large one the other."""
    if shape.p <= 512:
        return OneRead(shape.groups, pow2(shape.p), pow2(shape.c), warps=1)
    return TwoPass(1024, pow2(shape.c), 1, chunk=2048, warps=1, apply_p=1024, apply_warps=1)


def merge_groups(shape: Shape) -> int:
    """Whole groups that one program merges: about 64 channels."""
    groups = 1
    while 2 * groups <= shape.groups and 2 * groups * shape.depth <= 64:
        groups *= 2
    return groups
