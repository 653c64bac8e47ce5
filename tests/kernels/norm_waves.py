"""`python -m tests.kernels.norm_waves`: count, without a GPU, the waves of programs of GroupNorm's launches.

A wave is as many programs as run at once on an H100. The shapes are those of the released networks, in
bfloat16 with float32 weights. It prints one line of JSON for each number of programs of each kernel: kernel,
batch, an example of its shape, programs, registers, slots (programs that run at once), and `fill`, the share
of the slots of all waves that programs take. Launches that surely have one wave are left out. It is a process
of its own because Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.kernels.compile_kernels import (
    BATCHES,
    EVERY,
    Call,
    compiled,
    empty,
    launches,
    norm_launch,
    real_cases,
    source,
)

H100 = 90
# Of a multiprocessor of an H100: registers, threads of resident warps, and resident programs.
REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32
# A multiprocessor has four parts, each with a quarter of its registers and warps.
PARTS, REGISTER_UNIT = 4, 256  # registers are given to a warp in units


def slots(registers: int, warps: int) -> int:
    """Return how many programs run at once, if a thread has so many registers and a program so many warps."""
    per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    resident_warps = PARTS * min(REGISTERS // PARTS // per_warp, WARPS // PARTS)
    return norm_launch.MULTIPROCESSORS * min(resident_warps // warps, PROGRAMS)


def main() -> None:
    (norm,) = (cases for cases in EVERY if cases.op == "group_norm_silu")
    registers: dict[tuple, int] = {}

    def compiled_registers(call: Call) -> int:
        src, key = source(call)
        if key not in registers:
            registers[key] = compiled(src, call.options, H100)["registers"]
        return registers[key]

    found: dict[tuple, dict[str, Any]] = {}
    for case in real_cases()["group_norm_silu"]:
        for batch in BATCHES:
            for call in launches(norm, norm.arguments(empty, torch.bfloat16, n=batch, **case)):
                row = dict(kernel=call.kernel.__name__, batch=batch, programs=call.programs, shape=str(case))
                # The limit of registers gives the fewest slots: a launch that fits them has one wave.
                if call.programs > slots(call.registers, call.warps):
                    row["registers"] = compiled_registers(call)
                    row["slots"] = slots(row["registers"], call.warps)
                    row["fill"] = round(norm_launch.fill(call.programs, row["slots"]), 3)
                    key = call.kernel.__name__, call.programs, row["registers"], call.warps
                    found.setdefault(key, row)
    for row in found.values():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
