"""Infer the configuration of a weights file from its description, the released models, and its shapes.

Shapes don't show the attention heads, the order of qkv rows, dropout, or (without an attention pool) the
image size. These come, in this order, from the caller's options, the caller's configuration or preset, the
file's description, or the released model with exactly these keys and shapes. If options are still missing,
one error lists them with their allowed values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admfast.checkpoints import flags_to_options
from admfast.checkpoints.complete_network import check_complete
from admfast.checkpoints.differences import (
    Differences,
    Shapes,
    fingerprint,
    nearest_preset,
)
from admfast.checkpoints.structure import Structure, describe_structure, read_structure
from admfast.diffusion import NOISE_SCHEDULES, DiffusionConfig
from admfast.diffusion.config import SETTINGS, check_setting
from admfast.diffusion.config import SWITCHES as PROCESS_SWITCHES
from admfast.errors import CheckpointError, InvalidArgument, allowed_names, invalid, show_value
from admfast.models import NetConfig, UNetConfig, config_from_dict
from admfast.models.config import CONFIG_KINDS, SWITCHES, check_field, parse_channel_mult
from admfast.models.description import Description
from admfast.models.presets import ModelPreset, preset, presets_with_fingerprint

_DIFFUSION_NAMES = set(SETTINGS)
_NETWORK_NAMES = {entry.name for kind in CONFIG_KINDS.values() for entry in dataclasses.fields(kind)}
OPTION_NAMES = sorted(_NETWORK_NAMES | _DIFFUSION_NAMES | {"kind", "entry"})  # of a file
SWITCH_NAMES = {*SWITCHES, *PROCESS_SWITCHES}


class AmbiguousCheckpoint(CheckpointError):
    """Options of the weights are missing; the message lists them, `structure` holds what the shapes show."""

    def __init__(self, message: str, structure: Structure):
        super().__init__(message)
        self.structure = structure


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a weights file, and the sources of this knowledge.

    Attributes:
        path: the weights file.
        config: the network's configuration.
        diffusion: the diffusion process; None if it is not known.
        preset: the released model that the file is; None if its shapes fit several or none.
        candidates: all released models with these keys and shapes.
        source: where the configuration comes from, in words.
        assumed: settings that were assumed because they are not known, such as "dropout=0.0".
        training: facts about the training, from the file's description.
        parameters: number of parameters.
        fingerprint: of keys and shapes.
        dtypes: number of values on disk by dtype, such as {"float32": 295904454}; {} if not known.
    """

    path: Path
    config: NetConfig
    diffusion: DiffusionConfig | None
    preset: ModelPreset | None
    candidates: tuple[ModelPreset, ...]
    source: str
    assumed: tuple[str, ...]
    training: Mapping[str, Any]
    parameters: int
    fingerprint: str
    dtypes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def low_res_size(self) -> int | None:
        """Side of the images that an upsampler was trained to enlarge, by its recipe or preset, or None."""
        recipe = self.training.get("recipe")
        if isinstance(recipe, Mapping) and recipe.get("low_res_size") is not None:
            return recipe["low_res_size"]
        return None if self.preset is None else self.preset.low_res_size


