"""`python -m tests.kernels.compile_kernels`: compile, without a GPU, the kernels that ADM shapes launch.

It is a process of its own because Triton decides at import whether kernels are compiled or interpreted. The
shapes are those of the released networks, run on the meta device. It prints one line of JSON per kernel:
name, key, registers, bytes of stack (which holds spilled registers), shared memory, the bytes of a thread's
widest and narrowest load and store, the width that the launch's channels allow, and seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from admfast._source_tree import import_kernels
from admfast.models import ClassifierConfig, NetConfig, UpsamplerConfig, build
from admfast.models.presets import MODELS
from admfast.ops import Implementation, OpTable
from admfast.ops.cases import Case, OpCases, all_cases
from tests.kernels.values import drawing

package = import_kernels()
from admfast.kernels import norm_launch  # noqa: E402
from admfast.kernels.norm_launch import Call  # noqa: E402

MODULES = [
    importlib.import_module(f"admfast.kernels.{file.name}") for file in pkgutil.iter_modules(package.__path__)
]
LAUNCHERS = {name: value for module in MODULES for name, value in vars(module).items() if callable(value)}
EVERY = [cases for cases in all_cases() if "triton" in cases.call_raw_ops]

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ARCHITECTURES = (80, 90, 100)
BATCHES = (1, 8, 32)
SAME = "weights as x"


def real_cases() -> dict[str, list[Case]]:
    """Return the distinct cases of each op with Triton kernels, recorded while the released networks run."""
    found: dict[str, dict[str, Case]] = {cases.op: {} for cases in EVERY}
    choose = OpTable.choose

    def recorded(table: OpTable, *arguments: Any, **options: Any) -> Implementation:
        entry = choose(table, *arguments, **options)

        def forward(*call: Any, **more: Any) -> Any:
            for cases in EVERY:
                if table.op == (cases.launched_by or cases.op):
                    found[cases.op] |= {str(case): case for case in cases.cases_from_call(*call, **more)}
            return entry.forward(*call, **more)

        return dataclasses.replace(entry, forward=forward)

    with mock.patch.object(OpTable, "choose", recorded):
        run_the_released()
    return {op: list(cases.values()) for op, cases in found.items()}


def run_the_released() -> None:
    """Run a forward of every released network on the meta device."""
    for preset in MODELS.values():
        if preset.network is not None and preset.file.endswith(".pt"):
            run_on_meta(preset.network)


def run_on_meta(config: NetConfig) -> None:
    """Run a forward of a network on the meta device."""
    with torch.device("meta"), torch.no_grad():
        network = build(config)
        x, t = torch.empty(1, 3, config.image_size, config.image_size), torch.zeros(1)
        label = torch.zeros(1, dtype=torch.long)
        if isinstance(config, ClassifierConfig):
            network(x, t)
        elif isinstance(config, UpsamplerConfig):
            network(x, t, low_res=torch.empty(1, 3, 64, 64), y=label)
        else:
            network(x, t, label if config.num_classes else None)


def launches(cases: OpCases, arguments: dict[str, Any]) -> list[Call]:
    """Return the launches of an op's kernels, forward and backward, for tensors on the meta device."""
    with listing() as calls:
        cases.call_raw_ops["triton"](lambda name, *given: LAUNCHERS[name](*given), **arguments)
    return calls


@contextlib.contextmanager
def listing() -> Iterator[list[Call]]:
    """Collect launches instead of running them."""
    calls: list[Call] = []
    with mock.patch.object(norm_launch, "run", lambda planned, device: calls.extend(planned)):
        yield calls


def source(call: Call) -> tuple[ASTSource, tuple]:
    """Return the source that Triton compiles for a launch, and its key: kernel and constants, not dtypes."""
    signature, constants, attributes = {}, {}, {}
    for parameter in call.kernel.params:
        value, name = call.arguments[parameter.name], parameter.name
        specialised = not isinstance(value, Tensor | None) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = f"*{DTYPES[value.dtype]}" if isinstance(value, Tensor) else width(value)
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    key = (call.kernel.__name__, tuple(constants.items()), tuple(attributes), tuple(call.options.items()))
    key = (*key, *(name for name, kind in signature.items() if kind == "i64"))
    return ASTSource(call.kernel, signature, constants, attributes), key


