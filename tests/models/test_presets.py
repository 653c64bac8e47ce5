"""Tests of the released models and systems."""

from __future__ import annotations

import dataclasses
import json

import pytest

from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, InvalidArgument
from admfast.models import ClassifierConfig, UpsamplerConfig, unet_config_from_flags
from admfast.models.description import (
    Description,
    description_from_json,
)
from admfast.models.presets import (
    MODELS,
    RELEASE_URL,
    SYSTEMS,
    preset,
    presets_with_fingerprint,
    system,
)

RELEASED = [model for model in MODELS.values() if not model.shipped]
SMALL = unet_config_from_flags(
    image_size=32,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions="16",
    num_heads=2,
    class_cond=True,
    num_classes=10,
    learn_sigma=True,
)


def test_the_release_has_eleven_diffusion_models_and_four_classifiers():
    kinds = [model.config.kind for model in RELEASED]
    assert (len(kinds), kinds.count("classifier"), kinds.count("upsampler")) == (15, 4, 2)
    assert len({model.file for model in MODELS.values()}) == len(MODELS) == 18
    assert all(model.url == f"{RELEASE_URL}{model.name}.pt" for model in RELEASED)


@pytest.mark.parametrize("model", RELEASED, ids=lambda model: model.name)
def test_a_released_model_is_complete(model):
    assert model.parameters and model.fingerprint and len(model.fingerprint) == 64
    if isinstance(model.config, ClassifierConfig):
        assert model.diffusion is None and not model.use_fp16
        return
    process = model.diffusion
    assert process.learn_sigma is model.config.learn_sigma is True
    assert process.steps == 1000
    assert process.noise_schedule == ("cosine" if model.name == "64x64_diffusion" else "linear")
    assert model.use_fp16 == (model.name != "512x512_diffusion")
    assert (model.low_res_size is not None) == isinstance(model.config, UpsamplerConfig)


def test_hashes_are_given_for_the_files_whose_hashes_are_public():
    for model in RELEASED:
        for digest, digits in ((model.sha256, 64), (model.md5, 32)):
            assert digest is None or (len(digest) == digits and int(digest, 16) > 0)
        if model.size is not None:
            # A file of torch.save has 4 bytes per value, and 100 to 1000 per tensor for names and padding.
            overhead = model.size - 4 * model.parameters
            assert 100 * 500 < overhead < 1000 * 600
    assert {model.name for model in RELEASED if model.sha256} == {"256x256_diffusion_uncond"}
    assert preset("256x256_diffusion_uncond").sha256 != (
        # listed for this model in old notebooks, but it belongs to another one
        "983e3de6f95c88c81b2ca7ebb2c217933be1973b1ff058776b970f901584613a"
    )


def test_models_of_equal_shapes_differ_in_dropout_alone():
    shared = presets_with_fingerprint(preset("lsun_cat").fingerprint)
    names = {model.name for model in shared}
    assert names == {
        "256x256_diffusion_uncond",
        "lsun_bedroom",
        "lsun_cat",
        "lsun_horse",
        "lsun_horse_nodropout",
    }
    assert len({dataclasses.replace(model.config, dropout=0.0) for model in shared}) == 1
    dropouts = {model.name: model.config.dropout for model in shared}
    assert [name for name in sorted(names) if dropouts[name] == 0.1] == [
        "lsun_bedroom",
        "lsun_cat",
        "lsun_horse",
    ]
    others = [model for model in RELEASED if model.name not in names]
    assert len({model.fingerprint for model in others}) == len(others) == 10


# (classifier scale, steps, FID, image size), from the published commands and tables.
PUBLISHED = {
    "imagenet64": (1.0, 250, 2.07, 64),
    "imagenet128": (0.5, 250, 2.97, 128),
    "imagenet256": (1.0, 250, 4.59, 256),
    "imagenet256-uncond": (10.0, 250, 12.00, 256),
    "imagenet512": (4.0, 250, 7.72, 512),
    "imagenet256-up": (1.0, 250, 3.94, 256),
    "imagenet512-up": (0.5, 250, 3.85, 512),
    "lsun-bedroom": (0.0, 1000, 1.90, 256),
    "lsun-cat": (0.0, 1000, 5.57, 256),
    "lsun-horse": (0.0, 1000, 2.57, 256),
    "lsun-horse-nodropout": (0.0, 1000, 2.95, 256),
}


def test_systems_have_the_published_scales_and_results():
    found = {
        name: (s.guidance, s.steps, s.published[0].fid, s.image_size)
        for name, s in SYSTEMS.items()
        if s.published
    }
    assert found == PUBLISHED
    assert set(SYSTEMS) - set(found) == {"digits32", "digits32-up"}


