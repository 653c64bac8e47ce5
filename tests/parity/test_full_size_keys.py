"""Tests of every released model: keys, shapes, order, fingerprints, and the inferred configuration."""

from __future__ import annotations

import hashlib

import pytest
import torch

from admfast.checkpoints import AmbiguousCheckpoint, fingerprint, identify, network_shapes
from admfast.checkpoints.structure import read_structure
from admfast.diffusion import DiffusionConfig
from admfast.models import ClassifierConfig, build
from admfast.models.presets import preset, presets_with_fingerprint
from tests.parity.golden import cases, load_json
from tests.parity.nets import config_of

# Published arguments of the process (not of the network) and our names for them.
PROCESS = {
    "diffusion_steps": "steps",
    "noise_schedule": "noise_schedule",
    "predict_xstart": "predict_xstart",
    "rescale_timesteps": "rescale_timesteps",
    "rescale_learned_sigmas": "rescale_learned_sigmas",
    "use_kl": "use_kl",
}
CASES = [case for case in cases("full_size_keys") if case.id != "index"]
every_model = pytest.mark.parametrize("path", CASES)


def published(path):
    """Return the index entry of a model, and its keys and shapes in the published order."""
    entry = load_json(path.with_name("index.json"))[path.stem]
    return entry, {key: tuple(shape) for key, (shape, _dtype) in load_json(path).items()}


def network_arguments(entry):
    ignored = {*PROCESS, "timestep_respacing"}
    return {name: value for name, value in entry["all_arguments"].items() if name not in ignored}


@every_model
def test_keys_shapes_and_order(path):
    entry, shapes = published(path)
    from_arguments = config_of(entry["constructor"], network_arguments(entry))
    assert preset(path.stem).config == from_arguments
    ours = network_shapes(from_arguments)
    assert list(ours.items()) == list(shapes.items())
    with torch.device("meta"):
        net = build(from_arguments)
    assert [name for name, _ in net.named_parameters()] == list(shapes)
    lines = [f"{key} {list(value.shape)} {value.dtype}" for key, value in net.state_dict().items()]
    digest = hashlib.sha256("\n".join(lines).replace("torch.", "").encode()).hexdigest()
    assert digest == entry["sha256_of_key_shape_dtype_lines"]
    assert sum(p.numel() for p in net.parameters()) == entry["num_params"] == preset(path.stem).parameters
    assert len(lines) == entry["num_tensors"]


@every_model
def test_the_half_precision_recipe_converts_the_same_tensors(path):
    entry, _ = published(path)
    with torch.device("meta"):
        net = build(preset(path.stem).config).convert_torso(torch.float16)
    halves = [p for p in net.parameters() if p.dtype == torch.float16]
    wanted = entry["float16_after_convert_to_fp16"]
    assert (len(halves), sum(p.numel() for p in halves)) == (wanted["num_tensors"], wanted["num_params"])
    uses_half = entry["all_arguments"].get("use_fp16", entry["all_arguments"].get("classifier_use_fp16"))
    assert preset(path.stem).use_fp16 is uses_half


@every_model
def test_the_process(path):
    entry, _ = published(path)
    found = preset(path.stem).diffusion
    if entry["constructor"] == "create_classifier":
        assert found is None
        return
    fields = {ours: entry["all_arguments"][theirs] for theirs, ours in PROCESS.items()}
    assert found == DiffusionConfig(learn_sigma=entry["all_arguments"]["learn_sigma"], **fields)


@every_model
def test_shapes_name_the_model(path):
    _, shapes = published(path)
    assert fingerprint(shapes) == preset(path.stem).fingerprint
    shuffled = dict(sorted(shapes.items(), reverse=True))
    by_name = identify(shuffled, file=f"models/{path.stem}.pt")
    assert by_name.preset is preset(path.stem)
    assert by_name.config == preset(path.stem).config
    assert by_name.diffusion == preset(path.stem).diffusion
    # Settings that keys and shapes don't reveal come from the released model and are listed as assumed.
    said = {"use_new_attention_order"} | (set() if by_name.diffusion is None else {"noise_schedule", "steps"})
    by = "num_heads" if by_name.config.num_head_channels == -1 else "num_head_channels"
    assert {line.partition("=")[0] for line in by_name.assumed} == {by, *said}
    renamed = identify(shuffled, file="renamed.pt")
    assert path.stem in [model.name for model in renamed.candidates]
    if len(renamed.candidates) == 1:
        assert renamed.preset is preset(path.stem)
    else:
        assert len(renamed.candidates) == 5 and renamed.preset is None
        assert renamed.assumed == (*by_name.assumed, "dropout=0.0 (matters in training only)")


@every_model
def test_shapes_alone_show_all_but_what_they_cant(path, monkeypatch):
    """Without fingerprints, shapes and the few options that they don't reveal give the configuration."""
    _, shapes = published(path)
    monkeypatch.setattr("admfast.checkpoints.infer.presets_with_fingerprint", lambda _: ())
    config = preset(path.stem).config
    hidden = {"num_heads": config.num_heads, "num_head_channels": config.num_head_channels}
    hidden |= {"dropout": config.dropout}
    if not isinstance(config, ClassifierConfig):
        hidden |= {"use_new_attention_order": config.use_new_attention_order, "image_size": config.image_size}
    if config.kind == "upsampler":
        hidden["kind"] = "upsampler"
    assert identify(shapes, file="x.pt", options=hidden).config == config
    with pytest.raises(AmbiguousCheckpoint) as caught:
        identify(shapes, file="x.pt")
    asked = str(caught.value)
    same = presets_with_fingerprint(preset(path.stem).fingerprint)
    assert f"(the nearest released model is {same[0].name}, with " in asked
    for option in ("image_size (", "use_new_attention_order (", "num_head"):
        assert (option in asked) == (option == "num_head" or not isinstance(config, ClassifierConfig))
    assert ("kind (unet or upsampler)" in asked) == (config.kind == "upsampler")
    assert read_structure(shapes).layouts == ((len(config.channel_mult), config.num_res_blocks),)
