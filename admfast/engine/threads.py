"""Choose the number of threads of a step on a CPU.

torch's threads (OpenMP) wait busily for each other at the end of every operation. With another process on
one of the processors, the thread that shares it arrives a scheduler's slice late, milliseconds, and the
others spin until then: where operations are shorter than a slice, a step takes many times as long. Two
processors of an AMD EPYC, torch 2.13, float32, digits guided, best milliseconds a step of 2 to 3 samples with
waiting as torch has it, then passive (as `admfast.host.wait_passively` sets it); "busy" is beside one busy
process, for two threads the least and the most. Machines of more processors were not measured:

    step                 convolution    1 thread    busy     2 threads    busy           passive   busy
    digits32, batch 1      19 MFLOP           18      18            15    45 to 130           27      20
    digits32, batch 4      76 MFLOP           29      32            25    103 to 195          45      39
    digits32, batch 16    302 MFLOP           98      93            56    190 to 260         103     110
    imagenet64, batch 1   2.7 GFLOP         1166    1209           682    1833               722    1222

`python -m bench.threads` measures them again. The convolution is the one that `convolution` counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

# Operations of a convolution on one thread that outlast a scheduler's slice, some 10 ms: all processors.
SLICE = 512e6
# And that are worth a thread of their own where a processor is left free for others: some 2 ms.
GRAIN = 128e6


class Width(Protocol):
    """The part of a network's configuration that says how wide it is."""

    model_channels: int
    channel_mult: Sequence[float]
    dims: int


def convolution(config: Width, shape: Sequence[int]) -> int:
    """Return the operations of a 3x3 convolution at the network's full resolution: 2 * 3^dims C^2 N H W.

    shape: of the images, (N, C, *spatial). Two threads meet after about so much work.
    """
    width = int(config.channel_mult[0] * config.model_channels)
    return 2 * 3**config.dims * width**2 * math.prod([shape[0], *shape[2:]])


def threads_for(work: float, processors: int) -> int:
    """Return the threads for a step, a function of nothing but its work (`convolution`) and the machine.

    All processors where each one's part outlasts a slice; else one stays free, and no thread has less than
    `GRAIN`. Some of the library's operations (a 1x1 convolution of few pixels, say) round otherwise on
    another number of threads: timing has no say in it, and rows that functions run take the same number.
    """
    if work >= SLICE * processors:
        return processors
    return max(1, min(processors - 1, int(work / GRAIN)))
