"""The report of a verification: tables and the verdict."""

from __future__ import annotations

import math

from admfast.files.tables import table
from admfast.verify.budget import Deviation, Verification

SHOWN_LAYERS = 5


def report(verification: Verification) -> str:
    """Return the tables and the verdict as text."""
    steps = [(d.name, f"{d.error:.2e}", f"{d.allowed:.2e}", _bar(d)) for d in verification.steps]
    layers = sorted(verification.layers, key=lambda d: -d.error / d.allowed)[:SHOWN_LAYERS]
    worst_layers = [(d.name, f"{d.error:.2e}", f"{d.allowed:.2e}") for d in layers]
    psnr = "no difference" if math.isinf(verification.psnr) else f"{verification.psnr:.1f} dB"
    images = [
        ("PSNR", psnr, f"{verification.budget.psnr:.0f} dB or more"),
        ("8-bit values that differ", f"{100 * verification.differing_fraction:.3f} %", ""),
        ("largest difference", f"{verification.largest_difference} of 255", ""),
    ]
    failures = verification.failures
    verdict = "past the budget: " + "; ".join(failures) if failures else "within the budget"
    return "\n\n".join(
        [
            table(steps, ("images against the reference", "relative error", "allowed", "1e-8 to 1 (log)")),
            table(
                worst_layers,
                (f"worst of {len(verification.layers)} layers", "relative error", "allowed"),
            ),
            table(images, ("images at the end", "", "budget")),
            verdict,
        ]
    )


def _bar(deviation: Deviation) -> str:
    """Draw the error as a bar on a logarithmic axis from 1e-8 to 1, one mark for each factor of 10^(1/4)."""
    if not math.isfinite(deviation.error):
        return "not finite"
    marks = 0 if deviation.error <= 1e-8 else round(4 * (math.log10(deviation.error) + 8))
    return "#" * min(marks, 32)
