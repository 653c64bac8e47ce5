"""One batch of images: what is wanted of it, and its way through the rows of a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from admfast.diffusion import GaussianDiffusion
from admfast.engine.diagnose import first_nonfinite
from admfast.engine.guidance import GuidanceFn, classifier_guidance
from admfast.engine.loop import Callback, Diverged, Model, apply_denoised_fn, run_table
from admfast.errors import NonFiniteError
from admfast.ops.noise import Stream, normal
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
    gradient. guidance_fn, denoised_fn: the user's own. streams: noise of x_T and of the steps.
    """

    process: GaussianDiffusion
    table: SolverTable
    skipped: int = 0
    noised: bool = True
    scale: float = 0.0
    guidance_fn: GuidanceFn | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    streams: tuple[Stream, Stream] = (Stream.X_T, Stream.STEPS)
    impl: str | None = None


def sample_batch(
    net: nn.Module,
    classifier: nn.Module | None,
    plan: Plan,
    request: Request,
    callback: Callback | None = None,
    every: int = 1,
) -> Tensor:
    """Run a batch through the rows of the plan: float32 images [N, C, *spatial].

    Raises:
        NonFiniteError: naming the first layer that produced NaN or infinity.
    """
    x = _first_x(plan, request)
    guidance = None if plan.guidance_fn is None else _on_a_copy(plan.guidance_fn)
    if plan.scale:
        assert classifier is not None and request.labels is not None
        guidance = classifier_guidance(classifier, request.labels, plan.scale)
    model = conditioned(net, request.labels, request.low_res)
    options: dict[str, Any] = dict(
        guidance=guidance,
        denoised_fn=plan.denoised_fn,
        seeds=request.seeds,
        step_noise=None if request.step_noise is None else request.step_noise[plan.skipped :],
        noise_row=plan.skipped,
        stream=plan.streams[1],
        impl=plan.impl,
    )
    try:
        return run_table(plan.table, model, x, callback=callback, every=every, **options).x
    except Diverged as error:
        found, before = error, error.x
        if before is None:
            found, before = _again(plan.table, model, x, options)
        networks = {"net": net, "classifier": classifier}
        calls = {"its output": model, "the guidance": guidance}
        if plan.denoised_fn is not None:
            fn, row = plan.denoised_fn, found.row
            calls["what denoised_fn returned"] = lambda x, t: apply_denoised_fn(fn, row, x, model(x, t))
        where = first_nonfinite(networks, calls, before, found.t)
        raise NonFiniteError(f"{found}; {where}") from None


def _first_x(plan: Plan, request: Request) -> Tensor:
    """What the first row begins from: noise, or x_start noised to that row's step."""
    if request.x_start is not None and not plan.noised:
        return request.x_start.clone()
    z = request.noise
    if z is None:
        z = normal(request.seeds, request.shape[1:], 0, plan.streams[0], plan.impl)
    if request.x_start is None:
        return z * plan.table.scale
    step = torch.full((len(z),), plan.table.rows[0].index, dtype=torch.int64, device=z.device)
    return plan.process.q_sample(request.x_start, step, z)


def _on_a_copy(function: GuidanceFn) -> GuidanceFn:
    """A user's function on its own copy of x and t: it may work in place."""
    return lambda x, t: function(x.clone(), t.clone())


def _again(table: SolverTable, model: Model, x: Tensor, options: dict[str, Any]) -> tuple[Diverged, Tensor]:
    """Run a batch that diverged once more, looking at every row: the same seeds lead to the same row.

    Returns the error and what went into its row.
    """
    try:
        run_table(table, model, x, careful=True, **options)
    except Diverged as error:
        assert error.x is not None
        return error, error.x
    raise NonFiniteError("x was not finite at the end, but is when the batch is run again: check the device")


def conditioned(
    net: nn.Module, labels: Tensor | None, low_res: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return model(x, t) of a network with its conditions; labels go to class-conditional networks only."""
    extra: dict[str, Tensor] = {}
    if labels is not None and net.config.num_classes is not None:  # type: ignore[union-attr]
        extra["y"] = labels
    if low_res is not None:
        extra["low_res"] = low_res
    return lambda x, t: net(x, t, **extra)
