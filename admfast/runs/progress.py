"""The progress bar of a run, which advances with every step of a batch."""

from __future__ import annotations

import math
import time

import torch
from tqdm import tqdm

from admfast.sampling.loop import Progress
from admfast.sampling.plan import Plan

WAIT_SECONDS = 0.2


def step_shares(plan: Plan) -> dict[str, float]:
    """Return the share of an image's total work, counted in pixels, of one step of each stage."""
    pixels = {stage: math.prod(sides) for stage, sides in plan.sides.items()}
    total = sum(count * pixels[stage] for stage, count in plan.steps.items())
    return {stage: count / total for stage, count in pixels.items()}


class ProgressBar:
    """A bar of images that is hidden until the first step, so that an error before it is one line.

    total, initial: number of images, and how many of them are finished. shown: False shows nothing.
    """

    def __init__(self, total: int, initial: int = 0, shown: bool = True) -> None:
        self.bar = tqdm(
            total=total, initial=initial, unit="image", delay=math.inf, disable=not shown,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip
        self._initial, self._last_wait = initial, 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, progress: Progress, shares: dict[str, float]) -> None:
        """Count one step of a batch.

        On a GPU this waits for the step, every `WAIT_SECONDS`. Otherwise the host would be all steps of a
        batch ahead, and a signal could end the process only when the GPU has run them.
        """
        if progress.x.is_cuda and time.monotonic() - self._last_wait > WAIT_SECONDS:
            torch.cuda.synchronize(progress.x.device)
            self._last_wait = time.monotonic()
        bar = self.bar
        if bar.disable:
            return
        bar.delay = 0
        # Rounding may take the sum of the shares a little past the total.
        bar.update(min(len(progress.x) * shares[progress.stage], bar.total - bar.n))
        seconds = bar.format_dict["elapsed"]
        rate = (bar.n - self._initial) / seconds if seconds else 0
        bar.set_postfix_str(f"{rate:.2f} images/s" if rate > 0 else "", refresh=False)

    def move_to(self, images: int) -> None:
        """Count all images that are finished, also those of other processes."""
        if not self.bar.disable:
            self.bar.n = min(images, self.bar.total)
            if not self.bar.delay:
                self.bar.refresh()