def test_the_published_results_of_imagenet256_are_those_of_table_5():
    published = SYSTEMS["imagenet256"].published
    rows = [(m.fid, m.sfid, m.precision, m.recall, m.inception_score) for m in published]
    assert rows == [
        (4.59, 5.25, 0.82, 0.52, 186.70),
        (10.94, 6.02, 0.69, 0.63, 100.98),
        (5.44, 5.32, 0.81, 0.49, None),
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_of_a_system_fit_together(name):
    s = system(name)
    assert s.channels == 3
    assert s.diffusion.config.image_size == (s.upsampler.low_res_size if s.upsampler else s.image_size)
    assert (s.guidance > 0) == (s.classifier is not None)
    assert (s.upsampler_steps > 0) == (s.upsampler is not None)
    if s.classifier is not None:
        assert s.classifier.config.image_size == s.diffusion.config.image_size
    assert s.num_classes == (None if name.startswith("lsun") else 1000)


def test_digits_refer_to_the_shipped_files():
    for name in ("digits32", "digits32-up"):
        s = system(name)
        assert (s.guidance, s.steps) == (2.0, 50)
        assert [model.shipped_path.name for model in s.models] == [
            "diffusion.safetensors",
            "classifier.safetensors",
            "upsampler.safetensors",
        ][: len(s.models)]
    assert system("digits32-up").upsampler.low_res_size == 8


def test_a_shipped_description_is_read_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.models.preset_types.DIGITS_FOLDER", tmp_path)
    model = dataclasses.replace(preset("digits32_diffusion"))  # a copy that has not read its description yet
    with pytest.raises(CheckpointError, match=r"diffusion\.json: this installation lacks it"):
        _ = model.config
    settings = DiffusionConfig(learn_sigma=True, steps=100)
    (tmp_path / "diffusion.json").write_text(Description(SMALL, settings, {"steps": 7}).to_json())
    assert model.config == SMALL
    assert model.diffusion == settings
    assert model.description.training == {"steps": 7}
    assert model.shipped_path == tmp_path / "diffusion.safetensors"


@pytest.mark.parametrize(
    ("lookup", "name", "said"),
    [
        (preset, "64x64_difusion", "nearest: 64x64_diffusion"),
        (preset, "imagenet", "no such model"),
        (system, "imagenet265", "imagenet256"),
        (system, "64x64_diffusion", "no such system"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(lookup, name, said):
    with pytest.raises(InvalidArgument, match=said) as caught:
        lookup(name)
    assert repr(name) in str(caught.value)


def test_a_file_name_is_a_name():
    assert preset("lsun_cat.pt") is preset("lsun_cat")


def test_a_description_survives_json():
    for described in (
        Description(SMALL, DiffusionConfig(noise_schedule="cosine"), {"images": 1797, "note": ["a", 1]}),
        Description(SMALL, DiffusionConfig(respacing=[0, 500], mean_type="PREVIOUS_X", var_type="LEARNED")),
        Description(preset("512x512_classifier").config),
        Description(preset("128_512_upsampler").config, preset("128_512_upsampler").diffusion),
    ):
        back = description_from_json(described.to_json(), "x.json")
        assert back == described
    assert json.loads(described.to_json())["network"]["kind"] == "upsampler"


def broken(**changes):
    document = json.loads(Description(SMALL, DiffusionConfig()).to_json())
    network = {**document["network"], **changes.pop("network", {})}
    return json.dumps({**document, "network": network, **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a description"),
        ('{"kind": "unet"}', "not a description"),
        (broken(format="admfast-9"), "not a description"),
        (broken(trainig={}), "unknown part 'trainig'; nearest: training"),
        (broken(network={"num_head": 4}), "no such field of a unet; nearest: num_heads"),
        (broken(network={"kind": "gan"}), "kind='gan'"),
        (broken(network={"num_heads": 3}), "num_heads=3"),
        (broken(network={"attention_resolutions": "5"}), "attention_resolutions='5'"),
        (broken(network={"use_new_attention_order": "no"}), "use_new_attention_order='no': True or False"),
        (broken(network={"kind": ["unet"]}), r"kind=\['unet'\]"),
        (broken(diffusion={"learn_sigma": "x"}), "learn_sigma='x': True or False"),
        (broken(diffusion={"steps": 0.5}), "steps=0.5: a whole number"),
        (broken(diffusion={"noise_schedule": "square"}), "noise_schedule='square'"),
        (broken(diffusion=[1]), r"diffusion=\[1\]"),
        (broken(diffusion={"step": 3}), "step=3: .*nearest: steps"),
    ],
)
def test_a_bad_description_is_refused_by_field(text, said):
    with pytest.raises(InvalidArgument, match=said) as caught:
        description_from_json(text, "x.json")
    assert str(caught.value).startswith("x.json: ")


def test_a_system_in_the_place_of_a_model_is_told_its_models():
    with pytest.raises(InvalidArgument, match="^preset=.*64x64_diffusion.*64x64_classifier"):
        preset("imagenet64")
