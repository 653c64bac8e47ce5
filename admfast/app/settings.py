"""Check the settings of the page against their bounds, and write them in Python and as a command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from admfast import checks
from admfast.app.models import AppModel
from admfast.app.restore import LARGEST_STRENGTH, Box, restore, visible_pixels
from admfast.errors import invalid
from admfast.files.levels import from_uint8
from admfast.sampling.auto import resolve
from admfast.sampling.loop import Callback
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.request import AUTO, SampleRequest
from admfast.solvers import make_solver

MOST_IMAGES, MOST_STEPS, LARGEST_GUIDANCE = 32, 250, 20.0
LONGEST_TEXT = 200  # characters of a text field
MOST_PIXELS = 8_000_000  # of all images of a job
ENLARGED_FILE, RESTORED_FILE = "small.png", "image.png"


@dataclass(frozen=True)
class Settings:
    """Settings that all jobs of the page have, checked.

    Attributes:
        model: the model that makes the images.
        seeds: such as "0-7"; `seed_list` holds the numbers.
        classes: such as "3" or "0,2"; "" takes the seed modulo the number of classes.
        steps: evaluations of the network for each image.
        folder: the folder to which the command writes.
    """

    model: AppModel
    _: KW_ONLY
    seeds: str = "0-7"
    classes: str = ""
    steps: int = 25
    folder: str = "out/"
    seed_list: list[int] = field(init=False)
    class_list: list[int] | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("seeds", "classes"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > LONGEST_TEXT:
                raise invalid(name, value, f"a text of at most {LONGEST_TEXT} characters")
        object.__setattr__(self, "seed_list", checks.parse_numbers("seeds", self.seeds, MOST_IMAGES))
        pixels = len(self.seed_list) * max(map(_pixels, (self.model.pipe, self.model.pipe.upsampler)))
        if pixels > MOST_PIXELS:
            raise invalid("seeds", self.seeds, f"so few images that they have {MOST_PIXELS:,} pixels or less")
        chosen = checks.parse_numbers("classes", self.classes, MOST_IMAGES) if self.classes.strip() else None
        object.__setattr__(self, "class_list", chosen)
        steps: object = self.steps
        if isinstance(steps, float) and steps.is_integer():  # a browser may send 25.0
            steps = int(steps)
        object.__setattr__(self, "steps", checks.whole_number("steps", steps, 1, MOST_STEPS))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the call that makes the images."""
        return {"classes": self.class_list, "seeds": self.seed_list, "steps": self.steps}

    def run(self, callback: Callback) -> Tensor:
        """Make the images, uint8 [N, H, W, C]. Raises: InvalidArgument for what the model does not allow."""
        raise NotImplementedError

    def check(self) -> None:
        """Check what needs the model, without sampling. Raises: InvalidArgument."""
        self.model.pipe.check(**self.arguments())

    def command_line(self) -> list[str]:
        """Return the command that makes the same images, an option a part; [] if there is none."""
        raise NotImplementedError

    def python_lines(self) -> str:
        """Return the Python lines that make the same images, as `images`."""
        raise NotImplementedError

    @property
    def files(self) -> dict[str, NDArray[np.uint8]]:
        """The images that the lines read, by file name."""
        return {}

    @property
    def image_classes(self) -> list[int] | None:
        """The class of each image; None without classes."""
        seeds, count = self.seed_list, self.model.pipe.default_classes
        if count is None:
            return None
        classes = self.class_list or [seed % count for seed in seeds]
        return [classes[i % len(classes)] for i in range(len(seeds))]

    @property
    def captions(self) -> list[str]:
        """The seed and the class of each image."""
        seeds, classes = self.seed_list, self.image_classes
        if classes is None:
            return [f"seed {seed}" for seed in seeds]
        return [f"seed {seed} · class {label}" for seed, label in zip(seeds, classes, strict=True)]

    @property
    def summary(self) -> str:
        """A few words on how the images are made."""
        return f"{self.steps} steps"

    @property
    def title(self) -> str:
        """One line that describes the job in the queue."""
        count = len(self.seed_list)
        return f"{self.model.name}: {count} image{'s' * (count > 1)}, {self.summary}"


@dataclass(frozen=True)
class Sampling(Settings):
    """Images from noise. guidance: the classifier's scale; not used if the model has no classifier."""

    _: KW_ONLY
    solver: str = AUTO
    guidance: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_solver(self.solver)
        scale = checks.finite_float("guidance", self.guidance, least=0, most=LARGEST_GUIDANCE)
        object.__setattr__(self, "guidance", round(scale, 3))

    def arguments(self) -> dict[str, Any]:
        guided = {} if self.model.pipe.classifier is None else {"guidance": self.guidance}
        return {**super().arguments(), "solver": self.solver, **guided}

    def run(self, callback: Callback) -> Tensor:
        return self.model.pipe.sample(**self.arguments(), callback=callback)

    def command_line(self) -> list[str]:
        return _command(self.model, self.arguments(), self.folder)

    def python_lines(self) -> str:
        call = f"images = pipe.sample({_python_arguments(self.arguments())})"
        return f"import admfast\n\n{self.model.load_line}\n{call}"

    @property
    def summary(self) -> str:
        guided = "" if self.model.pipe.classifier is None else f", guidance {self.guidance:g}"
        return f"{super().summary} of {_solver_text(self.model.pipe, self.arguments())}{guided}"


