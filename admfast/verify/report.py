"""The report of a verification: tables and the verdict, and a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from admfast.errors import Unavailable
from admfast.files.atomic import atomic_path
from admfast.files.tables import table
from admfast.verify.budget import Deviation, Verification

SHOWN_LAYERS = 5


def report(found: Verification) -> str:
    """Return the tables and the verdict as text."""
    steps = [(d.name, f"{d.error:.2e}", f"{d.allowed:.2e}", _bar(d)) for d in found.steps]
    layers = sorted(found.layers, key=lambda d: -d.error / d.allowed)[:SHOWN_LAYERS]
    worst = [(d.name, f"{d.error:.2e}", f"{d.allowed:.2e}") for d in layers]
    psnr = "no difference" if math.isinf(found.psnr) else f"{found.psnr:.1f} dB"
    images = [
        ("PSNR", psnr, f"{found.budget.psnr:.0f} dB or more"),
        ("8-bit values that differ", f"{100 * found.differing:.3f} %", ""),
        ("largest difference", f"{found.largest} of 255", ""),
    ]
    failures = found.failures
    verdict = "past the budget: " + "; ".join(failures) if failures else "within the budget"
    return "\n\n".join(
        [
            table(steps, ("images against the reference", "relative error", "allowed", "1e-8 to 1, log")),
            table(worst, (f"worst of {len(found.layers)} layers", "relative error", "allowed")),
            table(images, ("images at the end", "", "budget")),
            verdict,
        ]
    )


def _bar(deviation: Deviation) -> str:
    """Draw the error on a logarithmic scale from 1e-8 to 1, a mark every factor of 10^(1/4)."""
    if not math.isfinite(deviation.error):
        return "not finite"
    marks = 0 if deviation.error <= 1e-8 else round(4 * (math.log10(deviation.error) + 8))
    return "#" * min(marks, 32)


def plotting() -> Any:
    """Return matplotlib's figures, which need no display. Raises: Unavailable."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unavailable("plot: matplotlib is not installed (pip install 'admfast[bench]')") from None
    return Figure


def draw(found: Verification, path: Path, title: str) -> None:
    """Draw the error of every step and what is allowed into a PNG file."""
    figure = plotting()(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=f"Fast path against the float32 reference ({title})")
    axes.semilogy(range(1, len(found.steps) + 1), [d.error for d in found.steps], marker=".", label="x")
    axes.axhline(found.budget.step, color="tab:red", label="allowed")
    axes.set(xlabel="step", ylabel="relative error")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
