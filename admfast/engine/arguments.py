"""Checks of arguments that need the model or the implementations of this machine."""

from __future__ import annotations

from admfast import checks
from admfast.errors import Unavailable, invalid
from admfast.models import NetConfig, UpsamplerConfig
from admfast.ops import dispatch

LARGEST_SEED = 2**64 - 1


def check_low_res(config: NetConfig, low_res: object, count: int) -> None:
    """An upsampler needs a low-resolution image for each of its images, no other network takes one."""
    if isinstance(config, UpsamplerConfig) != (low_res is not None):
        given = None if low_res is None else "given"
        raise invalid("low_res", given, "upsamplers need it and no other network takes it")
    if low_res is None:
        return
    shape = tuple(checks.images("low_res", low_res).shape)
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
