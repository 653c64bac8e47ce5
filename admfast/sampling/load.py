"""Load a pipeline: a system by name, or a model from its weights files."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from admfast.checkpoints import AmbiguousCheckpoint, ModelInfo, flags_to_options, load_network
from admfast.checkpoints.infer import OPTION_NAMES
from admfast.checkpoints.reading import RUN_FOLDER_HINT, WEIGHTS_SUFFIXES, WeightsSource, missing_path_hint
from admfast.checks import boolean, whole_number
from admfast.diffusion import DiffusionConfig
from admfast.engine.numerics import fixed_numerics
from admfast.engine.options import EngineOptions
from admfast.engine.precision import Policy, policy
from admfast.errors import CheckpointError, allowed_names, invalid
from admfast.files.paths import user_path
from admfast.host import resolve_device
from admfast.models import Classifier, UNet, Upsampler, UpsamplerConfig
from admfast.models.presets import MODELS, SYSTEMS, ModelPreset, SystemPreset
from admfast.sampling.pipeline import Pipeline

Network = UNet | Classifier
# Options of a pipeline, not of its network: of an upsampler's, and of any other.
LOW_RES_SIZE, NULL_CLASS = "low_res_size", "null_class"


def load(
    name: WeightsSource,
    weights: str | PathLike[str] | None = None,
    *,
    classifier: WeightsSource | None = None,
    upsampler: WeightsSource | None = None,
    weak: WeightsSource | None = None,
    preset: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    compile: bool = False,
    compile_cache: str | PathLike[str] | None = None,
    keep_master: bool = True,
    engine: EngineOptions | None = None,
    classifier_options: Mapping[str, Any] | None = None,
    upsampler_options: Mapping[str, Any] | None = None,
    weak_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """Load a system by name, or a model by its weights file, ready to sample.

    Args:
        name: a system (`admfast models` lists them: "imagenet256", "digits32", ...), or a diffusion model's
            weights: the path of a file, the name of a model that ships ("digits32_diffusion"), a file open
            for reading bytes, a state dict, or a module. Weights in memory are copied.
        weights: folder that holds the released files of a system; not for systems that ship with the package.
        classifier, upsampler: weights of a classifier, and of an upsampler that enlarges the samples, given
            like `name`; only for a model that is not a system.
        weak: weights of a smaller or less trained network, for `guides.by_weak_network`.
        preset: for a file, the name of the released model that it holds ("256x256_diffusion").
        device: "cpu", "cuda", "cuda:1", ...; None takes the GPU if there is one. A CPU computes on torch's
            threads (`torch.set_num_threads`), at most one per processor that the process may use, and fewer
            for a small step (`admfast.engine.threads`).
        precision: precision of the networks' torso: "fp32", "tf32" (GPU), "bf16", "fp16", "int8" (CPU).
            "auto" is bf16 on a GPU and on a CPU with AMX, else fp32. "int8" has 8-bit 3x3
            convolutions, the rest is bf16 with AMX, else fp32: check your model with
            `admfast verify --precision int8`. Norms, softmax, embeddings, the last layer and the update are
            always in float32.
        compile: use torch.compile for the step; the first image of a shape then takes minutes.
        compile_cache: with `compile`, the folder in which torch keeps compiled code, so that another process
            starts faster. It holds code that is run: use only a folder that you trust.
        keep_master: keep the float32 parameters in addition to the half-precision weights derived from them.
            If False, the parameters themselves are rounded, which saves memory.
        engine: how steps are prepared (`EngineOptions`); None takes the defaults.
        options: for weights, settings that they don't show (num_heads, noise_schedule, image_size, ...), and
            `entry`, the state dict to use ("ema", "model") of a file that holds several; the default is the
            average of the weights over training, if there is one. For an upsampler also `low_res_size`, the
            side of the images that it was trained to enlarge. `null_class=True` says that the last class
            stands for "no class" (for `guides.by_null_class`); a file of `admfast train` says so itself.
        classifier_options, upsampler_options, weak_options: the same for these files. In a cascade, base
            images that are larger than the upsampler's `low_res_size` are downsampled for it.

    Returns:
        A `Pipeline` whose networks are frozen.

    Raises:
        InvalidArgument: for an unknown system, device, precision or option.
        CheckpointError: for a file that is missing, damaged, unsafe or of another network.
        Unavailable: for a CUDA device that this machine lacks.
    """
    system = find_system("name", name)
    _check_option_names(options)
    flags_to_options.reject_flags_given_elsewhere(options)
    option_sets = {"classifier_options": classifier_options, "upsampler_options": upsampler_options}
    for argument, value in (option_sets | {"weak_options": weak_options}).items():
        if not isinstance(value, Mapping | None):
            raise invalid(argument, value, "options by name, or None")
    if weak_options and weak is None:
        raise invalid("weak_options", weak_options, "there is no weak")
    weak_part = _WeightsFile("weak", weak, {**(weak_options or {})})
    of_files = {**option_sets, "classifier": classifier, "upsampler": upsampler, "preset": preset}
    fixed_arguments = {name: value for name, value in of_files.items() if value not in (None, {})} | options
    classifier_flags = {flag: options.pop(flag) for flag in [*options] if flag.startswith("classifier_")}
    target_device = resolve_device(device)
    engine_options = _engine_options(engine, boolean("compile", compile), compile_cache)
    network_policy = policy(precision, target_device)
    settings = _NetworkSettings(network_policy, engine_options, boolean("keep_master", keep_master))
    with fixed_numerics(target_device):
        if system is not None:
            reject_fixed_by_system(system, fixed_arguments)
            return _load_system(system, weights, weak_part, target_device, settings)
        name = resolve_weights_source("name", name, weights)
        for flag, value in classifier_flags.items() if classifier is None else ():
            raise invalid(flag, value, "there is no classifier")
        parts = [
            _WeightsFile("name", name, {**options, "preset": preset}),
            _WeightsFile("classifier", classifier, {**(classifier_options or {}), **classifier_flags}),
            _WeightsFile("upsampler", upsampler, {**(upsampler_options or {})}),
            weak_part,
        ]
        return _load_files(parts, target_device, settings)


def find_system(argument: str, source: WeightsSource) -> SystemPreset | None:
    """Return the system that a source names; None for a path or weights in memory. Raises InvalidArgument."""
    if isinstance(source, Mapping | nn.Module) or hasattr(source, "read"):
        return None
    if not (isinstance(source, str | PathLike) and str(source)):
        allowed = "a system (such as 'digits32') or the path of a weights file, or weights in memory"
        raise invalid(argument, source, allowed)
    return SYSTEMS.get(str(source))


def reject_fixed_by_system(system: SystemPreset, fixed_arguments: Mapping[str, Any]) -> None:
    """Reject arguments whose values a system fixes."""
    for argument, value in fixed_arguments.items():
        value_text = str(value) if isinstance(value, PathLike) else value
        raise invalid(argument, value_text, f"not for a system: {system.name} fixes it")


def resolve_weights_source(
    argument: str, source: WeightsSource, weights: str | PathLike[str] | None
) -> WeightsSource:
    """Return a source that is no system, text as a path; reject unknown names, and `weights` for files."""
    if isinstance(source, str | PathLike):
        source = _resolve_path(argument, source)
        if not os.path.lexists(source) and source.suffix not in WEIGHTS_SUFFIXES:
            path_hint = f"a path must name a weights file or {RUN_FOLDER_HINT}{missing_path_hint(source)}"
            raise invalid(
                argument,
                str(source),
                f"neither a system nor a file; {allowed_names(source, SYSTEMS)}; {path_hint}",
            )
    if weights is not None:
        allowed = f"for a system, as the folder of its files; {_source_name(source)} is a file"
        raise invalid("weights", _source_name(weights), allowed)
    return source


def _resolve_path(argument: str, source: str | PathLike[str]) -> Path:
    """Return a path; for the name of a model that ships with the package, that of its file."""
    path = user_path(argument, source)
    model = None if os.path.lexists(path) else MODELS.get(str(source))
    return path if model is None or model.shipped_path is None else model.shipped_path


@dataclass(frozen=True)
class _NetworkSettings:
    """Settings for running networks: precision, engine options, whether float32 parameters are kept."""

    policy: Policy
    options: EngineOptions
    keep_master: bool = True

    def network(self, net: Network, dtype: torch.dtype) -> nn.Module:
        """Return the network; its parameters are rounded to `dtype` unless a float32 master is kept."""
        if not self.keep_master and dtype != torch.float32:
            net.convert_torso(dtype)
        return net

    def pipeline(self, name: str, net: Network, process: DiffusionConfig, **other_arguments: Any) -> Pipeline:
        """Return the pipeline of a network."""
        network = self.network(net, self.policy.torso)
        return Pipeline(name, network, process, policy=self.policy, options=self.options, **other_arguments)

    def guiding_networks(self, classifier: Network | None, weak: Network | None) -> dict[str, Any]:
        """Return the classifier and the weak network, each as `network` does, or None."""
        dtypes = {"classifier": (classifier, self.policy.classifier), "weak": (weak, self.policy.torso)}
        return {
            name: None if net is None else self.network(net, dtype) for name, (net, dtype) in dtypes.items()
        }


@dataclass
class _WeightsFile:
    """Weights and their options, with the argument of `load` that named them."""

    argument: str
    source: WeightsSource | None
    options: dict[str, Any]


def _source_name(source: WeightsSource) -> object:
    """Return the name of weights in errors: the path, or the type of weights in memory."""
    return str(source) if isinstance(source, str | PathLike) else type(source).__name__


# Where missing options of a file can be given; part of the error that names them.
_OPTION_PLACES = {
    "name": "options of load, or --set on the command line",
    "classifier": "classifier_options of load, or --set-classifier on the command line",
    "upsampler": "upsampler_options of load, or --set-upsampler on the command line",
    "weak": "weak_options of load, or --set-weak on the command line",
}
_NETWORK_KINDS = {"name": (UNet, "a diffusion model"), "classifier": (Classifier, "a classifier")}
_NETWORK_KINDS |= {"upsampler": (Upsampler, "an upsampler"), "weak": (UNet, "a diffusion model")}


def _engine_options(
    engine: EngineOptions | None, compile: bool, cache: str | PathLike[str] | None
) -> EngineOptions:
    """Return the engine options, with the arguments `compile` and `compile_cache` of `load` added."""
    if engine is not None and not isinstance(engine, EngineOptions):
        raise invalid("engine", engine, "EngineOptions, or None")
    options = engine or EngineOptions()
    cache = options.compile_cache if cache is None else user_path("compile_cache", cache)
    return replace(options, compile=compile or options.compile, compile_cache=cache)


def _load_files(parts: list[_WeightsFile], device: torch.device, settings: _NetworkSettings) -> Pipeline:
    """Return the pipeline of files; one error names all the options that are missing."""
    low_res_sizes = {part.argument: part.options.pop(LOW_RES_SIZE, None) for part in parts}
    has_null_class = parts[0].options.pop(NULL_CLASS, None)
    for part in parts[1:]:
        argument = f"{part.argument}_options"
        if part.source is None and part.options:
            raise invalid(argument, part.options, f"there is no {part.argument}")
        for name in part.options:
            if name not in OPTION_NAMES and name not in flags_to_options.FLAG_NAMES:
                raise invalid(
                    argument, name, f"no such option of a file; {allowed_names(name, OPTION_NAMES)}"
                )
    loaded: dict[str, tuple[Network, ModelInfo]] = {}
    questions = []
    for part in parts:
        if part.source is None:
            continue
        try:
            loaded[part.argument] = _load_part(part, device)
        except AmbiguousCheckpoint as question:
            questions.append(f"{question} [{_OPTION_PLACES[part.argument]}]")
    if questions:
        raise CheckpointError("; and ".join(questions))
    net, info = loaded["name"]
    (classifier, _), (up, up_info), (weak, _) = (
        loaded.get(name, (None, None)) for name in ("classifier", "upsampler", "weak")
    )
    upsampler = None
    if up is not None and up_info is not None:
        process = require_process(up_info.path, up_info.diffusion)
        low_res_size = resolve_low_res_size(up_info, low_res_sizes["upsampler"])
        defaults = {"steps": min(250, process.steps), LOW_RES_SIZE: low_res_size}
        upsampler = settings.pipeline(up_info.path.stem, up, process, **defaults)
    process = require_process(info.path, info.diffusion)
    if "weak" in loaded:
        _check_weak_process(process, loaded["weak"][1])
    low_res_size = resolve_low_res_size(info, low_res_sizes["name"])
    defaults = {"steps": min(250, process.steps), LOW_RES_SIZE: low_res_size}
    guidance = 1.0 if classifier is not None else 0.0
    null_class = bool(dict(info.training.get("recipe") or {}).get("drop_classes"))
    if has_null_class is not None:
        null_class = boolean(NULL_CLASS, has_null_class)
    return settings.pipeline(
        info.path.stem,
        net,
        process,
        **settings.guiding_networks(classifier, weak),
        guidance=guidance,
        upsampler=upsampler,
        null_class=null_class,
        **defaults,
    )


def _check_weak_process(process: DiffusionConfig, info: ModelInfo) -> None:
    """Reject a weak network that was trained for another process, or to predict something else."""
    if info.diffusion is None:
        return
    weak_process = info.diffusion
    if weak_process.types[0] != process.types[0]:
        allowed = f"a network that predicts {process.types[0].name}, as the first one does"
        raise invalid("weak", f"predicts {weak_process.types[0].name}", allowed)
    for name in ("noise_schedule", "steps", "rescale_timesteps"):
        actual, needed = getattr(weak_process, name), getattr(process, name)
        if actual != needed:
            raise invalid("weak", f"{name}={actual}", f"the first network's process, with {name}={needed}")


def resolve_low_res_size(info: ModelInfo, low_res_size: Any) -> int | None:
    """Return the side of the images that an upsampler was trained to enlarge, or None if unknown.

    low_res_size: the option; None takes the side that the file records.
    """
    if low_res_size is None:
        return info.low_res_size
    if not isinstance(info.config, UpsamplerConfig):
        raise invalid(LOW_RES_SIZE, low_res_size, f"for an upsampler; {info.path} holds a {info.config.kind}")
    return whole_number(LOW_RES_SIZE, low_res_size, 1)


def _load_part(part: _WeightsFile, device: torch.device) -> tuple[Network, ModelInfo]:
    """Return the network of one file; reject one of another kind than its argument asks for."""
    assert part.source is not None
    source = part.source
    if isinstance(source, str | PathLike):
        source = _resolve_path(part.argument, source)
    process = part.argument != "classifier"
    net, info = load_network(source, device=device, require_process=process, **part.options)
    network_type, description = _NETWORK_KINDS[part.argument]
    if not isinstance(net, network_type):
        raise invalid(
            part.argument, _source_name(source), f"{description}; this file holds a {info.config.kind}"
        )
    return net, info  # type: ignore[return-value]


def require_process(source: Path | str, process: DiffusionConfig | None) -> DiffusionConfig:
    """Return the diffusion process of a file. Raises CheckpointError if it is not known."""
    if process is None:
        raise CheckpointError(f"{source}: its process is not known; give noise_schedule (linear or cosine)")
    return process


def _check_option_names(options: Mapping[str, Any]) -> None:
    """Reject a keyword that is neither an argument of `load` nor an option of a file."""
    pipeline_options = (LOW_RES_SIZE, NULL_CLASS)
    known_names = [*list(inspect.signature(load).parameters)[:-1], *OPTION_NAMES, *pipeline_options]
    for name, value in options.items():
        if name not in (*OPTION_NAMES, *pipeline_options) and name not in flags_to_options.FLAG_NAMES:
            raise invalid(name, value, f"no such argument or option; {allowed_names(name, known_names)}")


def _load_system(
    system: SystemPreset,
    weights: str | PathLike[str] | None,
    weak_part: _WeightsFile,
    device: torch.device,
    settings: _NetworkSettings,
) -> Pipeline:
    """Load every model of a system; check that all files exist before the first is read."""
    weak = None
    if weak_part.source is not None:
        weak, weak_info = _load_part(weak_part, device)
        diffusion = system.diffusion
        _check_weak_process(require_process(diffusion.name, diffusion.diffusion), weak_info)
    paths = {model.name: model_file(system, model, weights) for model in system.models}

    def network(model: ModelPreset) -> Network:
        net, _ = load_network(paths[model.name], preset=model.released_name, device=device)
        assert isinstance(net, Network)
        return net

    upsampler = None
    if (up := system.upsampler) is not None:
        process, defaults = require_process(up.name, up.diffusion), {"steps": system.upsampler_steps}
        upsampler = settings.pipeline(up.name, network(up), process, low_res_size=up.low_res_size, **defaults)
    return settings.pipeline(
        system.name,
        network(system.diffusion),
        require_process(system.diffusion.name, system.diffusion.diffusion),
        **settings.guiding_networks(None if system.classifier is None else network(system.classifier), weak),
        guidance=system.guidance,
        steps=system.steps,
        upsampler=upsampler,
    )


def model_file(system: SystemPreset, model: ModelPreset, weights: str | PathLike[str] | None) -> Path:
    """Return the path of a model's file. Raises CheckpointError (it says how to get it), InvalidArgument."""
    if weights is not None and all(part.shipped for part in system.models):
        raise invalid(
            "weights", _source_name(weights), f"not for {system.name}, which ships with the package"
        )
    if model.shipped_path is not None:
        return model.shipped_path
    if weights is None:
        files = ", ".join(part.file for part in system.models if not part.shipped)
        raise invalid(
            "weights", None, f"the folder that holds {files} (admfast fetch {system.name} --out models)"
        )
    folder = user_path("weights", weights)
    if not folder.is_dir():
        raise invalid("weights", str(weights), f"not a folder (admfast fetch {system.name} --out {folder})")
    for ending in (".pt", ".safetensors"):
        path = (folder / model.file).with_suffix(ending)
        if path.exists():
            return path
    raise CheckpointError(
        f"{folder / model.file}: no such file; {system.name} needs it "
        f"(admfast fetch {model.name} --out {folder})"
    )
