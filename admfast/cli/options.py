"""Options that several commands share: `--set NAME=VALUE` for weights files, and dtypes by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from admfast.checkpoints import flags_to_options
from admfast.checkpoints.infer import OPTION_NAMES, SWITCH_NAMES
from admfast.checks import literal
from admfast.errors import invalid, nearest
from admfast.sampling.load import LOW_RES_SIZE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def options_of(flag: str, texts: Iterable[str] | None, also: Iterable[str] | None = ()) -> dict[str, Any]:
    """Read every `NAME=VALUE` that was given with `flag`.

    also: names allowed in addition to the options of networks and processes; None allows every name, and
    the caller must check them.
    Raises: InvalidArgument for a text without `=`, an unknown name, or a switch that is neither yes nor no.
    """
    options: dict[str, Any] = {}
    for text in texts or ():
        name, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not name:
            raise invalid(flag, text, "NAME=VALUE, such as num_heads=4")
        known = [*OPTION_NAMES, *(also or ())]
        if also is not None and name not in known and name not in flags_to_options.FLAG_NAMES:
            raise invalid(flag, name, f"no such option of a file; {nearest(name, known)}")
        if name in SWITCH_NAMES or name in flags_to_options.FLAG_SWITCHES:
            if value.lower() not in _WORDS:
                raise invalid(flag, text, "True or False (or yes, no, 1, 0)")
            options[name] = _WORDS[value.lower()]
        else:
            options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    """Return the value of a text: `literal` of it, or a tuple if it is several words with commas."""
    found = literal(text)
    if isinstance(found, str) and found == text and "," in text:
        return tuple(_value(part.strip()) for part in text.split(",") if part.strip())
    return found


def parts_of(
    set_: Iterable[str] | None,
    set_classifier: Iterable[str] | None,
    set_upsampler: Iterable[str] | None,
    **given: Any,
) -> dict[str, Any]:
    """Return the arguments of `load` for the files, the options that they don't show, and the device."""
    given["classifier_options"] = options_of("--set-classifier", set_classifier)
    given["upsampler_options"] = options_of("--set-upsampler", set_upsampler, also=[LOW_RES_SIZE])
    return {**given, **options_of("--set", set_, also=[LOW_RES_SIZE])}
