"""The models that the page offers, each with the words and the line of code that load it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from admfast.errors import InvalidArgument, invalid
from admfast.files.images import MODES
from admfast.models import UpsamplerConfig
from admfast.models.presets import SYSTEMS
from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline

SHIPPED = ("digits32", "digits32-up", "digits32_upsampler")


@dataclass(frozen=True)
class AppModel:
    """A pipeline with the arguments of `admfast.load` that made it; None was not given."""

    pipe: Pipeline
    name: str
    weights: str | None = None
    device: str | None = None

    @property
    def options(self) -> dict[str, str | None]:
        """The options of `admfast sample` and `admfast.load` for this model; None was not given."""
        return {"weights": self.weights, "device": self.device}

    @property
    def load_line(self) -> str:
        """The Python line that loads this model as `pipe`."""
        given = [f"{name}={json.dumps(value)}" for name, value in self.options.items() if value is not None]
        return f"pipe = admfast.load({', '.join([json.dumps(self.name), *given])})"

    @property
    def enlarges(self) -> bool:
        """True if the model is an upsampler, which makes images only from smaller ones."""
        return isinstance(self.pipe.config, UpsamplerConfig)

    @property
    def restores(self) -> bool:
        """True if a guide can steer the model to an image: it makes its images at once, not in a cascade."""
        return not self.enlarges and self.pipe.upsampler is None

    @property
    def default_steps(self) -> int:
        """Number of steps with which the page begins."""
        return min(self.pipe.steps, 25)


def load_models(
    names: Sequence[str] = (), weights: Path | None = None, device: str | None = None
) -> dict[str, AppModel]:
    """Load the models that ship and those that are named; return them by name.

    weights: folder with the released files. Raises: as `admfast.load`; InvalidArgument names the option.
    """
    models = {}
    for name in dict.fromkeys((*names, *SHIPPED)):
        needs_weights = name in SYSTEMS and not all(model.shipped for model in SYSTEMS[name].models)
        folder = str(weights) if weights is not None and needs_weights else None
        try:
            pipe = load(name, folder, device=device)
        except InvalidArgument as error:
            raise InvalidArgument(re.sub("^name=", "model=", str(error))) from None
        config = pipe.config
        if config.dims != 2 or config.in_channels not in MODES:
            kind = f"{config.in_channels} channels, {config.dims}-D"
            raise invalid("model", name, f"a model of flat images with 1, 3 or 4 channels; this has {kind}")
        models[name] = AppModel(pipe, name, folder, device)
    return models