def width(value: int) -> str:
    """Return the type that Triton gives an integer argument."""
    return "i32" if value < 1 << 31 else "i64"


def distinct(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[tuple, dict[torch.dtype, tuple]]]:
    """Yield (key, {dtype: (source, options, bytes allowed)}) of every distinct kernel of the networks."""
    found: dict[tuple, dict[torch.dtype, tuple]] = {}
    real = real_cases()
    for cases in EVERY:
        assert real[cases.op], f"no released network needs the kernels of {cases.op}"
        for case, batch, dtype in itertools.product(real[cases.op], BATCHES, dtypes):
            for call, mark in marked(cases, case, batch, dtype):
                src, key = source(call)
                variants = found.setdefault((*key, *mark), {})
                variants.setdefault(dtype, (src, call.options, allowed(call, dtype)))
    yield from sorted(found.items(), key=lambda item: repr(item[0]))


def marked(
    cases: OpCases, case: Case, batch: int, dtype: torch.dtype
) -> Iterator[tuple[Call, tuple[str, ...]]]:
    """Yield the launches of a case; those of the sums again, marked, with weights in the dtype of x.

    Loads of float32 weights are as wide as those of images should be, and would hide narrow ones. The other
    kernels store images, which shows their width.
    """
    for call in launches(cases, cases.arguments(empty, dtype, n=batch, **case)):
        yield call, ()
    if "weights" in case:
        for call in launches(cases, cases.arguments(empty, dtype, n=batch, **case | dict(weights=None))):
            if call.kernel.__name__.endswith("_sums_kernel"):
                yield call, (SAME,)


def compiled(src: ASTSource, options: dict[str, int], architecture: int) -> dict[str, Any]:
    """Compile a kernel and read its registers, stack, shared memory and access widths from the result."""
    start = time.perf_counter()
    kernel = triton.compile(src, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert seen, usage
    registers, stack, shared, local = map(int, seen.groups())
    found = dict(architecture=architecture, registers=registers, stack=stack, local=local, shared=shared)
    for name in ("ld", "st"):
        bytes_at_once = accesses(kernel.asm["ptx"], name)
        found |= {name: max(bytes_at_once, default=0), f"least_{name}": min(bytes_at_once, default=0)}
    return found | dict(seconds=round(time.perf_counter() - start, 2))


def accesses(ptx: str, access: str) -> list[int]:
    """Return the bytes per thread of every global load ("ld") or store ("st")."""
    found = re.findall(rf"\b{access}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfu](\d+)\b", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def allowed(call: Call, dtype: torch.dtype) -> int:
    """Return the bytes that a thread may move at once: 16, or less if a program's channels allow less."""
    return min(16, call.arguments.get("ALIGN", 16) * dtype.itemsize)


empty = drawing("meta", seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every dtype on every architecture (default: one)")
    everything = parser.parse_args().all
    assert not norm_launch.INTERPRETED, "unset TRITON_INTERPRET"
    assert os.access(CUOBJDUMP, os.X_OK), CUOBJDUMP
    for number, (key, variants) in enumerate(distinct(tuple(DTYPES))):
        chosen = [(dtype, a) for dtype in variants for a in ARCHITECTURES]
        # By default one variant of each key, with dtypes and architectures in turn.
        for dtype, architecture in chosen if everything else [chosen[number % len(chosen)]]:
            src, options, allowed_bytes = variants[dtype]
            row = dict(kernel=key[0], key=repr(key[1:]), dtype=DTYPES[dtype], allowed=allowed_bytes)
            print(json.dumps(row | compiled(src, options, architecture)), flush=True)


if __name__ == "__main__":
    main()
