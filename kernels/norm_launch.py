"""Cut a call of `group_norm_silu` into programs, by fixed rules on its shape; there is no search at run time.

The launch is a pure function of the shape, so a call can be captured in a graph and gives the same bits every
time. Triton's interpreter takes time per program and loop trip, not per element, so it gets larger blocks.
`tests/kernels/` compiles every launch that the shapes of ADM lead to, and fails if registers are spilled.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

MULTIPROCESSORS = 132  # of an H100; determines only how finely the work is cut
LEAST_FILL = 0.85  # of the slots in several waves of programs: the programs of a small last wave run alone
INTERPRETED = bool(triton.knobs.runtime.interpret)  # read once, at import, as Triton's decorators do


@dataclass(frozen=True)
class OneRead:
    """A launch of one kernel, in which a program takes all positions of `groups` whole groups.

    A trip of the program's loop takes `unroll` tiles of [block_p, block_c].
    """

    groups: int
    block_p: int
    block_c: int
    unroll: int
    warps: int
    align: int = 1  # divides the number of channels of a program, and so limits the width of its loads

    @property
    def block(self) -> dict[str, int]:
        return dict(BLOCK_P=self.block_p, BLOCK_C=self.block_c, UNROLL=self.unroll)

    def channel_arguments(self, depth: int) -> dict[str, Any]:
        """Return the kernel arguments that select a program's channels; a group has `depth` channels."""
        pieces = self.groups * depth // self.align
        return dict(pieces=pieces, ALIGN=self.align, SINGLE=is_single_group(self.groups, depth))


@dataclass(frozen=True)
class TwoPass:
    """A launch of three kernels: sums over chunks of positions, their merge, and an elementwise pass.

    A program of the sums takes `chunk` positions; a trip of its loop takes `unroll` tiles of
    [block_p, block_c]. The tiles of the elementwise pass are [apply_p, block_c].
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

    def spans(self, programs_per_span: int, positions: int, slots: int) -> dict[str, int]:
        """Return for the elementwise pass the positions of a program (`span`), and the number of spans.

        A span has `programs_per_span` programs, one for each image and block of channels. A program first
        prepares its channels, which takes 1.5 times the instructions of a tile; once per tile, this would
        take longer than the memory accesses. So a program takes up to 8 tiles, as long as there are enough
        programs to fill the `slots` (see `apply_slots`).
        """
        tiles = -(-positions // self.apply_p)
        wanted = max(min(-(-programs_per_span * tiles // slots), 8), 1)
        programs = {size: programs_per_span * -(-tiles // size) for size in range(wanted, 0, -1)}
        tiles_per_program = first_filled(programs, slots)
        return dict(span=tiles_per_program * self.apply_p, spans=-(-tiles // tiles_per_program))


@dataclass(frozen=True)
class Merge:
    """The launch of a merge: a program takes all chunks (at most `block_k`) of `groups` whole groups."""

    groups: int
    block_k: int
    block_c: int
    warps: int

    @property
    def block(self) -> dict[str, int]:
        return dict(BLOCK_K=self.block_k, BLOCK_C=self.block_c)

    def channel_arguments(self, depth: int) -> dict[str, Any]:
        """Return the kernel arguments that select a program's channels; a group has `depth` channels."""
        return dict(width=self.groups * depth, SINGLE=is_single_group(self.groups, depth))


@dataclass(frozen=True)
class Shape:
    """The sizes that decide a launch: images, positions, channels, groups, bytes per element, sources."""

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
    """One kernel launch; `arguments` are passed by name, constexpr or not."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    registers: int = 128

    @property
    def options(self) -> dict[str, int]:
        """Compiler options: warps, and the most registers per thread.

        Registers are always limited: without a limit, the compiler aims at some occupancy and spills some.
        With 128, two programs of 8 warps share a multiprocessor, or four of 4 warps. Kernels that need more,
        or can do with fewer, have a limit of their own.
        """
        return dict(num_warps=self.warps, maxnreg=self.registers)

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def is_single_group(groups: int, depth: int) -> bool:
    """Tell whether a program has one group, too wide for the [channels, channels] mask of `group_sum`."""
    return groups == 1 and depth > 64


def run(calls: list[Call], device: torch.device) -> None:
    """Launch the calls one after another on the current stream of `device`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            for call in calls:
                call.run()
        return
    for call in calls:
        call.run()


