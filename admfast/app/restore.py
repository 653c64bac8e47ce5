"""Fill in a hidden box of an image by diffusion posterior sampling (Chung et al. 2023), as a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from admfast.checks import finite_float, whole_numbers
from admfast.errors import invalid
from admfast.files.levels import from_uint8, to_uint8
from admfast.sampling import guides
from admfast.sampling.pipeline import Pipeline
from admfast.solvers import ddim

Box = tuple[int, int, int, int]  # (top, left, bottom, right) in pixels, without the last row and column
LARGEST_STRENGTH = 5.0


def restore(
    pipe: Pipeline,
    image: NDArray[np.uint8],
    box: Sequence[int],
    seeds: Sequence[int],
    classes: Sequence[int] | None = None,
    steps: int = 100,
    strength: float = 0.5,
    **settings: Any,
) -> Tensor:
    """Return one filling of the box for each seed; outside the box, the pixels are those of the image.

    Args:
        image: uint8 [H, W, C]. Its pixels in the box are not read.
        box: (top, left, bottom, right) in pixels; row `bottom` and column `right` are not hidden.
        strength: the step size of the paper; a larger one keeps more closely to what is visible.
        settings: other arguments of `pipe.sample`, such as a callback.

    Returns: uint8 [N, H, W, C] on the CPU.
    Raises: InvalidArgument.
    """
    strength = finite_float("strength", strength, least=0, most=LARGEST_STRENGTH)
    visible, pixels = visible_pixels(image.shape[:2], box), torch.tensor(image)
    known, mask = from_uint8(pixels[None]).to(pipe.device), visible.to(pipe.device)
    process = pipe.process(str(steps))
    guide = guides.by_measurement(process, lambda x: mask * x, mask * known, strength)
    sampled = pipe.sample(
        classes,
        seeds,
        respacing=str(steps),
        solver=ddim(eta=1.0),
        guides=[guide],
        output="float",
        **settings,
    )
    return torch.where(visible[:, :, None], pixels, to_uint8(sampled).cpu())


def visible_pixels(sides: tuple[int, ...], box: Sequence[int]) -> Tensor:
    """Return a mask, bool [H, W]: False in the box. Raises InvalidArgument for a box without pixels."""
    top, left, bottom, right = corners = whole_numbers("box", box, 0) if len(box) == 4 else [0] * 4
    if not (top < bottom <= sides[0] and left < right <= sides[1]):
        raise invalid("box", tuple(box), f"(top, left, bottom, right) within {sides[0]}x{sides[1]} pixels")
    if corners == [0, 0, *sides]:
        raise invalid("box", tuple(box), "a part of the image: some pixels must be visible")
    mask = torch.ones(sides, dtype=torch.bool)
    mask[top:bottom, left:right] = False
    return mask