def identify(
    shapes: Shapes,
    *,
    file: str,
    options: Mapping[str, Any] | None = None,
    config: NetConfig | None = None,
    preset_name: str | None = None,
    description: Description | None = None,
    require_process: bool = False,
) -> ModelInfo:
    """Find the configuration of the weights with these keys and shapes.

    Args:
        shapes: of the file's tensors.
        file: path of the file; the name of a released file tells apart models of equal shapes.
        options: fields of the configuration or of `DiffusionConfig`, which override every other source;
            published flags of the same meaning are accepted too (see `flags_to_options`).
        config: the configuration, if the caller knows it.
        preset_name: name of the released model that the file is, if the caller knows it.
        description: the description that came with the file.
        require_process: report a missing noise schedule as an error too.

    Raises:
        InvalidArgument: for an unknown option or preset, or a value that is not allowed.
        CheckpointError: if the shapes are not those of an ADM network.
        AmbiguousCheckpoint: if options are missing. The message is one line with these options, their allowed
            values, and the nearest released model with its values.
    """
    user_options = options or {}
    options, claims = flags_to_options.translate_flags(user_options)
    network_options, diffusion_options = _split_options(options, user_options)
    candidates = presets_with_fingerprint(fingerprint(shapes))
    matched_preset: ModelPreset | None = None
    assumed: list[str] = []
    training: Mapping[str, Any] = {}
    is_certain = True
    if config is not None and preset_name is not None:
        raise invalid("preset", preset_name, "give a preset or a configuration, not both")
    if config is not None:
        diffusion, source = None, "the configuration given"
    elif preset_name is not None:
        matched_preset = preset(preset_name)
        config, diffusion = matched_preset.config, matched_preset.diffusion
        source = f"preset {matched_preset.name}"
    elif description is not None:
        config, diffusion, training = description.network, description.diffusion, description.training
        source = "the description that the file carries"
    elif candidates:
        matched_preset = _choose_by_file_name(candidates, file)
        model = matched_preset or candidates[0]
        config, diffusion = model.config, model.diffusion
        is_certain = matched_preset is not None or "dropout" in network_options
        source = f"its keys and shapes, which are those of {_join_alternatives([m.name for m in candidates])}"
    else:
        with _report_contradictions_first(shapes, user_options):
            config, assumed = _config_from_structure(
                shapes, file, network_options, diffusion_options, require_process, user_options
            )
        diffusion, source = None, "its keys and shapes, and the options given"
    config = _with_options(config, network_options, shapes, user_options)
    flags_to_options.check_claims(config, claims)
    diffusion = _diffusion_with_options(diffusion, diffusion_options, config)
    if matched_preset or not is_certain:
        assumed += _preset_assumptions(config, diffusion, options, is_certain)
    return ModelInfo(
        Path(file),
        config,
        diffusion,
        matched_preset,
        candidates,
        source,
        tuple(assumed),
        training,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        fingerprint=fingerprint(shapes),
    )


def _choose_by_file_name(candidates: Sequence[ModelPreset], file: str) -> ModelPreset | None:
    """Return the only candidate, or the one with the name of the file; None if no name agrees."""
    fitting = [model for model in candidates if len(candidates) == 1 or model.name == _stem(file)]
    return fitting[0] if fitting else None


def _preset_assumptions(
    config: NetConfig, diffusion: DiffusionConfig | None, options: Mapping[str, Any], is_certain: bool
) -> list[str]:
    """Return settings that a released model fixes but shapes don't show: the heads and the process.

    is_certain: only one released model fits. Those of equal shapes differ only in dropout.
    """
    heads_field = "num_heads" if config.num_head_channels == -1 else "num_head_channels"
    settings = {
        heads_field: getattr(config, heads_field),
        "use_new_attention_order": config.use_new_attention_order,
    }
    if diffusion is not None:
        settings |= {"noise_schedule": diffusion.noise_schedule, "steps": diffusion.steps}
    assumed = [f"{name}={value}" for name, value in settings.items() if name not in options]
    return assumed if is_certain else [*assumed, f"dropout={config.dropout} (matters in training only)"]


