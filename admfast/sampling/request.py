"""A request for images: the only list of what can be asked of `Pipeline.sample`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from admfast import checks
from admfast.checkpoints import flags
from admfast.diffusion import Respacing
from admfast.engine.guidance import GuidanceFn
from admfast.errors import first_line, invalid, nearest
from admfast.sampling.guides import LARGEST, Guide, Interval
from admfast.sampling.loop import Callback
from admfast.solvers import Solver, from_text, solver_of

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class SampleRequest:
    """Settings of a call of `Pipeline.sample`, each checked as far as that needs no model.

    Image i has seed `seeds[i]` and class `classes[i % len(classes)]`. It depends on its seed, class and these
    settings only, not on the batch or the order that it is in.

    Attributes:
        classes: class indices; None takes seed modulo the number of classes. Not for a model without.
        seeds: 0..2^64-1, one an image; None is 0, 1, ... for the classes given (one image without any).
        steps: network evaluations, 1..length of the process; None is the system's own.
        solver: a value (`ddim(eta=0.5)`) or its text ("ddim:eta=0.5"); see `admfast.solvers`. One that begins
            from images ("ddim-inverse") takes `x_start` apart into its noise (float output; not for a
            cascade). DDIM from that noise leads back to them.
        guidance: scale of the classifier's gradient, 0 for none; None is the system's own, or 0 with other
            guides and for a solver that begins from images.
        guidance_interval: (lowest, highest) timestep of the original process at which guidance applies
            (Kynkaanniemi et al. 2024); None is everywhere. Steps outside cost no classifier.
        guides: see `admfast.sampling.guides`; they add up, with `guidance` where it is given.
        eta: short for the option of that name of the solver.
        clip: limit x_0 to [-1, 1] at every step.
        respacing: which timesteps to use instead of `steps`: a published string or a list of steps.
        upsampler_steps: of the upsampler in a cascade; None is the system's own.
        size: (H, W) or "HxW" of the images that the network makes (the base model's of a cascade), or one
            number for all sides; None is that of `noise`, `x_start` or the model, and of an upsampler each
            side of `low_res` times image_size / low_res_size. 2^(levels - 1) must divide every side.
        low_res: [N, C, h, w] float in [-1, 1] for a pipeline that is an upsampler itself.
        noise: [N, C, H, W] used as x_T instead of the seeds' noise.
        step_noise: [steps, N, C, H, W] used in the steps instead of the seeds' noise.
        x_start, t_start: begin from this image ([N, C, H, W], -1..1) noised to this timestep (0..length of
            the process - 1), at the nearest step at or below it. A solver that begins from images takes
            x_start only: the clean image, which is not noised.
        guidance_fn: guidance_fn(x_t, t) -> gradient of a log-probability at x_t, instead of a classifier.
            It is called on copies and without gradients being recorded: use `torch.enable_grad()` inside.
        denoised_fn: maps x_0 at every step, before it is limited.
        callback, every: called with a `Progress` after every `every`-th step and the last, in a cascade for
            the base model's steps and then for the upsampler's.
        batch_size: images at a time; None chooses by image size and device.
        output: "uint8" or "float".
        impl: implementation of the update, by name.

    Raises: InvalidArgument for a value that no model allows.
    """

    classes: int | Iterable[int] | None = None
    seeds: int | Iterable[int] | None = None
    _: KW_ONLY
    steps: int | None = None
    solver: Solver | str = "ddpm"
    guidance: float | None = None
    guidance_interval: Interval | None = None
    guides: Iterable[Guide] = ()
    eta: float | None = None
    clip: bool = True
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
        checks.functions(denoised_fn=self.denoised_fn, callback=self.callback)
        self._put_whole("every", 1)
        checks.one_of("output", self.output, ("uint8", "float"))
        if not isinstance(self.impl, str | None):
            raise invalid("impl", self.impl, "the name of an implementation, or None")

    def _put(self, name: str, value: object) -> None:
        """Keep a setting in the one form that later readers expect."""
        object.__setattr__(self, name, value)

    def _put_whole(self, name: str, least: int) -> None:
        """Keep a whole number as an int."""
        self._put(name, checks.whole(name, getattr(self, name), least))

    def _check_images(self) -> None:
        """Check which images are asked for, and the tensors that come with them."""
        for name, most in (("classes", None), ("seeds", LARGEST_SEED)):
            if getattr(self, name) is not None:
                self._put(name, tuple(checks.whole_numbers(name, getattr(self, name), 0, most)))
                if not getattr(self, name):
                    raise invalid(name, [], "at least one")
        if self.size is not None:
            size = _sides_of(self.size) if isinstance(self.size, str) else self.size
            self._put("size", checks.whole_or_several("size", size, 1))
        for name in ("noise", "x_start", "step_noise", "low_res"):
            if getattr(self, name) is not None:
                images = checks.images(name, getattr(self, name))
                if name == "low_res" or (name == "x_start" and self.clip):
                    checks.in_range(name, images)
        if self.batch_size is not None:
            self._put_whole("batch_size", 1)

    def _check_steps(self) -> None:
        """Check the solver, its steps, and where they begin."""
        if isinstance(self.solver, str) and self.eta is None:
            solver = from_text(self.solver)
        else:
            solver = solver_of(self.solver, **({} if self.eta is None else {"eta": self.eta}))
        self._put("solver", solver)
        self._put("eta", None)
        checks.switches(self, "clip")
        for name in ("steps", "upsampler_steps"):
            if getattr(self, name) is not None:
                self._put_whole(name, 1)
        if self.respacing is not None and self.steps is not None:
            raise invalid("steps", self.steps, "not together with respacing")
        if self.respacing is not None and not isinstance(self.respacing, str):
            self._put("respacing", checks.whole_or_several("respacing", self.respacing, 0))
        if self.t_start is not None:
            self._put_whole("t_start", 0)
        if solver.begins == "noise":
            if (self.x_start is None) != (self.t_start is None):
                raise invalid("x_start, t_start", (self.x_start is not None, self.t_start), "both or neither")
        elif self.t_start is not None:
            raise invalid("t_start", self.t_start, f"not for {solver}: it begins from the clean image")
        elif (self.x_start is None) == (self.noise is None):
            given = None if self.noise is None else "given together with noise"
            allowed = f"{solver} takes images apart: give them, [N, C, H, W] in [-1, 1]"
            raise invalid("x_start", given, allowed)

    def _check_guidance(self) -> None:
        """Check the guides, and that each is said once."""
        checks.functions(guidance_fn=self.guidance_fn)
        if self.guidance is not None:
            self._put("guidance", checks.real("guidance", self.guidance, least=-LARGEST, most=LARGEST))
        if self.guidance and self.guidance_fn is not None:
            raise invalid("guidance", self.guidance, "not together with guidance_fn")
        if self.guidance_interval is not None:
            self._put("guidance_interval", checks.interval("guidance_interval", self.guidance_interval))
        self._put("guides", tuple(checks.items(self.guides)))
        by_classifier = [] if self.guidance is None else [self.guidance]
        for guide in self.guides:
            if not isinstance(guide, Guide):
                raise invalid("guides", guide, "a Guide, or several (see admfast.sampling.guides)")
            if guide.function is None:
                by_classifier.append(guide.scale)
        if self.guidance_interval is not None and any(guide.function is None for guide in self.guides):
            allowed = "not together with a classifier's guide, which has an interval of its own"
            raise invalid("guidance_interval", self.guidance_interval, allowed)
        if len(by_classifier) > 1:
            raise invalid("guides", by_classifier, "one scale of the classifier's gradient, said once")

    def to_json(self) -> str:
        """Return the settings that are given, as JSON.

        Raises: InvalidArgument for a tensor or a function, which JSON does not hold.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        guides = given.pop("guides")
        given["solver"] = str(self.solver)
        if from_text(given["solver"]) != self.solver:
            raise invalid("solver", given["solver"], "one of `admfast.solvers.SOLVERS`, in JSON")
        if guides:
            raise invalid("guides", guides, "none, in JSON")
        for name, value in given.items():
            if isinstance(value, Tensor) or callable(value):
                raise invalid(name, type(value).__name__, "a value that JSON holds")
        return json.dumps(given)

    @classmethod
    def from_json(cls, text: str) -> SampleRequest:
        """Return the request of `to_json`. Raises: InvalidArgument for a wrong name or value."""
        try:
            settings = json.loads(text)
        except (ValueError, TypeError) as error:
            raise invalid("text", str(text)[:80], f"a request as JSON ({first_line(error)})") from None
        if not isinstance(settings, dict):
            raise invalid("text", text[:80], "a JSON object of settings")
        return cls.of(**settings)

    @classmethod
    def of(cls, /, *images: Any, **settings: Any) -> SampleRequest:
        """Return a request of these settings, given as to `sample`. Raises: InvalidArgument for a name."""
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name, value in settings.items():
            if name not in known:
                flags.refuse_elsewhere({name: value})
                raise invalid(name, value, f"sample has no such argument; {nearest(name, known)}")
        return cls(*images, **settings)


def _sides_of(text: str) -> int | tuple[int, ...]:
    """Read "64x96" or "64"; raises InvalidArgument."""
    sides = [part.strip() for part in text.lower().split("x")]
    if not all(re.fullmatch(r"[0-9]{1,9}", side) for side in sides):
        raise invalid("size", text, "HEIGHTxWIDTH in pixels such as 64x96, or one number for all sides")
    return int(sides[0]) if len(sides) == 1 else tuple(map(int, sides))
