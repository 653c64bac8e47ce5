"""The CUDA kernels' bodies, compiled for the host and callable as an implementation of the ops."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from ctypes import c_bool, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from admfast.ops.update import PackedTable, SamplerState

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAYOUTS = ("strided", "planar", "interleaved")


class Strided(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("n", c_int64), ("c", c_int64), ("p", c_int64), ("type", c_int)]


class Counter(ctypes.Structure):
    _fields_ = [("at", c_void_p), ("wide", c_bool), ("offset", c_int64)]


class SamplerArgs(ctypes.Structure):
    """The struct SamplerArgs of csrc/sampler_step.h, with the same fields."""

    _fields_ = [
        *[(name, c_int64) for name in "NCP"],
        *[(name, c_void_p) for name in ("x", "x0", "saved", "history")],
        *[(name, Strided) for name in ("out", "out2", "grad")],
        ("has_variance", c_bool),
        *[(name, c_void_p) for name in ("seeds", "noise", "table")],
        ("rows", c_int64),
        *[(name, Counter) for name in ("row", "noise_row")],
        ("stream", c_uint32),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the driver."""
    folder = Path(tempfile.mkdtemp(prefix="admfast-emulator-"))
    source, target = Path(__file__).with_name("emulate_sampler_step.cpp"), folder / "emulator.so"
    command = [str(COMPILER), *FLAGS, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    assert loaded.args_size() == ctypes.sizeof(SamplerArgs), "SamplerArgs differs from csrc/sampler_step.h"
    return loaded


def strided(t: Tensor | None, keep: list[Tensor]) -> Strided:
    if t is None:
        return Strided(None, 0, 0, 0, 0)
    flat = t if t.dim() == 3 else t.flatten(2)
    keep.append(flat)
    return Strided(flat.data_ptr(), *flat.stride(), TYPES[flat.dtype])


def pointer(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def counter(value: int | Tensor) -> Counter:
    if isinstance(value, Tensor):
        return Counter(value.data_ptr(), value.dtype == torch.int64, 0)
    return Counter(None, False, value)


def update(
    state: SamplerState,
    out: Tensor,
    table: PackedTable,
    row: int | Tensor,
    *,
    threads: int = 37,
    wanted: str | None = None,
    out2: Tensor | None = None,
    grad: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    noise_row: int | Tensor | None = None,
    stream: int = 1,
) -> tuple[str, str]:
    """Run `sampler_step` in the kernel's body. Return the memory layouts that it used for out and grad."""
    x, keep = state.x, []
    buffers = (x, state.x0, state.saved, state.history)
    places = {t.untyped_storage().data_ptr() for t in buffers if t is not None}

    def apart(t: Tensor | None) -> Tensor | None:
        return t.clone() if t is not None and t.untyped_storage().data_ptr() in places else t

    if x.numel() == 0:
        return LAYOUTS[0], LAYOUTS[0]
    noise = None if noise is None else apart(noise.float().contiguous())
    grad = None if grad is None else apart(grad.float())
    args = SamplerArgs(
        x.shape[0], x.shape[1], math.prod(x.shape[2:]),
        *map(pointer, buffers),
        strided(apart(out), keep), strided(apart(out2), keep), strided(grad, keep),
        out.shape[1] == 2 * x.shape[1],
        pointer(seeds), pointer(noise), table.device.data_ptr(), len(table),
        counter(row), counter(row if noise_row is None else noise_row), stream,
    )  # fmt: skip
    taken = library().emulate_update(
        ctypes.byref(args), c_int64(threads), -1 if wanted is None else LAYOUTS.index(wanted)
    )
    assert taken >= 0, "a 16-byte access is not aligned"
    return LAYOUTS[taken % 10], LAYOUTS[taken // 10]


def normal(
    seeds: Tensor, shape: tuple[int, ...], row: int, stream: int, into: Tensor | None = None
) -> Tensor:
    """Run `normal` in the kernel's body, by default into a new, aligned buffer."""
    z = torch.full((len(seeds), math.prod(shape)), float("nan")) if into is None else into
    wrong = library().emulate_normal(
        c_void_p(seeds.data_ptr()), c_int64(len(seeds)), c_int64(math.prod(shape)), c_uint32(row),
        c_uint32(stream), c_void_p(z.data_ptr()),
    )  # fmt: skip
    assert wrong == 0, "a 16-byte access is not aligned"
    return z.view(len(seeds), *shape)