def _flag_and_value(user_options: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Return the flag that gives an option, and its value."""
    return next(
        (flag, value) for flag, value in user_options.items() if flags_to_options.option_name(flag) == name
    )


def _split_options(
    options: Mapping[str, Any], user_options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the network's options (with `kind`) and the diffusion process's; check each value by itself."""
    network, diffusion = {}, {}
    for name, value in options.items():
        if name not in OPTION_NAMES:
            raise invalid("option", name, allowed_names(name, OPTION_NAMES))
        if value is None and name != "num_classes":
            continue
        flag, _ = _flag_and_value(user_options, name)
        if name in _DIFFUSION_NAMES:
            diffusion[name] = check_setting(name, value, flag)
        else:
            network[name] = check_field(name, value, flag)
    if "kind" in network and network["kind"] not in CONFIG_KINDS:
        raise invalid("kind", network["kind"], allowed_names(network["kind"], CONFIG_KINDS))
    return network, diffusion


def _with_options(
    config: NetConfig, options: Mapping[str, Any], shapes: Shapes, user_options: Mapping[str, Any]
) -> NetConfig:
    """Return `config` with some fields replaced; reject another kind, whose fields have other meanings."""
    fields = dict(options)
    if fields.pop("kind", config.kind) != config.kind:
        raise invalid("kind", options["kind"], f"the weights are those of a {config.kind}")
    _check_fields(config.kind, fields, user_options)
    with _report_contradictions_first(shapes, user_options):
        return config_from_dict({**config.to_dict(), **fields}) if fields else config


def _check_fields(kind: str, options: Mapping[str, Any], user_options: Mapping[str, Any]) -> None:
    """Reject options that only networks of another kind have."""
    field_names = {field.name for field in dataclasses.fields(CONFIG_KINDS[kind])}
    for name in options:
        if name not in field_names and name != "kind":
            raise invalid(*_flag_and_value(user_options, name), f"not for weights of a {kind}")


def _diffusion_with_options(
    process: DiffusionConfig | None, options: Mapping[str, Any], config: NetConfig
) -> DiffusionConfig | None:
    """Return the process with the options applied, or None if it is unknown and they give no schedule."""
    learns_sigma = isinstance(config, UNetConfig) and config.learn_sigma
    settings = process
    if options:
        settings = dataclasses.replace(process or DiffusionConfig(learn_sigma=learns_sigma), **options)
    if settings is not None and isinstance(config, UNetConfig) and settings.types[1].learned != learns_sigma:
        channels = f"{config.out_channels} channels out for {config.in_channels}-channel images"
        raise invalid("learn_sigma", settings.learn_sigma, f"{learns_sigma} for a network with {channels}")
    return settings if process is not None or "noise_schedule" in options else None


def _config_from_structure(
    shapes: Shapes,
    file: str,
    options: dict[str, Any],
    diffusion_options: dict[str, Any],
    require_process: bool,
    user_options: Mapping[str, Any],
) -> tuple[NetConfig, list[str]]:
    """Return the configuration from shapes and `options`, and the assumptions; ask for missing options."""
    try:
        structure = read_structure(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    questions: list[str] = []
    check_complete(shapes, structure, file)
    kind = _find_kind(structure, options, questions)
    _check_fields(kind, options, user_options)
    layout = _find_layout(structure, options, questions, user_options)
    fields = {**structure.fields, **structure.fields_of_layout(layout)}
    _ask_heads(structure, kind, options, questions)
    if "image_size" not in fields and "image_size" not in options:
        questions.append("image_size (side of the training images in pixels)")
    # If other options are missing, ask for the schedule too.
    if kind != "classifier" and "noise_schedule" not in diffusion_options and (require_process or questions):
        questions.append(f"noise_schedule ({_join_alternatives(list(NOISE_SCHEDULES))})")
    if questions:
        raise AmbiguousCheckpoint(
            _missing_options_message(file, structure, questions, nearest_preset(shapes)), structure
        )
    fields |= {"kind": kind, "in_channels": structure.kinds[kind]}
    return config_from_dict({**fields, **options}), _list_assumptions(kind, options)


def find_contradicted_flags(shapes: Shapes, user_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the shapes contradict, with the values that they show: {"num_channels": 32}."""
    try:
        structure = read_structure(shapes)
    except CheckpointError:
        return {}
    shown_fields = dict(structure.fields)
    kind = user_options.get("kind", next(iter(structure.kinds)))
    if kind in structure.kinds and (len(structure.kinds) == 1 or "kind" in user_options):
        shown_fields["in_channels"] = structure.kinds[kind]
    if len(structure.layouts) == 1:
        shown_fields |= structure.fields_of_layout(structure.layouts[0])
    if shown_fields.get("resblock_updown"):
        shown_fields.pop("conv_resample")  # has no effect
    contradicted = {}
    for flag, value in user_options.items():
        name = flags_to_options.option_name(flag)
        # Attention may be given as sides or factors (see `flags_to_options.check_claims`).
        if name not in shown_fields or name == "attention_resolutions" or value is None:
            continue
        if name == "channel_mult" and isinstance(value, str):
            if not value.strip():
                continue
            value = parse_channel_mult(value, 0)
        if check_field(name, value, flag) != shown_fields[name]:
            contradicted[flag] = shown_fields[name]
    return contradicted


@contextlib.contextmanager
def _report_contradictions_first(shapes: Shapes, user_options: Mapping[str, Any]) -> Iterator[None]:
    """If the options in the block make no network, report first a flag that the shapes contradict."""
    try:
        yield
    except InvalidArgument as error:
        for flag, shown_value in find_contradicted_flags(shapes, user_options).items():
            raise invalid(flag, user_options[flag], f"the weights have {show_value(shown_value)}") from error
        raise


def _find_kind(structure: Structure, options: Mapping[str, Any], questions: list[str]) -> str:
    """Return the kind of network; ask for it if the channels fit both a UNet and an upsampler."""
    chosen = options.get("kind")
    if chosen is not None and chosen not in structure.kinds:
        raise invalid("kind", chosen, f"the weights are those of a {' or '.join(structure.kinds)}")
    if chosen is None and len(structure.kinds) > 1:
        questions.append(f"kind ({' or '.join(structure.kinds)})")
    return chosen or next(iter(structure.kinds))


def _find_layout(
    structure: Structure, options: Mapping[str, Any], questions: list[str], user_options: Mapping[str, Any]
) -> tuple[int, int]:
    """Return (levels, residual blocks per level); ask if a classifier's blocks fit several layouts."""
    fitting = list(structure.layouts)
    for name in ("num_res_blocks", "channel_mult", "image_size"):
        if name in options:
            fitting = [layout for layout in fitting if _layout_agrees(structure, layout, name, options[name])]
        if not fitting:
            allowed = [_describe_layout(structure, layout) for layout in structure.layouts]
            raise invalid(*_flag_and_value(user_options, name), f"the weights have {' or '.join(allowed)}")
    if len(fitting) > 1:
        questions.append(f"num_res_blocks ({_join_alternatives([str(count) for _, count in fitting])})")
    return fitting[0]


def _layout_agrees(structure: Structure, layout: tuple[int, int], name: str, value: Any) -> bool:
    """Tell whether an option agrees with a layout; of channel_mult only the length is compared."""
    if name == "channel_mult":
        return len(value) == layout[0]
    return structure.fields_of_layout(layout).get(name, value) == value


def _describe_layout(structure: Structure, layout: tuple[int, int]) -> str:
    fields = structure.fields_of_layout(layout)
    size = f", image_size {fields['image_size']}" if "image_size" in fields else ""
    return f"num_res_blocks {layout[1]} on {layout[0]} level{'s' if layout[0] > 1 else ''}{size}"


def _ask_heads(structure: Structure, kind: str, options: Mapping[str, Any], questions: list[str]) -> None:
    """Ask for the attention heads and, if there is more than one, for the order of qkv rows."""
    max_head_channels = math.gcd(*structure.attention_widths)
    channels, heads = options.get("num_head_channels", -1), options.get("num_heads")
    if structure.pool_side is not None:
        if channels == -1:
            questions.append(f"num_head_channels (a divisor of {max_head_channels})")
    elif channels == -1 and heads is None:
        questions.append(f"num_heads or num_head_channels (a divisor of {max_head_channels})")
    has_one_head = (
        heads == 1 and channels == -1 or channels == structure.attention_widths[-1] == max_head_channels
    )
    if kind != "classifier" and not has_one_head and "use_new_attention_order" not in options:
        questions.append("use_new_attention_order (True or False)")


def _list_assumptions(kind: str, options: Mapping[str, Any]) -> list[str]:
    """Return the settings that are assumed because no option gives them."""
    assumed = []
    if "dropout" not in options:
        assumed.append("dropout=0.0 (matters in training only)")
    if kind == "classifier" and "use_new_attention_order" not in options:
        # The published constructor has no flag for it.
        assumed.append("use_new_attention_order=False (as in every published classifier)")
    return assumed


def _missing_options_message(
    file: str,
    structure: Structure,
    questions: list[str],
    nearest_model: tuple[ModelPreset, Differences] | None,
) -> str:
    """Return the error text: the network, the missing options, and the nearest released model's values."""
    text = (
        f"{file}: these are the weights of {describe_structure(structure)}, but keys and shapes don't show "
        f"all settings; give {'; '.join(questions)}; or put its .json next to it"
    )
    if nearest_model is not None:
        model, differences = nearest_model
        config = model.config
        answers = {"image_size": config.image_size, "use_new_attention_order": config.use_new_attention_order}
        heads_field = "num_heads" if config.num_head_channels == -1 else "num_head_channels"
        answers[heads_field] = getattr(config, heads_field)
        values = ", ".join(f"{name}={value}" for name, value in answers.items())
        text += f" (the nearest released model is {model.name}, with {values}; "
        text += f"the file differs from it: {differences.summary(1)})"
    return text


def _stem(file: str) -> str:
    """Return the name of a file without folder and ending."""
    return file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _join_alternatives(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else "".join(names)
