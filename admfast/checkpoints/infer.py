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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admfast.checkpoints import flags
from admfast.checkpoints.differences import (
    Differences,
    Shape,
    Shapes,
    compare,
    fingerprint,
    nearest_preset,
    network_shapes,
)
from admfast.checkpoints.structure import Structure, read_structure, summary
from admfast.diffusion import NOISE_SCHEDULES, DiffusionConfig
from admfast.diffusion.config import SETTINGS, checked_setting
from admfast.diffusion.config import SWITCHES as PROCESS_SWITCHES
from admfast.errors import CheckpointError, InvalidArgument, allowed_names, invalid, show_value
from admfast.models import NetConfig, UNetConfig, config_from_dict
from admfast.models.config import CONFIG_KINDS, SWITCHES, checked_field, parse_channel_mult
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
    carried: Description | None = None,
    process: bool = False,
) -> ModelInfo:
    """Find the configuration of the weights with these keys and shapes.

    Args:
        shapes: of the file's tensors.
        file: path of the file; the name of a released file tells apart models of equal shapes.
        options: fields of the configuration or of `DiffusionConfig`, which override every other source;
            published flags of the same meaning are accepted too (see `flags`).
        config: the configuration, if the caller knows it.
        preset_name: name of the released model that the file is, if the caller knows it.
        carried: the description that came with the file.
        process: require the diffusion process too.

    Raises:
        InvalidArgument: for an unknown option or preset, or a value that is not allowed.
        CheckpointError: if the shapes are not those of an ADM network.
        AmbiguousCheckpoint: if options are missing. The message is one line with these options, their allowed
            values, and the nearest released model with its values.
    """
    said = options or {}
    options, claims = flags.translated(said)
    network_options, diffusion_options = _split(options, said)
    candidates = presets_with_fingerprint(fingerprint(shapes))
    known: ModelPreset | None = None
    assumed: list[str] = []
    training: Mapping[str, Any] = {}
    sure = True
    if config is not None and preset_name is not None:
        raise invalid("preset", preset_name, "give a preset or a configuration, not both")
    if config is not None:
        diffusion, source = None, "the configuration given"
    elif preset_name is not None:
        known = preset(preset_name)
        config, diffusion, source = known.config, known.diffusion, f"preset {known.name}"
    elif carried is not None:
        config, diffusion, training = carried.network, carried.diffusion, carried.training
        source = "the description that the file carries"
    elif candidates:
        config, diffusion = candidates[0].config, candidates[0].diffusion
        named = [model for model in candidates if model.name == _stem(file) or len(candidates) == 1]
        known = named[0] if named else None
        if known is not None:
            config, diffusion = known.config, known.diffusion
        sure = known is not None or "dropout" in network_options
        source = "its keys and shapes, which are those of " + _any_of([model.name for model in candidates])
    else:
        with _contradictions_first(shapes, said):
            config, assumed = _from_structure(shapes, file, network_options, diffusion_options, process, said)
        diffusion, source = None, "its keys and shapes, and the options given"
    config = _with_options(config, network_options, shapes, said)
    flags.check(config, claims)
    diffusion = _settings(diffusion, diffusion_options, config)
    if known or not sure:
        assumed += _of_the_preset(config, diffusion, options)
    # Released models of equal shapes differ only in dropout.
    assumed += [] if sure else [f"dropout={config.dropout} (matters in training only)"]
    return ModelInfo(
        Path(file),
        config,
        diffusion,
        known,
        candidates,
        source,
        tuple(assumed),
        training,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        fingerprint=fingerprint(shapes),
    )


def _of_the_preset(
    config: NetConfig, diffusion: DiffusionConfig | None, options: Mapping[str, Any]
) -> list[str]:
    """Return settings that a released model fixes but shapes don't show: the heads and the process."""
    by = "num_heads" if config.num_head_channels == -1 else "num_head_channels"
    said = {by: getattr(config, by), "use_new_attention_order": config.use_new_attention_order}
    if diffusion is not None:
        said |= {"noise_schedule": diffusion.noise_schedule, "steps": diffusion.steps}
    return [f"{name}={value}" for name, value in said.items() if name not in options]


