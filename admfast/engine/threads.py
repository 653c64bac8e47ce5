"""Choose the number of threads of a step on a CPU.

At the end of every operation, torch's threads (OpenMP) spin while they wait for each other. If another
process uses one of the processors, the thread on that processor is late by a scheduler's slice, several
milliseconds, and the others spin until then. If operations are shorter than a slice, a step takes many times
as long.

The table shows milliseconds per step, the best of 2 to 3 samples, on two processors of an AMD EPYC (torch
2.13, float32, digits guided). In the last two columns, two threads wait passively, as set by
`admfast.host.wait_passively`; in the other columns, threads wait as torch does by default. "busy" means that
another process kept one processor busy; for two threads that wait by default, the least and the most are
given. Machines with more processors were not measured.

    step                 convolution    1 thread    busy     2 threads    busy           passive   busy
    digits32, batch 1      19 MFLOP           18      18            15    45 to 130           27      20
    digits32, batch 4      76 MFLOP           29      32            25    103 to 195          45      39
    digits32, batch 16    302 MFLOP           98      93            56    190 to 260         103     110
    imagenet64, batch 1   2.7 GFLOP         1166    1209           682    1833               722    1222

`python -m bench.threads` repeats the measurement. "convolution" is the result of `convolution_operations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

# Operations per thread that take as long as a scheduler's slice, about 10 ms: enough to use all processors.
SLICE_OPERATIONS = 512e6
# Operations per thread, about 2 ms, that justify one more thread while one processor is left free.
MIN_OPERATIONS_PER_THREAD = 128e6


class WidthConfig(Protocol):
    """The fields of a network's configuration that determine its width at full resolution."""

    model_channels: int
    channel_mult: Sequence[float]
    dims: int


def convolution_operations(config: WidthConfig, shape: Sequence[int]) -> int:
    """Return the operations of a 3x3 convolution at the network's full resolution: 2 * 3^dims C^2 N H W.

    shape: of the images, (N, C, *spatial). Threads wait for each other after about this much work.
    """
    width = int(config.channel_mult[0] * config.model_channels)
    return 2 * 3**config.dims * width**2 * math.prod([shape[0], *shape[2:]])


def threads_for(work: float, processors: int) -> int:
    """Return the number of threads for a step; it depends only on the work and the machine.

    work: `convolution_operations` of the step. All processors are used if each has work for a slice or
    longer. Otherwise one stays free, and each of several threads has at least `MIN_OPERATIONS_PER_THREAD`.
    Some operations of torch (such as a 1x1 convolution of few pixels) round differently on another number of
    threads. So the number never depends on measured times, and rows that run as Python functions use the same
    number.
    """
    if work >= SLICE_OPERATIONS * processors:
        return processors
    return max(1, min(processors - 1, int(work / MIN_OPERATIONS_PER_THREAD)))
