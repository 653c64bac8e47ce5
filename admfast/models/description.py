"""What a weights file holds, as the JSON document that travels with it.

    {"format": "admfast-1", "network": {"kind": "unet", ...}, "diffusion": {...} or null, "training": {...}}

`network` is `NetConfig.to_dict()`, `diffusion` a `DiffusionSettings` (null where it is not known, as for a
classifier), `training` whatever its author wanted to record.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from admfast.checks import one_of, switches, whole
from admfast.errors import InvalidArgument, invalid, nearest
from admfast.models.config import NetConfig, config_from_dict

FORMAT = "admfast-1"
NOISE_SCHEDULES = ("linear", "cosine")
_PARTS = ("format", "network", "diffusion", "training")


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """The diffusion process that a network was trained for, in the names of the published flags.

    Plain fields: `DiffusionConfig(**settings.to_dict())` is the process itself.

    Attributes:
        noise_schedule: "linear" or "cosine".
        steps: length of the original process (published flag `diffusion_steps`).
        learn_sigma: the network puts out variance channels.
        sigma_small: without them, the fixed variance is the posterior's (else beta).
        predict_xstart: the network predicts x_0 (else the noise).
        rescale_timesteps: the network sees t * 1000 / steps.
        rescale_learned_sigmas, use_kl: which loss it was trained with.
    """

    noise_schedule: str = "linear"
    steps: int = 1000
    learn_sigma: bool = False
    sigma_small: bool = False
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    rescale_learned_sigmas: bool = False
    use_kl: bool = False

    def __post_init__(self) -> None:
        one_of("noise_schedule", self.noise_schedule, NOISE_SCHEDULES)
        object.__setattr__(self, "steps", whole("steps", self.steps, 1))
        names = [entry.name for entry in dataclasses.fields(self)]
        switches(self, *(name for name in names if name not in ("noise_schedule", "steps")))

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Description:
    """A network, the process it was trained for (None: not known) and free facts about its training."""

    network: NetConfig
    diffusion: DiffusionSettings | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document as text; raises TypeError where `training` holds what JSON can't."""
        document = {
            "format": FORMAT,
            "network": self.network.to_dict(),
            "diffusion": self.diffusion.to_dict() if self.diffusion else None,
            "training": dict(self.training),
        }
        return json.dumps(document, indent=1) + "\n"


def description_from_json(text: str, source: str) -> Description:
    """Inverse of `Description.to_json`; `source` names the file in errors.

    Raises:
        InvalidArgument: for text that isn't such a document, naming the field.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{source}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidArgument(f'{source}: not a description of a network (no "format": "{FORMAT}")')
    for part in document:
        if part not in _PARTS:
            raise InvalidArgument(f"{source}: unknown part {part!r}; {nearest(part, _PARTS)}")
    if not isinstance(document.get("network"), dict):
        raise InvalidArgument(f'{source}: has no "network"')
    try:
        network = config_from_dict(document["network"])
        settings = document.get("diffusion")
        diffusion = None if settings is None else settings_from_dict(settings)
        return Description(network, diffusion, dict(document.get("training") or {}))
    except (InvalidArgument, TypeError, ValueError) as error:
        raise InvalidArgument(f"{source}: {error}") from None


def settings_from_dict(fields: Mapping[str, Any]) -> DiffusionSettings:
    """Build `DiffusionSettings`; raises InvalidArgument for an unknown field, with the nearest names."""
    known = [entry.name for entry in dataclasses.fields(DiffusionSettings)]
    if not isinstance(fields, Mapping):
        raise invalid("diffusion", fields, "settings by name, or null")
    for name in fields:
        if name not in known:
            raise invalid("diffusion", name, f"no such setting; {nearest(name, known)}")
    return DiffusionSettings(**fields)
