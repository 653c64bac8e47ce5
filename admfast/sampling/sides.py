"""Sides of images (height, width, ...) as requested, as networks accept them, and as upsamplers make them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from admfast.errors import invalid
from admfast.models import ClassifierConfig, UpsamplerConfig
from admfast.sampling.request import SampleRequest

if TYPE_CHECKING:
    from admfast.sampling.pipeline import Pipeline

Sides = tuple[int, ...]


def requested_sides(request: SampleRequest, pipeline: Pipeline) -> Sides:
    """Return the sides of the images that the pipeline's own network makes for a request.

    Raises: InvalidArgument for sides that the network doesn't accept; the error names the nearest accepted.
    """
    name, value, sides = _sides_argument(request, pipeline)
    config = pipeline.config
    if len(sides) != config.dims:
        raise invalid(name, value, f"{config.dims} sides, one per dimension of an image")
    _check_divisible(name, value, sides, config.side_divisors())
    return sides


def _sides_argument(request: SampleRequest, pipeline: Pipeline) -> tuple[str, object, Sides]:
    """Return the name of the argument that sets the sides, its value, and the sides."""
    config, size, low_res = pipeline.config, request.size, request.low_res
    if size is not None:
        assert not isinstance(size, str)  # SampleRequest has turned text into numbers
        return "size", size, (size,) * config.dims if isinstance(size, int) else tuple(size)
    for name in ("noise", "x_start"):
        if (images := getattr(request, name)) is not None:
            shape = tuple(images.shape)
            return f"{name}.shape", shape, shape[2:]
    if low_res is not None and low_res.dim() == config.dims + 2 and isinstance(config, UpsamplerConfig):
        return "low_res.shape", tuple(low_res.shape), _upsampled_sides(pipeline, tuple(low_res.shape))
    return "image_size", config.image_size, pipeline.spatial


def _upsampled_sides(up: Pipeline, shape: Sides) -> Sides:
    """Return the sides of an upsampler's output: each side of shape[2:] times image_size / low_res_size."""
    low_res_size, image_size, sides = up.low_res_size, up.config.image_size, shape[2:]
    if low_res_size is None:
        if len(set(sides)) > 1:
            allowed = "square images, as this upsampler's factor is unknown; give its low_res_size"
            hint = "an option of load, or --set on the command line"
            raise invalid("low_res.shape", shape, f"{allowed} ({hint}), or size")
        return up.spatial
    units = [_smallest_low_res_side(unit, low_res_size, image_size) for unit in up.config.side_divisors()]
    _check_divisible("low_res.shape", shape, sides, units)
    return tuple(side * image_size // low_res_size for side in sides)


def upsampler_sides(up: Pipeline, base: Pipeline, sides: Sides) -> tuple[int, Sides]:
    """Return the factor by which base images are downsampled for an upsampler, and its output's sides.

    An upsampler without a `low_res_size` is assumed to enlarge the size that the base network was trained on.
    """
    low_res_size = up.low_res_size or base.config.image_size
    factor = max(min(sides) // low_res_size, 1)
    units = [
        factor * _smallest_low_res_side(unit, low_res_size, up.config.image_size)
        for unit in up.config.side_divisors()
    ]
    # Average pooling would drop the last columns of a side that the factor doesn't divide.
    if min(sides) < low_res_size or any(side % unit for side, unit in zip(sides, units, strict=True)):
        divisor_text = "" if max(units) == 1 else f" that {_format_sides(units)} divides"
        raise invalid(
            "low_res", sides, f"sides of {low_res_size} pixels or more{divisor_text}, for the upsampler"
        )
    return factor, tuple(side // factor * up.config.image_size // low_res_size for side in sides)


def check_classifier_sides(request: SampleRequest, pipeline: Pipeline) -> None:
    """Reject image sizes at which the pipeline's classifier can't be evaluated."""
    assert pipeline.classifier is not None
    config: ClassifierConfig = pipeline.classifier.config  # type: ignore[assignment]
    name, value, sides = _sides_argument(request, pipeline)
    trained_sides = (config.image_size,) * config.dims
    if config.pool == "attention" and sides != trained_sides:
        needed = "x".join(map(str, trained_sides))
        allowed = f"{needed}, which the classifier's attention pool needs; guidance=0 doesn't use it"
        raise invalid(name, value, allowed)
    if min(sides[config.dims == 3 :]) < config.pool_downsampling():
        raise invalid(
            name, value, f"sides of {config.pool_downsampling()} or more, for the classifier's downsampling"
        )


def _smallest_low_res_side(unit: int, low_res_size: int, image_size: int) -> int:
    """Return the smallest side s for which s * image_size / low_res_size is a multiple of `unit`."""
    return low_res_size * unit // math.gcd(image_size, low_res_size * unit)


def _check_divisible(name: str, value: object, sides: Sides, units: Sequence[int]) -> None:
    """Reject sides that aren't multiples of these units."""
    pairs = list(zip(sides, units, strict=True))
    if any(side % unit for side, unit in pairs):
        nearest = "x".join(str(max(1, round(side / unit)) * unit) for side, unit in pairs)
        raise invalid(name, value, f"sides that {_format_sides(units)} divides; nearest: {nearest}")


def _format_sides(sides: Sequence[int]) -> str:
    """Return sides as "64x96", or as one number if all are equal."""
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))
