"""What a user holds: `admfast.load(...)` gives a `Pipeline`, which samples and predicts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast import checks
from admfast.diffusion import DiffusionConfig, GaussianDiffusion, Respacing
from admfast.engine.arguments import LARGEST_SEED, check_low_res
from admfast.engine.asking import (
    Asked,
    Output,
    check_asked,
    check_inverse,
    guidance_scale,
    guided_rows,
    make_plan,
)
from admfast.engine.engine import Engine, out_of_memory
from admfast.engine.guidance import GuidanceFn
from admfast.engine.images import from_uint8, to_uint8
from admfast.engine.loop import Callback, numbered
from admfast.engine.numerics import own_numerics
from admfast.engine.options import EngineOptions
from admfast.engine.precision import FP32, Policy
from admfast.engine.predict import Prediction, Predictor
from admfast.engine.request import Plan, Request
from admfast.engine.sampler import conditioned, sample_batch
from admfast.errors import invalid, nearest
from admfast.models import NetConfig, UNetConfig
from admfast.models.fold import check_ordinary
from admfast.ops.noise import Stream, as_seeds

LOG = logging.getLogger("admfast")


@dataclass(frozen=True)
class _Job:
    """What a call of `sample` comes to, checked: rows of base and upsampler, images, batches."""

    asked: Asked
    plan: Plan
    enlarging: Plan | None
    request: Request
    size: int


@dataclass(repr=False)
class Pipeline:
    """Networks with their process, ready to sample; made by `admfast.load`.

    Several threads may use one, and callbacks too. Another value may be assigned to an attribute.

    Attributes:
        name: of the system or file.
        net: a `UNet` or `Upsampler`, frozen.
        diffusion: the process it was trained for.
        classifier: a `Classifier` for guidance, frozen, or None.
        guidance, steps: what `sample` uses where nothing is asked for.
        low_res_size: side of the images that an upsampler was trained to enlarge.
        upsampler: a pipeline that enlarges what this one samples, or None.
        policy: what the networks compute in; their parameters stay as they are.
        options: how steps are prepared.
    """

    name: str
    net: nn.Module
    diffusion: DiffusionConfig
    classifier: nn.Module | None = None
    guidance: float = 0.0
    steps: int = 250
    low_res_size: int | None = None
    upsampler: Pipeline | None = None
    policy: Policy = FP32
    options: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        self._engine: Engine
        self._check_parts()
        self._build(self.net, self.classifier)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another network, process, policy or option serves from then on, checked as at the beginning."""
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        serving = ("net", "classifier", "diffusion", "upsampler", "policy", "options")
        if name not in serving or "_engine" not in self.__dict__ or value is before:
            return
        try:
            self._check_parts()
            self._build(value if name in ("net", "classifier") else None)
        except Exception:  # whatever is wrong with the new value, the old one goes on serving
            super().__setattr__(name, before)
            raise

    def _build(self, *given: nn.Module | None) -> None:
        """What samples and predicts, of the parts as they are; networks that were given are frozen."""
        for net in given:
            if net is not None:
                net.requires_grad_(False).eval()
        parts: tuple[Any, Any] = (self.net, self.classifier)
        engine = Engine(*parts, self.policy, self.options)
        engine.ready()
        self._engine, self._predictor = engine, Predictor(self.diffusion)

    def __repr__(self) -> str:
        """One line: the parts, not their layers."""
        config, parts = self.config, [f"{self.config.kind} of {self.config.image_size} pixels"]
        if config.num_classes is not None:
            parts.append(f"{config.num_classes} classes")
        if self.classifier is not None:
            parts.append(f"classifier, guidance {self.guidance:g}")
        if self.upsampler is not None:
            parts.append(f"upsampler to {self.upsampler.config.image_size} pixels")
        return f"Pipeline({self.name!r}: {', '.join(parts)}; {self.precision} on {self.device})"

    @property
    def config(self) -> UNetConfig:
        """The network's configuration."""
        return self.net.config  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    @property
    def precision(self) -> str:
        """In what the networks run: "bfloat16, classifier float32"."""
        return str(self.policy)

    @property
    def num_classes(self) -> int | None:
        """Classes that can be asked for, by condition or by guidance alone; None if there are none."""
        if self.config.num_classes is not None:
            return self.config.num_classes
        return None if self.classifier is None else self.classifier.config.out_channels  # type: ignore[union-attr, return-value]

    def sample(
        self,
        classes: int | Iterable[int] | None = None,
        seeds: int | Iterable[int] | None = None,
        *,
        steps: int | None = None,
        solver: str = "ddpm",
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        eta: float | None = None,
        clip: bool = True,
        respacing: Respacing | None = None,
        upsampler_steps: int | None = None,
        low_res: Tensor | None = None,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        x_start: Tensor | None = None,
        t_start: int | None = None,
        guidance_fn: GuidanceFn | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        callback: Callback | None = None,
        every: int = 1,
        batch_size: int | None = None,
        output: Output = "uint8",
        impl: str | None = None,
    ) -> Tensor:
        """Sample images: image i has seed `seeds[i]` and class `classes[i % len(classes)]`.

        An image depends on its seed, class and these settings alone, not on the batch or the order it is in.

        Args:
            classes: class indices; None takes seed modulo the number of classes. Not for a model without.
            seeds: 0..2^64-1, one an image; None is 0, 1, ... for the classes given (one image without any).
            steps: network evaluations, 1..length of the process; None is the system's own.
            solver: "ddpm", "ddim", or "ddim-inverse", which takes the images `x_start` apart into their noise
                (float output; not for a cascade). DDIM from that noise leads back to them.
            guidance: scale of the classifier's gradient, 0 for none; None is the system's own, for
                ddim-inverse 0: the published inverse has no guidance.
            guidance_interval: (lowest, highest) timestep of the original process at which guidance applies
                (Kynkaanniemi et al. 2024); None is everywhere. Steps outside cost no classifier.
            eta: DDIM's noise, 0..1 (None: 0).
            clip: limit x_0 to [-1, 1] at every step.
            respacing: which timesteps to use instead of `steps`: a published string or a list of steps.
            upsampler_steps: of the upsampler in a cascade; None is the system's own.
            low_res: [N, C, h, w] float in [-1, 1] for a pipeline that is an upsampler itself.
            noise: [N, C, H, W] used as x_T instead of the seeds' noise.
            step_noise: [steps, N, C, H, W] used in the steps instead of the seeds' noise.
            x_start, t_start: begin from this image ([N, C, H, W], -1..1) noised to this timestep (0..length
                of the process - 1), at the nearest step at or below it. For ddim-inverse x_start alone: the
                clean image, which is not noised.
            guidance_fn: guidance_fn(x_t, t) -> gradient of a log-probability at x_t, instead of a classifier.
                It is called on copies and without gradients being recorded: use `torch.enable_grad()` inside.
            denoised_fn: maps x_0 at every step, before it is limited.
            callback, every: called with a `Progress` after every `every`-th step and the last, in a cascade
                for the base model's steps and then for the upsampler's.
            batch_size: images at a time; None chooses by image size and device.
            output: "uint8" or "float".
            impl: implementation of the update, by name.

        Returns:
            uint8 [N, H, W, C] on the CPU, or float32 [N, C, H, W] on the device: in [-1, 1] but for what
            guidance or `clip=False` takes beyond, as uint8 limits it and float doesn't.

        Raises:
            InvalidArgument: for any value that is not allowed.
            NonFiniteError: naming the first layer that produced NaN or infinity.

        Not differentiable; see `predict`. Inference mode and autocast around the call change nothing.
        """
        asked = Asked(
            classes, seeds, steps, solver, guidance, guidance_interval, eta, clip, respacing,
            upsampler_steps, low_res, noise, step_noise, x_start, t_start, guidance_fn, denoised_fn,
            callback, every, batch_size, output, impl,
        )  # fmt: skip
        with own_numerics(self.device, self.policy.tf32):
            return self._run(self._job(asked))

    def check(self, *images: Any, **settings: Any) -> dict[str, int]:
        """Check arguments of `sample` without sampling: the number of steps, by stage ("base", "upsampler").

        Raises: InvalidArgument as `sample` would, Unavailable for an implementation that this machine lacks.
        """
        known = [entry.name for entry in fields(Asked)]
        for name, value in settings.items():
            if name not in known:
                raise invalid(name, value, f"sample has no such argument; {nearest(name, known)}")
        with own_numerics(self.device, self.policy.tf32):
            job = self._job(Asked(*images, **settings))
        steps = {"base": len(job.plan.table)}
        return steps if job.enlarging is None else {**steps, "upsampler": len(job.enlarging.table)}

    def predict(
        self,
        x_t: Tensor,
        t: Tensor | float,
        classes: Tensor | Sequence[int] | None = None,
        low_res: Tensor | None = None,
    ) -> Prediction:
        """Return what the network says of a noisy image: `Prediction(eps, x0, log_var)`, not limited.

        The differentiable door: gradients flow from the three fields to x_t (and low_res), any number of
        times in reverse mode; in forward mode with ADMFAST_IMPL=reference alone, under vmap once.
        Autocast around the call changes nothing; the backward pass runs under the caller's own TF32 settings.

        Args:
            x_t: [N, C, H, W], float32.
            t: timestep of the original process, 0..length-1: a number, or [N]; fractions interpolate the
                log-SNR linearly.
            classes: [N] class indices of a class-conditional network.
            low_res: [N, C, h, w] for an upsampler.

        Returns:
            eps, x0, log_var like x_t; log_var is that of p(x_{t-1} | x_t) of the process with all its steps.

        Raises:
            InvalidArgument: for any value that is not allowed (what lies on a GPU is checked by shape alone).
        """
        with own_numerics(self.device, self.policy.tf32):
            return self._predict(x_t, t, classes, low_res)

    def _predict(
        self, x_t: Tensor, t: Tensor | float, classes: Tensor | Sequence[int] | None, low_res: Tensor | None
    ) -> Prediction:
        """`predict`, in the pipeline's own precision."""
        self._engine.ready()
        x_t = checks.images("x_t", x_t)
        check_low_res(self.config, low_res, len(x_t))
        labels, known = None, self.config.num_classes
        if known is None and classes is not None:
            raise invalid("classes", "given", f"{self.name} is not class-conditional")
        if known is not None:
            if classes is None:
                raise invalid("classes", None, f"this network needs one of 0 to {known - 1} for each image")
            if not isinstance(classes, Tensor) or classes.device.type == "cpu":
                classes = torch.tensor(checks.whole_numbers("classes", classes, 0, known - 1))
            labels = classes.to(x_t.device)
            if labels.shape != x_t.shape[:1]:
                raise invalid("classes", tuple(labels.shape), f"one class for each of the {len(x_t)} images")
        return self._predictor(conditioned(self.net, labels, low_res), x_t, t)

    def process(self, respacing: Respacing | None = None) -> GaussianDiffusion:
        """The diffusion process, with all its steps or respaced."""
        return self.diffusion.build(respacing)

    @property
    def images_at_a_time(self) -> int:
        """How many images `sample` makes at a time where nothing is asked for."""
        return self._images_at_a_time((1, self.config.in_channels, *self._spatial()))

    def _spatial(self) -> tuple[int, ...]:
        """The sides of the images that the network was trained for."""
        return (self.config.image_size,) * self.config.dims

    def _images_at_a_time(self, shape: tuple[int, ...]) -> int:
        """Images that fit beside the released models (an 80 GB GPU; 16 GB of memory on a CPU)."""
        largest = math.prod(shape[2:])
        if self.upsampler is not None:
            largest = max(largest, math.prod(self.upsampler._spatial()))
        return max(1, (2**21 if self.device.type == "cuda" else 2**16) // largest)

    def _check_parts(self) -> None:
        """Networks that are put together must have the same images and classes."""
        config, up = self.config, self.upsampler
        check_ordinary("net", self.net)
        if self.classifier is not None:
            check_ordinary("classifier", self.classifier)
        if self.diffusion.types[1].learned != config.learn_sigma:
            allowed = f"a process with{'' if config.learn_sigma else 'out'} learned variance, as the network"
            raise invalid("diffusion", self.diffusion.types[1].name, allowed)
        others = {"classifier": self.classifier, "upsampler": None if up is None else up.net}
        for name, net in others.items():
            if net is None:
                continue
            other: NetConfig = net.config  # type: ignore[assignment]
            if (other.in_channels, other.dims) != (config.in_channels, config.dims):
                given = f"{other.in_channels} channels, {other.dims}-D"
                raise invalid(name, given, f"as the network: {config.in_channels} channels, {config.dims}-D")
            # A classifier also serves a network without classes; an upsampler with classes must get them.
            count = other.num_classes if isinstance(other, UNetConfig) else other.out_channels
            if count is not None and self.num_classes != count:
                raise invalid(name, f"{count} classes", f"as the network: {self.num_classes or 'no'} classes")

    def _job(self, asked: Asked) -> _Job:
        """Everything that is asked for, checked before anything is sampled."""
        check_asked(asked)
        plan = make_plan(self.diffusion, self.steps, asked)
        check_inverse(asked)
        plan = replace(plan, scale=guidance_scale(self.name, self.guidance, self.classifier, asked))
        plan = replace(plan, guided=guided_rows(plan, asked))
        request = self._request(asked, plan)
        if asked.batch_size is None:
            size = self._images_at_a_time(request.shape)
        else:
            size = checks.whole("batch_size", asked.batch_size, 1)
        up, enlarging = self.upsampler, None
        if up is not None:
            if asked.solver == "ddim-inverse":
                raise invalid(
                    "solver", asked.solver, f"not for {self.name}: an upsampler follows; load it without"
                )
            up._enlarged(request.shape[2:])
            alike = Asked(steps=asked.upsampler_steps, solver=asked.solver, eta=asked.eta, clip=asked.clip)
            enlarging = make_plan(up.diffusion, up.steps, alike, "upsampler_steps")
            streams = (Stream.UPSAMPLER_X_T, Stream.UPSAMPLER_STEPS)
            enlarging = replace(enlarging, streams=streams, impl=asked.impl)
        elif asked.upsampler_steps is not None:
            raise invalid("upsampler_steps", asked.upsampler_steps, f"{self.name} has no upsampler")
        return _Job(asked, plan, enlarging, request, size)

    def _run(self, job: _Job) -> Tensor:
        """Sample the images of a job, batch by batch; batches that don't fit into memory are halved."""
        images, first, size = [], 0, job.size
        while first < job.request.shape[0]:
            part = job.request.part(first, size)
            try:
                images.append(self._batch(job, part, first))
            except RuntimeError as error:
                if not out_of_memory(error) or part.shape[0] == 1:
                    raise
                size = -(-part.shape[0] // 2)
                LOG.warning("out of memory with %d images at a time: going on with %d", part.shape[0], size)
            else:
                first += size
                continue
            # Here, as the exception holds on to the memory of what raised it.
            for pipe in (self, self.upsampler):
                if pipe is not None:
                    pipe._engine.release()
        return torch.cat(images)

    def _batch(self, job: _Job, part: Request, first: int) -> Tensor:
        """One batch through the base model and what enlarges its images."""
        asked = job.asked
        watch = numbered(asked.callback, first, "base")
        x = sample_batch(self._engine, job.plan, part, watch, asked.every)
        if self.upsampler is not None and job.enlarging is not None:
            part = self.upsampler._enlarging(x, part)
            watch = numbered(asked.callback, first, "upsampler")
            x = sample_batch(self.upsampler._engine, job.enlarging, part, watch, asked.every)
        return to_uint8(x).cpu() if asked.output == "uint8" else x

    def _request(self, asked: Asked, plan: Plan) -> Request:
        """Which images are wanted, checked, on the network's device."""
        config, classes, seeds = self.config, asked.classes, asked.seeds
        noise, x_start, step_noise, low_res = asked.noise, asked.x_start, asked.step_noise, asked.low_res
        given = {"noise": noise, "x_start": x_start, "low_res": low_res}
        like = [checks.images(name, value) for name, value in given.items() if value is not None]
        known = self.num_classes
        if known is None and classes is not None:
            raise invalid("classes", "given", f"{self.name} has no classes")
        wanted = None
        if classes is not None and known is not None:
            wanted = checks.whole_numbers("classes", classes, 0, known - 1)
        if wanted == []:
            raise invalid("classes", [], "at least one class")
        if seeds is None:
            seeds = range(len(like[0]) if like else len(wanted) if wanted else 1)
        keys = checks.whole_numbers("seeds", seeds, 0, LARGEST_SEED)
        if not keys:
            raise invalid("seeds", [], "at least one seed")
        images = noise if noise is not None else x_start
        spatial = tuple(images.shape[2:]) if images is not None else self._spatial()
        shape = (len(keys), config.in_channels, *spatial)
        rows = len(plan.table) + plan.skipped
        wanted_shapes = {"noise": shape, "x_start": shape, "step_noise": (rows, *shape)}
        for name, value in (("noise", noise), ("x_start", x_start), ("step_noise", step_noise)):
            if value is not None:
                checks.images(name, value, wanted_shapes[name])
        check_low_res(config, low_res, len(keys))
        labels = None
        if known is not None:
            wanted = [key % known for key in keys] if wanted is None else wanted
            labels = torch.tensor([wanted[i % len(wanted)] for i in range(len(keys))])
        return Request(shape, as_seeds(keys), labels, noise, x_start, step_noise, low_res).to(self.device)

    def _enlarged(self, sides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """By which factor base images of these sides are brought down first, and the sides that come out."""
        trained = self.low_res_size
        if trained is None:
            return 1, self._spatial()
        factor = max(min(sides) // trained, 1)
        # A side that the factor doesn't divide would lose its last columns.
        if any(side % trained or side % factor for side in sides):
            allowed = f"sides that are multiples of {trained} pixels, and of {factor}"
            raise invalid("low_res", tuple(sides), allowed if factor > 1 else allowed.partition(",")[0])
        return factor, tuple(side // factor * self.config.image_size // trained for side in sides)

    def _enlarging(self, x: Tensor, base: Request) -> Request:
        """What an upsampler is asked for: the base images pass through uint8, as the published scripts do.

        Where they are larger than what it was trained to enlarge, it gets the means of their blocks.
        """
        low_res = from_uint8(to_uint8(x)).to(self.device)
        factor, spatial = self._enlarged(tuple(low_res.shape[2:]))
        low_res = low_res if factor == 1 else F.avg_pool2d(low_res, factor)
        shape = (len(x), self.config.in_channels, *spatial)
        return Request(shape, base.seeds, base.labels, low_res=low_res).to(self.device)
