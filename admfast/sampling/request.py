"""The request for images: all arguments of `Pipeline.sample`, in one record."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from admfast import checks
from admfast.checkpoints import flags_to_options
from admfast.diffusion import SPACINGS, Respacing, check_respacing
from admfast.engine.guidance import GuidanceFn
from admfast.errors import allowed_names, first_line, invalid
from admfast.sampling.guides import LARGEST, Guide, Interval, NetworkGuide, Scale
from admfast.sampling.loop import Callback
from admfast.solvers import Solver, make_solver, parse_solver

LARGEST_SEED = 2**64 - 1
AUTO = "auto"
QUALITIES = ("draft", "good", "best")


@dataclass(frozen=True)
class SampleRequest:
    """Arguments of `Pipeline.sample`, after every check that needs no model.

    Image i has seed `seeds[i]` and class `classes[i % len(classes)]`. It depends only on its seed, its class
    and these settings, not on its batch or its place in it.

    Attributes:
        classes: class indices; None takes seed modulo the number of classes, without a null class. Not for a
            model without classes.
        seeds: 0..2^64-1, one per image. None takes 0, 1, ..., one for each image in `noise`, `x_start` or
            `low_res`, else one for each class given, else a single one.
        steps: network evaluations, 1..length of the process; None takes the system's default.
        quality: "draft" is 10 steps, "good" 25, "best" the system's default; not together with `steps` or
            `respacing`. With it the solver is "auto", if none is given.
        solver: a value (`ddim(eta=0.5)`) or its text ("ddim:eta=0.5"); see `admfast.solvers`. "auto" takes
            solver, spacing and, if not given, guidance for the number of steps from the table of
            `admfast.sampling.auto`, which names the sources. None is "ddpm", or "auto" with `quality`.
            "ddim-inverse" begins from images: it maps `x_start` to noise from which DDIM leads back to them
            (only with output="float"; not for a cascade).
        guidance: scale of the classifier's gradient, 0 for none; several numbers are spread over the steps
            (see `NetworkGuide`). None takes the system's default, or 0 if there are other guides or the
            solver begins from images.
        guidance_interval: (lowest, highest) timestep of the original process at which guidance applies
            (Kynkaanniemi et al. 2024); None means all. Outside it the classifier is not evaluated.
        guides: see `admfast.sampling.guides`; they are summed, together with `guidance` if that is given.
        eta: shorthand for the solver's option of that name.
        clip: clip x_0 to [-1, 1] at every step.
        dynamic_threshold: a quantile such as 0.995, to limit x_0 in another way than `clip` (Saharia et al.
            2022): in each image to [-s, s], then divided by s, where s is this quantile of |x_0|, at least 1.
            With it no step is prepared.
        spacing: how the timesteps are spaced: "uniform", "quadratic", "log-snr" or "karras" (see
            `admfast.diffusion.kept_timesteps`). None: the solver's own spacing.
        respacing: timesteps to use, instead of `steps` and `spacing`: a published string, a spacing with a
            count such as "karras18", or a list of timesteps, which needn't be whole.
        upsampler_steps: steps of the upsampler in a cascade; None takes the system's default.
        size: (H, W) or "HxW" of the images that the network makes (in a cascade, the base model), or one
            number for all sides. None takes the size of `noise` or `x_start`, for an upsampler each side of
            `low_res` times image_size / low_res_size, else the model's size. Every side must be a multiple of
            2^(levels - 1).
        low_res: [N, C, h, w] float in [-1, 1], for a pipeline that is itself an upsampler.
        noise: [N, C, H, W] used as x_T instead of the seeds' noise.
        step_noise: [steps, N, C, H, W] used in the steps instead of the seeds' noise.
        x_start, t_start: begin from this image ([N, C, H, W], -1..1), noised to the nearest step at or below
            this timestep (0..length of the process - 1). A solver that begins from images takes only x_start,
            the clean image, and does not noise it.
        guidance_fn: guidance_fn(x_t, t) returns a gradient of a log-probability at x_t, which replaces the
            classifier's. It gets copies, and gradients are not recorded: use `torch.enable_grad()` inside.
        denoised_fn: maps x_0 at every step, before it is clipped.
        callback, every: the callback gets a `Progress` after every `every`-th step and after the last; in a
            cascade, for the base model's steps and then for the upsampler's.
        batch_size: images at a time; None chooses by image size and device.
        output: "uint8" or "float".
        impl: name of the implementation of the update and of the noise.

    Raises: InvalidArgument for a value that no model allows.
    """

    classes: int | Iterable[int] | None = None
    seeds: int | Iterable[int] | None = None
    _: KW_ONLY
    steps: int | None = None
    quality: str | None = None
    solver: Solver | str | None = None
    guidance: Scale | None = None
    guidance_interval: Interval | None = None
    guides: Iterable[Guide | NetworkGuide] = ()
    eta: float | None = None
    clip: bool = True
    dynamic_threshold: float | None = None
    spacing: str | None = None
    respacing: Respacing | None = None
    upsampler_steps: int | None = None
    size: int | Iterable[int] | str | None = None
    low_res: Tensor | None = None
    noise: Tensor | None = None
    step_noise: Tensor | None = None
    x_start: Tensor | None = None
    t_start: int | None = None
    guidance_fn: GuidanceFn | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    callback: Callback | None = None
    every: int = 1
    batch_size: int | None = None
    output: Literal["uint8", "float"] = "uint8"
    impl: str | None = None

    def __post_init__(self) -> None:
        self._check_images()
        self._check_steps()
        self._check_guidance()
        checks.optional_callables(denoised_fn=self.denoised_fn, callback=self.callback)
        self._store_whole_number("every", 1)
        checks.one_of("output", self.output, ("uint8", "float"))
        if not isinstance(self.impl, str | None):
            raise invalid("impl", self.impl, "the name of an implementation, or None")

    def _store(self, name: str, value: object) -> None:
        """Store the normalized value of a setting."""
        object.__setattr__(self, name, value)

    def _store_whole_number(self, name: str, least: int) -> None:
        """Store a whole number as an int."""
        self._store(name, checks.whole_number(name, getattr(self, name), least))

    def _check_images(self) -> None:
        """Check the settings that select images, and the tensors of images."""
        for name, most in (("classes", None), ("seeds", LARGEST_SEED)):
            if getattr(self, name) is not None:
                self._store(name, tuple(checks.whole_numbers(name, getattr(self, name), 0, most)))
                if not getattr(self, name):
                    raise invalid(name, [], "at least one")
        if self.size is not None:
            size = _parse_sides(self.size) if isinstance(self.size, str) else self.size
            self._store("size", checks.whole_number_or_tuple("size", size, 1))
        for name in ("noise", "x_start", "step_noise", "low_res"):
            if getattr(self, name) is not None:
                images = checks.image_tensor(name, getattr(self, name))
                if name == "low_res" or (name == "x_start" and self.clip):
                    checks.image_range(name, images)
        if self.batch_size is not None:
            self._store_whole_number("batch_size", 1)

    def _check_steps(self) -> None:
        """Check the solver, its steps, and the point from which they begin."""
        self._store_solver()
        checks.store_booleans(self, "clip")
        if self.dynamic_threshold is not None:
            quantile = checks.finite_float("dynamic_threshold", self.dynamic_threshold, above=0, most=1)
            self._store("dynamic_threshold", quantile)
        for name in ("steps", "upsampler_steps"):
            if getattr(self, name) is not None:
                self._store_whole_number(name, 1)
        if self.spacing is not None:
            checks.one_of("spacing", self.spacing, SPACINGS)
        if self.respacing is not None:
            for name in ("steps", "spacing"):
                if getattr(self, name) is not None:
                    raise invalid(name, getattr(self, name), "not together with respacing")
            self._store("respacing", check_respacing(self.respacing))
        if self.t_start is not None:
            self._store_whole_number("t_start", 0)
        solver = self.solver
        if not isinstance(solver, Solver) or solver.starts_from == "noise":
            if self.t_start is None and self.x_start is not None:
                raise invalid("t_start", None, "with x_start, the timestep to which it is noised")
            if self.x_start is None and self.t_start is not None:
                raise invalid("x_start", None, "with t_start, the images to begin from")
        elif self.t_start is not None:
            raise invalid("t_start", self.t_start, f"not for {solver}: it begins from the clean image")
        elif (self.x_start is None) == (self.noise is None):
            value = None if self.noise is None else "given together with noise"
            allowed = f"the images that {solver} begins from, [N, C, H, W] in [-1, 1]"
            raise invalid("x_start", value, allowed)
        elif self.output == "uint8":
            raise invalid("output", self.output, f"'float' for {solver}: pixels can't hold noise")

    def _store_solver(self) -> None:
        """Check quality and solver, and store the solver with `eta` among its options."""
        if self.quality is not None:
            checks.one_of("quality", self.quality, QUALITIES)
            for name in ("steps", "respacing"):
                if getattr(self, name) is not None:
                    raise invalid(name, getattr(self, name), "not together with quality")
        solver = self.solver
        if solver is None:
            solver = "ddpm" if self.quality is None else AUTO
        if solver == AUTO:
            if self.eta is not None:
                raise invalid("eta", self.eta, "only together with a solver that has it, such as ddim")
        elif isinstance(solver, str) and self.eta is None:
            solver = parse_solver(solver)
        else:
            solver = make_solver(solver, **({} if self.eta is None else {"eta": self.eta}))
        self._store("solver", solver)
        self._store("eta", None)

    def _check_guidance(self) -> None:
        """Check the guides, and that each network of the pipeline guides at most once."""
        checks.optional_callables(guidance_fn=self.guidance_fn)
        if self.guidance is not None:
            scale = checks.finite_floats("guidance", self.guidance, least=-LARGEST, most=LARGEST)
            self._store("guidance", scale)
        if self.guidance and self.guidance_fn is not None:
            raise invalid("guidance", self.guidance, "not together with guidance_fn")
        if self.guidance_interval is not None:
            self._store("guidance_interval", checks.interval("guidance_interval", self.guidance_interval))
        self._store("guides", tuple(checks.as_list(self.guides)))
        networks = [] if self.guidance is None else ["classifier"]
        for guide in self.guides:
            if not isinstance(guide, Guide | NetworkGuide):
                raise invalid("guides", guide, "a Guide, or several (see admfast.sampling.guides)")
            if isinstance(guide, NetworkGuide):
                if guide.network in networks:
                    raise invalid("guides", guide, f"at most one guide by the {guide.network}")
                networks.append(guide.network)
        if self.guidance_interval is not None and "classifier" in networks and self.guidance is None:
            allowed = "not together with a classifier's guide, which has an interval of its own"
            raise invalid("guidance_interval", self.guidance_interval, allowed)

    def to_json(self) -> str:
        """Return the settings that aren't None, as JSON.

        Raises: InvalidArgument for a value that JSON can't hold: a tensor, a function, a guide by a function,
            or a solver that isn't one of `admfast.solvers.SOLVERS`.
        """
        settings = {name: value for name, value in vars(self).items() if value is not None}
        guides = settings.pop("guides")
        settings["solver"] = str(self.solver)
        if self.solver != AUTO and parse_solver(settings["solver"]) != self.solver:
            raise invalid("solver", settings["solver"], "for JSON, one of `admfast.solvers.SOLVERS`")
        for guide in guides:
            if not isinstance(guide, NetworkGuide):
                raise invalid("guides", guide, "for JSON, guides by networks")
        if guides:
            settings["guides"] = [vars(guide) for guide in guides]
        for name, value in settings.items():
            if isinstance(value, Tensor) or callable(value):
                raise invalid(name, type(value).__name__, "a value that JSON can hold")
        return json.dumps(settings)

    @classmethod
    def from_json(cls, text: str) -> SampleRequest:
        """Return the request that `to_json` wrote. Raises: InvalidArgument for a wrong name or value."""
        try:
            settings = json.loads(text)
        except (ValueError, TypeError) as error:
            raise invalid("text", str(text)[:80], f"a request as JSON ({first_line(error)})") from None
        if not isinstance(settings, dict):
            raise invalid("text", text[:80], "a JSON object of settings")
        if isinstance(settings.get("guides"), list):
            settings["guides"] = [_read_guide(guide) for guide in settings["guides"]]
        return cls.from_arguments(**settings)

    @classmethod
    def from_arguments(cls, /, *images: Any, **settings: Any) -> SampleRequest:
        """Return the request for arguments of `sample`. Raises: InvalidArgument, also for an unknown name."""
        known_names = [entry.name for entry in dataclasses.fields(cls)]
        for name, value in settings.items():
            if name not in known_names:
                flags_to_options.reject_flags_given_elsewhere({name: value})
                raise invalid(name, value, f"sample has no such argument; {allowed_names(name, known_names)}")
        return cls(*images, **settings)


def _read_guide(settings: Any) -> NetworkGuide:
    """Return the guide that `to_json` wrote. Raises InvalidArgument."""
    known_names = {entry.name for entry in dataclasses.fields(NetworkGuide)}
    if not isinstance(settings, dict) or not {"network", "guidance_scale"} <= settings.keys() <= known_names:
        raise invalid("guides", settings, f"JSON objects of {', '.join(sorted(known_names))}")
    return NetworkGuide(**settings)


def _parse_sides(text: str) -> int | tuple[int, ...]:
    """Read "64x96" or "64"; raises InvalidArgument."""
    sides = [part.strip() for part in text.lower().split("x")]
    if not all(re.fullmatch(r"[0-9]{1,9}", side) for side in sides):
        raise invalid("size", text, "HEIGHTxWIDTH in pixels such as 64x96, or one number for all sides")
    return int(sides[0]) if len(sides) == 1 else tuple(map(int, sides))
