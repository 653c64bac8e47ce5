"""What is wanted of a batch of images, and by which rows it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from admfast.diffusion import GaussianDiffusion
from admfast.engine.guidance import GuidanceFn
from admfast.ops.noise import Stream
from admfast.solvers import SolverTable


@dataclass(frozen=True)
class Request:
    """The images of a batch, all tensors on the network's device.

    shape: (N, C, *spatial). seeds: [N] int64. labels: [N] int64 or None. noise: like the images, or None for
    the seeds' own. x_start: images to begin from, or None. step_noise: [rows, N, C, *spatial] or None.
    low_res: condition of an upsampler, or None.
    """

    shape: tuple[int, ...]
    seeds: Tensor
    labels: Tensor | None = None
    noise: Tensor | None = None
    x_start: Tensor | None = None
    step_noise: Tensor | None = None
    low_res: Tensor | None = None

    def to(self, device: torch.device) -> Request:
        """The request on `device`, images in float32."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, torch.float32)

        return Request(
            self.shape,
            self.seeds.to(device),
            None if self.labels is None else self.labels.to(device),
            *map(move, (self.noise, self.x_start, self.step_noise, self.low_res)),
        )

    def part(self, first: int, size: int) -> Request:
        """Images first..first+size-1 of this request."""
        last = min(first + size, self.shape[0])

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[first:last]

        return replace(
            self,
            shape=(last - first, *self.shape[1:]),
            seeds=self.seeds[first:last],
            labels=cut(self.labels),
            noise=cut(self.noise),
            x_start=cut(self.x_start),
            step_noise=None if self.step_noise is None else self.step_noise[:, first:last],
            low_res=cut(self.low_res),
        )


@dataclass(frozen=True)
class Plan:
    """How a batch is sampled.

    process: the respaced process. table: the rows that run. skipped: rows of the whole table before them
    (they count in the noise, so that an image begun midway gets the noise of those steps). noised: x_start is
    noised to the first row's step; the inverse of DDIM begins from it as it is. scale: of the classifier's
    gradient. guided: for every row whether it is guided, None for all. guidance_fn, denoised_fn: the user's
    own. streams: noise of x_T and of the steps.
    """

    process: GaussianDiffusion
    table: SolverTable
    skipped: int = 0
    noised: bool = True
    scale: float = 0.0
    guided: Sequence[bool] | None = None
    guidance_fn: GuidanceFn | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    streams: tuple[Stream, Stream] = (Stream.X_T, Stream.STEPS)
    impl: str | None = None

    def guided_rows(self) -> Sequence[bool]:
        """For every row whether it is guided."""
        if not self.scale and self.guidance_fn is None:
            return [False] * len(self.table)
        return [True] * len(self.table) if self.guided is None else self.guided
