"""The guidance options of `admfast sample` and `verify`, and the settings of a request that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from admfast import checks
from admfast.errors import invalid
from admfast.sampling.guides import (
    LARGEST,
    NetworkGuide,
    Scale,
    by_classifier,
    by_null_class,
    by_weak_network,
)

Guidance = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE[,SCALE...]",
        help="Scale of the classifier's gradient, 0 for none; several are spread over the steps, as 1,4 from "
        "the first to the last (default: the system's, or 0 with other guidance).",
    ),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        help="Guide only at these timesteps of the process, LOWEST,HIGHEST such as 200,800 (default: all)."
    ),
]
GuidanceEvery = Annotated[
    int | None, typer.Option(help="Compute the gradient at every so many steps (default: at all).")
]
GuidanceCount = Annotated[
    int | None,
    typer.Option(help="Compute the gradient at so many steps, more of them early (default: at all)."),
]
GuidanceReuse = Annotated[
    bool,
    typer.Option(
        "--guidance-reuse", help="Use the last gradient at the steps between (default: no guidance there)."
    ),
]
CfgScale = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE[,SCALE...]",
        help="Scale of classifier-free guidance, 1 for none, for a model with a null class (default: none).",
    ),
]
CfgInterval = Annotated[
    str | None, typer.Option(help="As --guidance-interval, for --cfg-scale (default: all).")
]
WeakFile = Annotated[
    Path | None,
    typer.Option(
        "--weak", help="A smaller or less trained model's file, for --autoguidance-scale (default: none)."
    ),
]
AutoguidanceScale = Annotated[
    str | None,
    typer.Option(metavar="SCALE[,SCALE...]", help="Scale of guidance by --weak, 1 for none (default: none)."),
]
AutoguidanceInterval = Annotated[
    str | None, typer.Option(help="As --guidance-interval, for --autoguidance-scale (default: all).")
]


def check_weak(weak: Path | None, autoguidance_scale: str | None) -> None:
    """Reject a weak network that would guide nothing."""
    if weak is not None and autoguidance_scale is None:
        raise invalid("weak", str(weak), "only together with --autoguidance-scale")


def guidance_settings(
    default: float,
    guidance: str | None = None,
    guidance_interval: str | None = None,
    guidance_every: int | None = None,
    guidance_count: int | None = None,
    guidance_reuse: bool = False,
    cfg_scale: str | None = None,
    cfg_interval: str | None = None,
    autoguidance_scale: str | None = None,
    autoguidance_interval: str | None = None,
) -> dict[str, Any]:
    """Return the settings of a request for these options. default: the pipeline's classifier scale.

    Raises: InvalidArgument, which names the option.
    """
    guides: list[NetworkGuide] = []
    others = (
        ("cfg-scale", cfg_scale, "cfg-interval", cfg_interval, by_null_class),
        (
            "autoguidance-scale",
            autoguidance_scale,
            "autoguidance-interval",
            autoguidance_interval,
            by_weak_network,
        ),
    )
    for scale_name, scale, interval_name, interval, make_guide in others:
        if scale is not None:
            guides.append(make_guide(parse_scale(scale_name, scale), parse_interval(interval_name, interval)))
        elif interval is not None:
            raise invalid(interval_name, interval, f"only together with --{scale_name}")
    classifier_scale = None if guidance is None else parse_scale("guidance", guidance)
    between = parse_interval("guidance-interval", guidance_interval)
    if guidance_every is None and guidance_count is None and not guidance_reuse:
        return {"guidance": classifier_scale, "guidance_interval": between, "guides": guides}
    gradient_scale = default if classifier_scale is None else classifier_scale
    partial = {"guidance-every": guidance_every, "guidance-count": guidance_count}
    for name, value in partial.items():
        if value is not None:
            checks.whole_number(name, value, 1)
    given = {**partial, "guidance-reuse": guidance_reuse or None}
    name, value = next((name, value) for name, value in given.items() if value is not None)
    if not gradient_scale:
        raise invalid(name, value, "only together with a classifier and a scale that isn't 0")
    if guidance_every is None and guidance_count is None:
        raise invalid("guidance-reuse", True, "only together with --guidance-every or --guidance-count")
    by_gradient = by_classifier(
        gradient_scale,
        between,
        every=1 if guidance_every is None else guidance_every,
        count=guidance_count,
        reuse=guidance_reuse,
    )
    return {"guides": [*guides, by_gradient]}


def parse_scale(name: str, text: str) -> Scale:
    """Read "2" or "1,4"; raises InvalidArgument."""
    scales = _parse_numbers(name, text, "a number, or several separated by commas, such as 1,4")
    return checks.finite_floats(name, scales if len(scales) > 1 else scales[0], least=-LARGEST, most=LARGEST)


def parse_interval(name: str, text: str | None) -> tuple[float, float] | None:
    """Read "200,800"; raises InvalidArgument."""
    if text is None:
        return None
    return checks.interval(name, _parse_numbers(name, text, "two timesteps, LOWEST,HIGHEST such as 200,800"))


def _parse_numbers(name: str, text: str, allowed: str) -> list[float]:
    """Read numbers separated by commas; raises InvalidArgument."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise invalid(name, text, allowed) from None
