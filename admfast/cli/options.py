"""Options that several commands share: `--set NAME=VALUE` for weights files, and dtypes by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from admfast.checkpoints import flags_to_options
from admfast.checkpoints.infer import OPTION_NAMES, SWITCH_NAMES
from admfast.checks import parse_literal
from admfast.errors import allowed_names, invalid
from admfast.sampling.load import LOW_RES_SIZE, NULL_CLASS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BOOLEAN_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_settings(
    flag: str, texts: Iterable[str] | None, extra_names: Iterable[str] | None = ()
) -> dict[str, Any]:
    """Read every `NAME=VALUE` that was given with `flag`.

    extra_names: names allowed in addition to the options of networks and processes; None allows every name,
        and the caller must check them.
    Raises: InvalidArgument for a text without `=`, an unknown name, or a switch that is neither yes nor no.
    """
    options: dict[str, Any] = {}
    for text in texts or ():
        name, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not name:
            raise invalid(flag, text, "NAME=VALUE, such as num_heads=4")
        known_names = [*OPTION_NAMES, *(extra_names or ())]
        if extra_names is not None and name not in known_names and name not in flags_to_options.FLAG_NAMES:
            raise invalid(flag, name, f"no such option of a file; {allowed_names(name, known_names)}")
        if name in (*SWITCH_NAMES, NULL_CLASS) or name in flags_to_options.FLAG_SWITCHES:
            if value.lower() not in _BOOLEAN_WORDS:
                raise invalid(flag, text, "True or False (or yes, no, 1, 0)")
            options[name] = _BOOLEAN_WORDS[value.lower()]
        else:
            options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    """Return the value of a text: `parse_literal` of it, or a tuple if it is several words with commas."""
    value = parse_literal(text)
    if isinstance(value, str) and value == text and "," in text:
        return tuple(_parse_value(part.strip()) for part in text.split(",") if part.strip())
    return value


def load_arguments(
    set_: Iterable[str] | None,
    set_classifier: Iterable[str] | None,
    set_upsampler: Iterable[str] | None,
    set_weak: Iterable[str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Return the arguments of `load`: `arguments`, and the settings that the `--set` flags give."""
    arguments["classifier_options"] = parse_settings("--set-classifier", set_classifier)
    arguments["upsampler_options"] = parse_settings(
        "--set-upsampler", set_upsampler, extra_names=[LOW_RES_SIZE]
    )
    if set_weak:
        arguments["weak_options"] = parse_settings("--set-weak", set_weak)
    return {**arguments, **parse_settings("--set", set_, extra_names=[LOW_RES_SIZE, NULL_CLASS])}