def _given(said: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Return the flag that gives an option, and its value."""
    return next((flag, value) for flag, value in said.items() if flags.name_of(flag) == name)


def _split(options: Mapping[str, Any], said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the network's options (with `kind`) and the diffusion process's; check each value by itself."""
    network, diffusion = {}, {}
    for name, value in options.items():
        if name not in OPTION_NAMES:
            raise invalid("option", name, allowed_names(name, OPTION_NAMES))
        if value is None and name != "num_classes":
            continue
        flag, _ = _given(said, name)
        if name in _DIFFUSION_NAMES:
            diffusion[name] = checked_setting(name, value, flag)
        else:
            network[name] = checked_field(name, value, flag)
    if "kind" in network and network["kind"] not in CONFIG_KINDS:
        raise invalid("kind", network["kind"], allowed_names(str(network["kind"]), CONFIG_KINDS))
    return network, diffusion


def _with_options(
    config: NetConfig, options: Mapping[str, Any], shapes: Shapes, said: Mapping[str, Any]
) -> NetConfig:
    """Return `config` with some fields replaced; reject another kind, whose fields have other meanings."""
    fields = dict(options)
    if fields.pop("kind", config.kind) != config.kind:
        raise invalid("kind", options["kind"], f"the weights are those of a {config.kind}")
    _check_fields(config.kind, fields, said)
    with _contradictions_first(shapes, said):
        return config_from_dict({**config.to_dict(), **fields}) if fields else config


def _check_fields(kind: str, options: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Reject options that only networks of another kind have."""
    known = {field.name for field in dataclasses.fields(CONFIG_KINDS[kind])}
    for name in options:
        if name not in known and name != "kind":
            raise invalid(*_given(said, name), f"not for weights of a {kind}")


def _settings(
    known: DiffusionConfig | None, options: Mapping[str, Any], config: NetConfig
) -> DiffusionConfig | None:
    """Return the process with the options applied, or None if it is unknown and they give no schedule."""
    learned = isinstance(config, UNetConfig) and config.learn_sigma
    settings = known
    if options:
        settings = dataclasses.replace(known or DiffusionConfig(learn_sigma=learned), **options)
    if settings is not None and isinstance(config, UNetConfig) and settings.types[1].learned != learned:
        channels = f"{config.out_channels} channels out for {config.in_channels}-channel images"
        raise invalid("learn_sigma", settings.learn_sigma, f"{learned} for a network with {channels}")
    return settings if known is not None or "noise_schedule" in options else None


def _from_structure(
    shapes: Shapes,
    file: str,
    options: dict[str, Any],
    diffusion_options: dict[str, Any],
    process: bool,
    said: Mapping[str, Any],
) -> tuple[NetConfig, list[str]]:
    """Return the configuration from shapes and `options`, and the assumptions; ask for missing options."""
    try:
        structure = read_structure(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    questions: list[str] = []
    check_whole(shapes, structure, file)
    kind = _kind(structure, options, questions)
    _check_fields(kind, options, said)
    layout = _layout(structure, options, questions, said)
    fields = {**structure.fields, **structure.of_layout(layout)}
    _ask_heads(structure, kind, options, questions)
    if "image_size" not in fields and "image_size" not in options:
        questions.append("image_size (side of the training images in pixels)")
    # If other options are missing, ask for the schedule too.
    if kind != "classifier" and "noise_schedule" not in diffusion_options and (process or questions):
        questions.append(f"noise_schedule ({_any_of(list(NOISE_SCHEDULES))})")
    if questions:
        raise AmbiguousCheckpoint(_question(file, structure, questions, nearest_preset(shapes)), structure)
    fields |= {"kind": kind, "in_channels": structure.kinds[kind]}
    return config_from_dict({**fields, **options}), _assumed(kind, options)


def contradicted(shapes: Shapes, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the shapes contradict, with the values that they show: {"num_channels": 32}."""
    try:
        structure = read_structure(shapes)
    except CheckpointError:
        return {}
    shapes_show = dict(structure.fields)
    kind = said.get("kind", next(iter(structure.kinds)))
    if kind in structure.kinds and (len(structure.kinds) == 1 or "kind" in said):
        shapes_show["in_channels"] = structure.kinds[kind]
    if len(structure.layouts) == 1:
        shapes_show |= structure.of_layout(structure.layouts[0])
    if shapes_show.get("resblock_updown"):
        shapes_show.pop("conv_resample")  # has no effect
    wrong = {}
    for flag, value in said.items():
        name = flags.name_of(flag)
        # Attention may be given as sides or factors (see `flags.check`).
        if name not in shapes_show or name == "attention_resolutions" or value is None:
            continue
        if name == "channel_mult" and isinstance(value, str):
            if not value.strip():
                continue
            value = parse_channel_mult(value, 0)
        if checked_field(name, value, flag) != shapes_show[name]:
            wrong[flag] = shapes_show[name]
    return wrong


@contextlib.contextmanager
def _contradictions_first(shapes: Shapes, said: Mapping[str, Any]) -> Iterator[None]:
    """If the options in the block make no network, report first a flag that the shapes contradict."""
    try:
        yield
    except InvalidArgument as error:
        for flag, has in contradicted(shapes, said).items():
            raise invalid(flag, said[flag], f"the weights have {show_value(has)}") from error
        raise


def check_whole(shapes: Shapes, structure: Structure, file: str) -> None:
    """Reject weights whose keys and shapes fit no possible network: no option can change that."""
    closest: Differences | None = None
    for needs in _readings(structure):
        found = compare(shapes, needs)
        if not found:
            return
        if closest is None or found.count < closest.count:
            closest = found
    if closest is not None:
        blocks = _any_of(sorted({_block(key) for key in closest.missing}), " and ")
        lacks = f" without {blocks}" if blocks else ""
        raise CheckpointError(
            f"{file}: {summary(structure)}, but not a whole one{lacks}: {closest.summary()}"
        )


def in_published_order(shapes: Shapes) -> bool:
    """Tell whether the keys are those of a complete ADM network, in the order of its parameters."""
    try:
        return any(list(shapes) == list(needs) for needs in _readings(read_structure(shapes)))
    except (CheckpointError, InvalidArgument):  # not an ADM network, or impossible widths
        return False


def _readings(structure: Structure) -> Iterator[dict[str, Shape]]:
    """Yield the keys and shapes, in the published order, of each network that fits a structure."""
    for kind, channels in structure.kinds.items():
        for layout in structure.layouts:
            fields = {**structure.fields, **structure.of_layout(layout), "kind": kind}
            fields |= {"in_channels": channels, "num_head_channels": math.gcd(*structure.attended)}
            fields.setdefault("image_size", 2 ** (layout[0] - 1))
            yield network_shapes(config_from_dict(fields))


def _block(key: str) -> str:
    """Return the block that a key belongs to: "output_blocks.3", "middle_block.1", "out"."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0].endswith("_blocks") or parts[0] == "middle_block" else parts[0]


def _kind(structure: Structure, options: Mapping[str, Any], questions: list[str]) -> str:
    """Return the kind of network; ask for it if the channels fit both a UNet and an upsampler."""
    asked = options.get("kind")
    if asked is not None and asked not in structure.kinds:
        raise invalid("kind", asked, f"the weights are those of a {' or '.join(structure.kinds)}")
    if asked is None and len(structure.kinds) > 1:
        questions.append(f"kind ({' or '.join(structure.kinds)})")
    return asked or next(iter(structure.kinds))


def _layout(
    structure: Structure, options: Mapping[str, Any], questions: list[str], said: Mapping[str, Any]
) -> tuple[int, int]:
    """Return (levels, residual blocks per level); ask if a classifier's blocks fit several layouts."""
    fitting = list(structure.layouts)
    for name in ("num_res_blocks", "channel_mult", "image_size"):
        if name in options:
            fitting = [layout for layout in fitting if _agrees(structure, layout, name, options[name])]
        if not fitting:
            allowed = [_layout_text(structure, layout) for layout in structure.layouts]
            raise invalid(*_given(said, name), f"the weights have {' or '.join(allowed)}")
    if len(fitting) > 1:
        questions.append(f"num_res_blocks ({_any_of([str(count) for _, count in fitting])})")
    return fitting[0]


def _agrees(structure: Structure, layout: tuple[int, int], name: str, value: Any) -> bool:
    """Tell whether an option agrees with a layout; of channel_mult only the length is compared."""
    if name == "channel_mult":
        return len(value) == layout[0]
    return structure.of_layout(layout).get(name, value) == value


def _layout_text(structure: Structure, layout: tuple[int, int]) -> str:
    show_value = structure.of_layout(layout)
    size = f", image_size {show_value['image_size']}" if "image_size" in show_value else ""
    return f"num_res_blocks {layout[1]} on {layout[0]} level{'s' if layout[0] > 1 else ''}{size}"


def _ask_heads(structure: Structure, kind: str, options: Mapping[str, Any], questions: list[str]) -> None:
    """Ask for the attention heads and, if there is more than one, for the order of qkv rows."""
    common = math.gcd(*structure.attended)
    channels, heads = options.get("num_head_channels", -1), options.get("num_heads")
    if structure.pool_side is not None:
        if channels == -1:
            questions.append(f"num_head_channels (a divisor of {common})")
    elif channels == -1 and heads is None:
        questions.append(f"num_heads or num_head_channels (a divisor of {common})")
    single = heads == 1 and channels == -1 or channels == structure.attended[-1] == common
    if kind != "classifier" and not single and "use_new_attention_order" not in options:
        questions.append("use_new_attention_order (True or False)")


def _assumed(kind: str, options: Mapping[str, Any]) -> list[str]:
    """Return the settings that are assumed because no option gives them."""
    assumed = []
    if "dropout" not in options:
        assumed.append("dropout=0.0 (matters in training only)")
    if kind == "classifier" and "use_new_attention_order" not in options:
        # The published constructor has no flag for it.
        assumed.append("use_new_attention_order=False (as in every published classifier)")
    return assumed


def _question(
    file: str, structure: Structure, questions: list[str], near: tuple[ModelPreset, Differences] | None
) -> str:
    """Return the error text: the network, the missing options, and the nearest released model's values."""
    text = (
        f"{file}: these are the weights of {summary(structure)}, but keys and shapes don't show everything; "
        f"give {'; '.join(questions)}; or the .json that was written with the file"
    )
    if near is not None:
        model, differences = near
        config = model.config
        answers = {"image_size": config.image_size, "use_new_attention_order": config.use_new_attention_order}
        by = "num_heads" if config.num_head_channels == -1 else "num_head_channels"
        answers[by] = getattr(config, by)
        text += (
            f" (nearest is {model.name}, with {', '.join(f'{k}={v}' for k, v in answers.items())}; "
            f"from it the file differs in {differences.summary(1)})"
        )
    return text


def _stem(file: str) -> str:
    """Return the name of a file without folder and ending."""
    return file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _any_of(names: list[str], last: str = " or ") -> str:
    return ", ".join(names[:-1]) + last + names[-1] if len(names) > 1 else "".join(names)