def fill(programs: int, slots: int) -> float:
    """Return the share of slots that programs take, in as many waves of `slots` programs as they need."""
    return programs / (-(-programs // slots) * slots)


def first_filled(programs: dict[int, int], slots: int) -> int:
    """Return the first size whose programs have one wave or fill theirs, else that with the fullest waves.

    programs: the number of programs by size, in the order of preference.
    """
    for size, count in programs.items():
        if count <= slots or fill(count, slots) >= LEAST_FILL:
            return size
    return max(programs, key=lambda size: fill(programs[size], slots))


def apply_slots(backward: bool, sources: int, resample: str | None, silu: bool) -> int:
    """Return how many programs of the elementwise pass run at once; they have 4 warps.

    By registers per thread in bfloat16: forward 72, 92 with two sources, 118 and 128 with resampling;
    backward 96, 78 without SiLU, 142 with two sources, 127 for "down", 153 for "up".
    """
    if resample is not None:
        resident = 3 if backward and resample == "up" else 4
    elif backward:
        resident = 3 if sources == 2 else 5 if silu else 6
    else:
        resident = 7 if sources == 1 else 5
    return resident * MULTIPROCESSORS


def next_power_of_2(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


# Bytes that one program may read twice. Two programs share a first-level cache of 256 KB. A program that is
# alone on its multiprocessor, with 16 KB in flight at a time, would take longer for more bytes than the three
# launches of two passes do.
MAX_REREAD_BYTES = 64 << 10
MAX_MERGE_ELEMENTS = 8192  # chunks times channels that a merge program holds at once
LINE_BYTES, SECTOR_BYTES = 128, 32  # bytes of a memory request, and the fewest that memory delivers


def choose(shape: Shape, backward: bool) -> OneRead | TwoPass:
    """Return the launch of a forward or a backward on `shape`."""
    if INTERPRETED:
        return _interpreted(shape)
    return _one_read(shape, backward) or _two_pass(shape, backward)


def _one_read(shape: Shape, backward: bool) -> OneRead | None:
    """Return the launch that reads once, or None if a program's bytes don't fit or its rows are too short."""

    def programs(groups: int) -> int:
        return shape.n * -(-shape.groups // groups)

    def row(groups: int) -> int:
        return groups * shape.depth * shape.itemsize

    tensors = 2 if backward else 1  # x, and dy
    # A program takes as many whole groups as fill a line, as long as every multiprocessor has work.
    groups = 1
    while (
        2 * groups <= shape.groups
        and row(2 * groups) <= LINE_BYTES
        and tensors * shape.p * row(2 * groups) <= MAX_REREAD_BYTES
        and programs(2 * groups) >= MULTIPROCESSORS
    ):
        groups *= 2
    if tensors * shape.p * row(groups) > MAX_REREAD_BYTES:
        return None
    # With few programs, one read saves launches. With many, bandwidth counts: rows below a sector waste it.
    if programs(groups) > 2 * MULTIPROCESSORS and row(groups) < SECTOR_BYTES:
        return None
    # Blocks depend only on the row, so that few compiled kernels serve all shapes; a small image is masked.
    width = groups * shape.depth
    block_c, unroll = max(next_power_of_2(width), 16), 2 if backward else 4
    align = min(width & -width, 16 // shape.itemsize)
    return OneRead(groups, max(2048 // block_c, 1), block_c, unroll, warps=8, align=align)


@functools.lru_cache(maxsize=1024)
def _two_pass(shape: Shape, backward: bool) -> TwoPass:
    block_c = min(64, next_power_of_2(shape.c))
    block_p, unroll = 2048 // block_c, 2 if backward else 4
    blocks = -(-shape.c // block_c)
    # A multiprocessor holds three programs of the statistics of one source (72 registers per thread), but two
    # for two sources or for the sums of the gradient (89 to 124). So there is one wave of three, or two waves
    # of two, or as many waves as the programs fill. The merge holds all chunks of its channels at once, which
    # limits their number.
    resident = 3 if shape.sources == 1 and not backward else 2
    slots = resident * MULTIPROCESSORS
    max_chunks = min(128, max(MAX_MERGE_ELEMENTS // next_power_of_2(shape.depth), 1))
    positions_per_trip = block_p * unroll
    programs = {}
    for waves in (4 // resident, 1, *range(2, 9)):
        target_chunks = min(max(waves * slots // (shape.n * blocks), 1), max_chunks)
        chunk = -(-shape.p // (target_chunks * positions_per_trip)) * positions_per_trip
        programs[chunk] = shape.n * blocks * -(-shape.p // chunk)
    chunk = first_filled(programs, slots)
    return TwoPass(block_p, block_c, unroll, chunk, warps=8, apply_p=block_p, apply_warps=4)


def _interpreted(shape: Shape) -> OneRead | TwoPass:
    """Return the launch for Triton's interpreter: one read up to 512 positions, else two passes.

    So tests with few elements reach both. In the interpreter, as on a GPU, a block has at most 2^20 elements,
    and so does the [channels, channels] mask of `group_sum`.
    """
    if shape.p <= 512:
        groups = max(min(shape.groups, 1024 // shape.depth), 1)
        block_c = next_power_of_2(groups * shape.depth)
        return OneRead(
            groups, min(next_power_of_2(shape.p), (1 << 20) // block_c), block_c, unroll=1, warps=1
        )
    block_c = min(next_power_of_2(shape.c), 1024)
    return TwoPass(1024, block_c, 1, chunk=2048, warps=1, apply_p=1024, apply_warps=1)


def choose_merge(shape: Shape, chunks: int) -> Merge:
    """Return the launch of a merge, which latency limits: about 32 channels of whole groups per program."""
    groups = 1
    while 2 * groups <= shape.groups and 2 * groups * shape.depth <= 32:
        groups *= 2
    # Deep groups need small tiles; for the others, a least size means fewer kernels to compile.
    block_k = next_power_of_2(chunks) if shape.depth > 64 else max(next_power_of_2(chunks), 16)
    block_c = next_power_of_2(groups * shape.depth)
    elements = block_k * block_c * shape.sources  # of each source its own chunks
    return Merge(groups, block_k, block_c, warps=4 if elements <= 2048 else 8)


def fits_one_merge(depth: int, chunks: list[int]) -> bool:
    """Tell whether a merge can hold these numbers of chunks at once, one per source; `depth`: of a group."""
    return bool(chunks) and max(chunks) * next_power_of_2(depth) <= MAX_MERGE_ELEMENTS