@dataclass(frozen=True)
class Enlargement(Settings):
    """An image enlarged by an upsampler. image: uint8 [h, w, C]."""

    _: KW_ONLY
    image: NDArray[np.uint8]
    seeds: str = "0"
    solver: str = AUTO

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_solver(self.solver)
        if len(self.seed_list) != 1:
            raise invalid("seeds", self.seeds, "one seed, for one image to enlarge")

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "solver": self.solver}

    def _low_res(self) -> Tensor:
        return from_uint8(torch.tensor(self.image)[None])

    def check(self) -> None:
        self.model.pipe.check(**self.arguments(), low_res=self._low_res())

    def run(self, callback: Callback) -> Tensor:
        return self.model.pipe.sample(**self.arguments(), low_res=self._low_res(), callback=callback)

    def command_line(self) -> list[str]:
        return _command(self.model, {"low-res": ENLARGED_FILE, **self.arguments()}, self.folder)

    def python_lines(self) -> str:
        channels = self.image.shape[2]
        return (
            "import torch\n\nimport admfast\nfrom admfast.files.images import read_image\n"
            "from admfast.files.levels import from_uint8\n\n"
            f"{self.model.load_line}\n"
            f'low_res = from_uint8(torch.tensor(read_image("{ENLARGED_FILE}", {channels}))[None])\n'
            f"images = pipe.sample({_python_arguments(self.arguments())}, low_res=low_res)"
        )

    @property
    def files(self) -> dict[str, NDArray[np.uint8]]:
        return {ENLARGED_FILE: self.image}

    @property
    def summary(self) -> str:
        solver = _solver_text(self.model.pipe, self.arguments())
        return f"{super().summary} of {solver}, from {self.image.shape[0]}x{self.image.shape[1]} pixels"


@dataclass(frozen=True)
class Restoration(Settings):
    """An image of which a box is filled in. image: uint8 [H, W, C]. box, strength: see `restore`."""

    _: KW_ONLY
    image: NDArray[np.uint8]
    box: Box
    seeds: str = "0-3"
    steps: int = 50
    strength: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        strength = checks.finite_float("strength", self.strength, least=0, most=LARGEST_STRENGTH)
        object.__setattr__(self, "strength", round(strength, 3))

    def arguments(self) -> dict[str, Any]:
        return {"box": self.box, **super().arguments(), "strength": self.strength}

    def check(self) -> None:
        visible_pixels(self.image.shape[:2], self.box)
        self.model.pipe.check(self.class_list, self.seed_list, respacing=str(self.steps))

    def run(self, callback: Callback) -> Tensor:
        return restore(self.model.pipe, self.image, **self.arguments(), callback=callback)

    def command_line(self) -> list[str]:
        return []

    def python_lines(self) -> str:
        channels = self.image.shape[2]
        return (
            "import admfast\nfrom admfast.app.restore import restore\n"
            "from admfast.files.images import read_image\n\n"
            f"{self.model.load_line}\n"
            f'image = read_image("{RESTORED_FILE}", {channels})\n'
            f"images = restore(pipe, image, {_python_arguments(self.arguments())})"
        )

    @property
    def files(self) -> dict[str, NDArray[np.uint8]]:
        return {RESTORED_FILE: self.image}

    @property
    def summary(self) -> str:
        return f"{super().summary} of posterior sampling, strength {self.strength:g}"


def _pixels(pipe: Pipeline | None) -> int:
    """Return the pixels of an image of a pipeline, 0 for None."""
    return 0 if pipe is None else int(np.prod(pipe.spatial))


def _check_solver(solver: object) -> None:
    """Reject what is no text of a solver that begins from noise."""
    if not isinstance(solver, str) or len(solver) > LONGEST_TEXT:
        raise invalid("solver", solver, f"a text of at most {LONGEST_TEXT} characters")
    if solver != AUTO and make_solver(solver).starts_from != "noise":
        raise invalid("solver", solver, "a solver that begins from noise")


def _solver_text(pipe: Pipeline, arguments: dict[str, Any]) -> str:
    """Return the solver, and for "auto" also the one that it takes."""
    request, source = resolve(SampleRequest(**arguments), pipe)
    return str(request.solver) if source is None else f"{AUTO} ({request.solver})"


def _command(model: AppModel, arguments: dict[str, Any], folder: str) -> list[str]:
    """Return the parts of `admfast sample ...` with these arguments; values that are None are left out."""
    options = {**model.options, **arguments, "out": folder}
    parts = [["admfast", "sample", model.name]]
    for name, value in options.items():
        if value is not None:
            parts.append([f"--{name}", _numbers_text(value) if isinstance(value, list) else f"{value}"])
    return [shlex.join(part) for part in parts]


def _python_arguments(arguments: dict[str, Any]) -> str:
    """Return `name=value, ...` of these arguments; values that are None are left out."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return ", ".join(f"{name}={_python_text(value)}" for name, value in given.items())


def _is_range(numbers: Sequence[int]) -> bool:
    """Tell whether there are several numbers, each one more than the last."""
    return len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def _numbers_text(numbers: Sequence[int]) -> str:
    """Return numbers as the command line reads them: "0-7" or "3,5"."""
    return f"{numbers[0]}-{numbers[-1]}" if _is_range(numbers) else ",".join(map(str, numbers))


def _python_text(value: Any) -> str:
    """Return a value as Python code; consecutive numbers are a range, and texts have double quotes."""
    if isinstance(value, list) and _is_range(value):
        return f"range({value[-1] + 1})" if value[0] == 0 else f"range({value[0]}, {value[-1] + 1})"
    return json.dumps(value) if isinstance(value, str) else repr(value)
