"""`admfast info`: print what this machine and this installation can run, and why not more."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from admfast import __version__
from admfast.cli.op_examples import examples
from admfast.engine.numerics import THREAD_VARIABLES
from admfast.errors import AdmfastError
from admfast.files.tables import table
from admfast.host import PASSIVE_WAIT
from admfast.ops import TABLES, record_choices
from admfast.ops.native import build_info, instruction_set, reason_missing


def run_info() -> None:
    """Print versions, devices, the build, and the implementations of every op and which of them run."""
    missing_reason = reason_missing()
    rows = [
        ("admfast", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("xformers", _version("xformers")),
        ("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("CUDA", _cuda()),
        ("compiled ops", _build()),
        ("CPU loops", f"none: {missing_reason}" if missing_reason else instruction_set()),
    ]
    for name in (
        "ADMFAST_IMPL",
        "ADMFAST_CPU_ISA",
        "ADMFAST_BUILD",
        "ADMFAST_MIRROR",
        *THREAD_VARIABLES,
        *PASSIVE_WAIT,
    ):
        rows.append((name, os.environ.get(name, "not set")))
    print(table(rows))
    print()
    print(table(_implementations()))
    print()
    print(table(_chosen_implementations()))


def _implementations() -> list[tuple[str, str]]:
    """Return every implementation of every op, in the order of trial, and whether it is available."""
    rows = []
    for op, entry in TABLES.items():
        for implementation in entry.implementations:
            reason = implementation.reason_missing()
            rows.append((f"{op}: {implementation.name}", "available" if reason is None else f"no: {reason}"))
    return rows


def _chosen_implementations() -> list[tuple[str, str]]:
    """Make some calls of every op; return which implementation ran, and why not those before it."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        for op, description, run in examples(device):
            try:
                with record_choices() as choices:
                    run()
                choice = next(choice for choice in choices if choice.op == op)
            except AdmfastError as error:
                rows.append((f"{op}, {description}", f"refused: {error}"))
                continue
            explanation = "; ".join(f"{name}: {reason}" for name, reason in choice.skip_reasons.items())
            if not explanation and choice.requested_by:
                explanation = f"requested by {choice.requested_by}"
            rows.append(
                (f"{op}, {description}", f"{choice.name} ({explanation})" if explanation else choice.name)
            )
    return rows


def _version(package: str) -> str:
    """Return the installed version of a package, without importing it."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no: this torch was built without it" if torch.version.cuda is None else "no usable device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _build() -> str:
    """Return which compiled ops were built, and why not more."""
    build = build_info()
    if not build:
        return "no record of a build (run from a source tree that was not installed?)"
    reason = f" ({build['reason']})" if build.get("reason") else ""
    return f"{build['built']}, wanted {build['wanted']}{reason}"
