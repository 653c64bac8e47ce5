"""Checks of what a user passes in: each returns the value in one form, or raises InvalidArgument by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

from torch import Tensor

from admfast.diffusion.respacing import whole_number
from admfast.errors import Unavailable, invalid
from admfast.models import NetConfig, UpsamplerConfig
from admfast.ops import dispatch

LARGEST_SEED = 2**64 - 1


def whole_numbers(name: str, value: object, low: int, high: int) -> list[int]:
    """Return one whole number, or several (a list, range, array or tensor), as a list, each in low..high."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, str) or not isinstance(values, Iterable):
        values = [values]
    return [whole_number(name, item, low, high) for item in values]


def real_number(name: str, value: object) -> float:
    """Return a finite number as a float."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise invalid(name, value, "a finite number")
    return float(value)


def float_images(name: str, value: object, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor of floats; `shape` is the one it must have, None for any."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise invalid(name, kind, "a tensor of floats")
    if shape is not None and tuple(value.shape) != shape:
        raise invalid(f"{name}.shape", tuple(value.shape), f"{shape}")
    if 0 in value.shape:
        raise invalid(f"{name}.shape", tuple(value.shape), "at least one image, and no side empty")
    return value


def check_low_res(config: NetConfig, low_res: object, count: int) -> None:
    """An upsampler needs a low-resolution image for each of its images, no other network takes one."""
    if isinstance(config, UpsamplerConfig) != (low_res is not None):
        given = None if low_res is None else "given"
        raise invalid("low_res", given, "upsamplers need it and no other network takes it")
    if low_res is None:
        return
    shape = tuple(float_images("low_res", low_res).shape)
    if len(shape) != config.dims + 2 or shape[:2] != (count, config.in_channels):
        sides = ", ".join("dhw"[3 - config.dims :])
        raise invalid("low_res.shape", shape, f"({count}, {config.in_channels}, {sides})")


def check_implementations(impl: object) -> None:
    """Refuse an implementation that isn't known, or that this machine lacks, before anything runs."""
    if not isinstance(impl, str | None):
        raise invalid("impl", impl, "the name of an implementation, or None")
    value = dispatch.setting()
    for op, table in dispatch.TABLES.items():
        name = dispatch.named_by_environment(op, value)
        reason = name is not None and table.named(name, dispatch.ENVIRONMENT, value).available()
        if reason:
            raise Unavailable(f"{dispatch.ENVIRONMENT}={value!r}: {op} can't run on it here: {reason}")
    for op in ("normal", "sampler_step"):
        reason = impl and dispatch.TABLES[op].named(impl).available()
        if reason:
            raise Unavailable(f"impl={impl!r}: {op} can't run on it here: {reason}")


def check_functions(**functions: object) -> None:
    """Refuse what is neither None nor can be called."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise invalid(name, function, "a function, or None")
