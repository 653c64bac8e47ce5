"""The JSON document that describes a weights file and is stored with it.

    {"format": "admfast-1", "network": {"kind": "unet", ...}, "diffusion": {...} or null, "training": {...}}

`network` is `NetConfig.to_dict()`. `diffusion` is `DiffusionConfig.to_dict()`, or null if the process is
unknown or the network is a classifier. `training` holds any facts that the author recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument, allowed_names, invalid
from admfast.models.config import NetConfig, config_from_dict

FORMAT = "admfast-1"
_PARTS = ("format", "network", "diffusion", "training")


@dataclass(frozen=True)
class Description:
    """A network, its diffusion process (None: unknown), and any facts about its training."""

    network: NetConfig
    diffusion: DiffusionConfig | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the document as text; raise TypeError if JSON can't hold a value in `training`."""
        document = {
            "format": FORMAT,
            "network": self.network.to_dict(),
            "diffusion": self.diffusion.to_dict() if self.diffusion else None,
            "training": dict(self.training),
        }
        return json.dumps(document, indent=1) + "\n"


def is_foreign(text: str) -> bool:
    """Tell whether another program wrote a text: it has no sign of a description, not even a damaged one."""
    return re.search(r'"format"\s*:\s*"admfast-|"network"\s*:\s*\{\s*"kind"', text) is None


def description_from_json(text: str, source: str) -> Description:
    """Return the description that `Description.to_json` wrote; `source` names the file in errors.

    Raises:
        InvalidArgument: for any other text; the error names the field.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{source}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidArgument(f'{source}: not a description of a network (no "format": "{FORMAT}")')
    for part in document:
        if part not in _PARTS:
            raise InvalidArgument(f"{source}: unknown part {part!r}; {allowed_names(part, _PARTS)}")
    if not isinstance(document.get("network"), dict):
        raise InvalidArgument(f'{source}: has no "network"')
    try:
        network = config_from_dict(document["network"])
        settings = document.get("diffusion")
        if not isinstance(settings, dict | None):
            raise invalid("diffusion", settings, "settings by name, or null")
        diffusion = None if settings is None else DiffusionConfig.from_flags(**settings)
        return Description(network, diffusion, dict(document.get("training") or {}))
    except (InvalidArgument, TypeError, ValueError) as error:
        raise InvalidArgument(f"{source}: {error}") from None
