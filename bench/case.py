"""What a group of measurements is made of: cases, what they may raise, and how their outputs are checked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.results import Row
from bench.timing import measure, peak_mb, queue_seconds

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


Measure = Callable[["Settings"], Row]


class Unavailable(Exception):
    """This device or this torch can't do it; the message is the row's reason."""


class WrongResult(Exception):
    """The output is not what the reference computes; the message is the row's reason."""


@dataclass(frozen=True)
class Settings:
    """How to measure: where, how many seconds a row, only to try the machinery, disturbed rows once more."""

    device: torch.device
    seconds: float = 0.06
    quick: bool = False
    again: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Case:
    """One row to be: what it is called, and what builds its inputs, checks, times and returns fields."""

    kind: str
    dtype: str
    provider: str
    shape: Mapping[str, Any]
    measure: Measure
    note: Row = field(default_factory=dict)
    # Whether it was measured together with another case, so that its row costs no time.
    measured: Callable[[], bool] = lambda: False


def timed(
    fn: Callable[[], object],
    settings: Settings,
    *,
    flop: float | None = None,
    nbytes: float | None = None,
    rel_err: float | None = None,
    implementation: str = "",
) -> Row:
    """Time `fn` and return the row's fields; rates come from the counted operations and bytes of one call."""
    peak = peak_mb(fn, settings.device)
    queued, begin = queue_seconds(), time.perf_counter()
    timing = measure(fn, settings.device, settings.seconds)
    waited = max(0.0, queue_seconds() - queued) / (time.perf_counter() - begin)
    row: Row = {
        "ms": _short(timing.ms),
        "ms_q20": _short(timing.ms_q20),
        "ms_q80": _short(timing.ms_q80),
        "samples": timing.samples,
        "waited": round(waited, 3),
    }
    if flop is not None:
        row |= {"flop": int(flop), "tflops": _short(flop / timing.ms / 1e9)}
    if nbytes is not None:
        row |= {"bytes": int(nbytes), "gbps": _short(nbytes / timing.ms / 1e6)}
    if peak is not None:
        row["peak_mb"] = _short(peak)
    if rel_err is not None:
        row["rel_err"] = float(f"{rel_err:.2e}")
    if implementation:
        row["implementation"] = implementation
    return row


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def checked(out: torch.Tensor, ref64: torch.Tensor, limit: float) -> float:
    """|out - ref| / |ref| in float64; raises WrongResult where it exceeds `limit` or is not a number."""
    out, ref64 = out.detach(), ref64.detach().double().cpu()
    error = float((out.double().cpu() - ref64).norm() / ref64.norm())
    if not error <= limit:
        raise WrongResult(f"relative error {error:.2e} exceeds {limit:.2e}")
    return error


def product_limit(
    dtype: str, length: int, out_dtype: torch.dtype | None = None, *, fast: bool = False
) -> float:
    """Largest relative error a sum of `length` products may have: output rounding plus accumulation.

    The reference is computed from the very same rounded operands, so theirs does not count, except in tf32,
    which drops each operand to 10 bits inside. Accumulators are float32, their errors grow like a random
    walk. Tensor cores keep 13 bits of an fp8 sum; with fast accumulation every 32 products are added to such
    a sum.
    """
    rounding = torch.finfo(out_dtype or DTYPES[dtype]).eps
    if dtype == "tf32":
        rounding += 2 * 2.0**-10
    if dtype == "fp8":
        rounding += (length / 32 if fast else 128 / 32) * 2.0**-13
    return rounding + torch.finfo(torch.float32).eps * length**0.5


@contextlib.contextmanager
def float32_mode(dtype: str) -> Iterator[None]:
    """Let float32 products run in tf32 (dtype "tf32") or full float32 (any other); restore what was set."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv


def first_line(error: BaseException) -> str:
    """First non-empty line of an exception's message, at most 300 characters; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def unavailable(reason: str) -> Measure:
    """A case's `measure` that only says why there is nothing to measure."""

    def refuse(settings: Settings) -> Row:
        raise Unavailable(reason)

    return refuse


def dtype_missing(dtype: str, settings: Settings) -> str:
    """Why products in `dtype` can't be measured on this device; "" where they can."""
    if dtype == "tf32":
        if not settings.cuda:
            return "tf32 is a mode of CUDA tensor cores"
        if torch.cuda.get_device_capability(settings.device) < (8, 0):
            return "tf32 needs compute capability 8.0"
    if dtype == "fp8":
        small = torch.ones(32, 32, device=settings.device).to(DTYPES["fp8"])
        try:
            fp8_product(small, small.t())
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            return f"torch._scaled_mm: {first_line(error)}"
    return ""


def fp8_product(a: torch.Tensor, b: torch.Tensor, fast: bool = False) -> torch.Tensor:
    """a @ b of two e4m3 matrices (b column-major) with unit scales, in bfloat16."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)
