"""Tables of the released and the shipped networks (`MODELS`), and of the systems made of them (`SYSTEMS`).

Flags, classifier scales and file names are those of the published README (openai/guided-diffusion), and
fingerprints those of `admfast.checkpoints.differences.fingerprint`. Sizes and hashes were not published with
the files. Those given here were found in public places, which comments name. None means that none was found.
"""

from __future__ import annotations

from typing import Any

from admfast.diffusion import DiffusionConfig
from admfast.errors import allowed_names, invalid
from admfast.models.config import (
    ClassifierConfig,
    NetConfig,
    UNetConfig,
    UpsamplerConfig,
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)
from admfast.models.preset_types import ModelPreset, SystemPreset
from admfast.models.published import PUBLISHED

RELEASE_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
SHIPPED = "trained for this package on the handwritten digits of scikit-learn (UCI, 1998)"

_COMMON: dict[str, Any] = {
    "num_heads": 4,
    "num_res_blocks": 2,
    "attention_resolutions": "32,16,8",
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
_LINEAR = DiffusionConfig(noise_schedule="linear", steps=1000, learn_sigma=True)
_COSINE = DiffusionConfig(noise_schedule="cosine", steps=1000, learn_sigma=True)


def _unet(image_size: int, channels: int, class_cond: bool, **flags: Any) -> UNetConfig:
    """Return the configuration of a released UNet; `flags` are those that differ from `_COMMON`."""
    flags = {**_COMMON, **flags}
    return unet_config_from_flags(
        image_size=image_size, num_channels=channels, class_cond=class_cond, **flags
    )


def _upsampler(small_size: int, large_size: int, **flags: Any) -> UpsamplerConfig:
    """Return the configuration of a released upsampler; `flags` are those that differ from `_COMMON`."""
    flags = {**_COMMON, **flags}
    return upsampler_config_from_flags(
        large_size=large_size, small_size=small_size, num_channels=192, class_cond=True, **flags
    )


def _classifier(image_size: int, depth: int = 2) -> ClassifierConfig:
    return classifier_config_from_flags(image_size=image_size, classifier_depth=depth)


def _released_model(name: str, network: NetConfig, parameters: int, **overrides: Any) -> ModelPreset:
    """Return a released model's row of the table below."""
    if not isinstance(network, ClassifierConfig):
        overrides = {"process": _LINEAR, "use_fp16": True, **overrides}
    return ModelPreset(
        name=name,
        file=f"{name}.pt",
        network=network,
        parameters=parameters,
        fingerprint=_FINGERPRINTS.get(name, _UNCOND_256),
        url=f"{RELEASE_URL}{name}.pt",
        **overrides,
    )


def _shipped_model(part: str, low_res_size: int | None = None) -> ModelPreset:
    """Return a digits network's row of the table below; its JSON file holds the rest."""
    file = f"{part}.safetensors"
    return ModelPreset(name=f"digits32_{part}", file=file, low_res_size=low_res_size, source=SHIPPED)


# 256x256_diffusion_uncond and the four LSUN models have the same keys and shapes; they differ only in name
# and dropout.
_UNCOND_256 = "77e18ded5689d791c0f80de615de87c7b701e6613a73e6856ce4baeebb4a6524"

_FINGERPRINTS = {
    "64x64_diffusion": "cdbf32c1675c84fb6da4f769818eb4980bc71961a09ee1fd72653565ec04d974",
    "128x128_diffusion": "c56d52445fdb2112b94cacc66f3e72fb277c6468c0a3907521619b0fc87ef37e",
    "256x256_diffusion": "e357403fc997eb00c7f3c70091fdc5286057847a0e1ffc31f6140f1fed305261",
    "512x512_diffusion": "ab03f15f765591ce8e1ffca2860c02fea26bbe6e0300e58ff6576c7660d272dd",
    "64_256_upsampler": "3a8b8bceb82c3f82b22b5dcf81f6e36d85ccad0d36e36f0e3a6243bb7a950f30",
    "128_512_upsampler": "7e722e2f64fce61c3f61d6d062dbf1367c8e8b3d238ec71c62173ec6b8d3e3cd",
    "64x64_classifier": "0b7fc9917ffd8325f41be9ccb410a7ed19b1b246f2ec700d87120b5ec670ee13",
    "128x128_classifier": "e717337216e0644859cedb0c4ed35bb9012a2c6ddf6d460c4b99ed3af8c704ef",
    "256x256_classifier": "bc098f973cf9f8b95ca9251e326846016ea8cd08d65e19bba139551b01721c21",
    "512x512_classifier": "2a24b6c641814825a5b3bc56d50013e856eb1b459b504910ce9a04fa38a6e35f",
}

_HEADS_OF_64 = {"num_head_channels": 64}
_IN_64 = {**_HEADS_OF_64, "num_res_blocks": 3, "dropout": 0.1, "use_new_attention_order": True}
_LSUN_DROPOUT = {"lsun_bedroom": 0.1, "lsun_cat": 0.1, "lsun_horse": 0.1, "lsun_horse_nodropout": 0.0}

_MODELS = (
    _released_model("64x64_diffusion", _unet(64, 192, True, **_IN_64), 295_904_454, process=_COSINE),
    # Four heads at every width; of the other models, only the first upsampler has this too.
    _released_model("128x128_diffusion", _unet(128, 256, True), 421_529_606),
    _released_model(
        "256x256_diffusion",
        _unet(256, 256, True, **_HEADS_OF_64),
        553_838_086,
        # Size and MD5: from one public downloader's record of the release server's headers. The size is
        # plausible: without the weights, it leaves 224.3 bytes per tensor, as the next file's size does. No
        # public SHA-256 was found.
        size=2_215_479_544,
        md5="d94f30fb1afb2fe821c24bef2043717e",
    ),
    _released_model(
        "256x256_diffusion_uncond",
        _unet(256, 256, False, **_HEADS_OF_64),
        552_814_086,
        # SHA-256: from public notebooks and several independent records of downloaded files, which agree.
        # Size and MD5: from the same records and the release server's headers. Older notebooks list the hash
        # 983e3de6..., which belongs to another model.
        size=2_211_383_297,
        sha256="a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
        md5="fd9dd2335b8736d521de0aed54bd90ca",
    ),
    _released_model("512x512_diffusion", _unet(512, 256, True, **_HEADS_OF_64), 558_997_638, use_fp16=False),
    *(
        _released_model(name, _unet(256, 256, False, **_HEADS_OF_64, dropout=dropout), 552_814_086)
        for name, dropout in _LSUN_DROPOUT.items()
    ),
    _released_model("64_256_upsampler", _upsampler(64, 256), 311_795_910, low_res_size=64),
    _released_model(
        "128_512_upsampler",
        _upsampler(128, 512, **_HEADS_OF_64, attention_resolutions="32,16"),
        308_835_270,
        low_res_size=128,
    ),
    _released_model("64x64_classifier", _classifier(64, depth=4), 65_438_568),
    _released_model("128x128_classifier", _classifier(128), 42_568_040),
    _released_model("256x256_classifier", _classifier(256), 54_096_360),
    _released_model("512x512_classifier", _classifier(512), 54_448_360),
    _shipped_model("diffusion"),
    _shipped_model("classifier"),
    _shipped_model("upsampler", low_res_size=8),
)
MODELS: dict[str, ModelPreset] = {model.name: model for model in _MODELS}


def _system(name: str, summary: str, base: str, classifier: str = "", **overrides: Any) -> SystemPreset:
    """Return a row of the table below; models are given by name."""
    if "upsampler" in overrides:
        overrides["upsampler"] = MODELS[overrides["upsampler"]]
    guide_ = MODELS[classifier] if classifier else None
    return SystemPreset(
        name=name, summary=summary, diffusion=MODELS[base], classifier=guide_,
        published=PUBLISHED.get(name, ()), **overrides,
    )  # fmt: skip


_BASE_64: dict[str, Any] = dict(base="64x64_diffusion", classifier="64x64_classifier", guidance=1.0)
_BASE_128: dict[str, Any] = dict(base="128x128_diffusion", classifier="128x128_classifier", guidance=0.5)
_DIGITS: dict[str, Any] = dict(
    base="digits32_diffusion", classifier="digits32_classifier", guidance=2.0, steps=50
)
_TO_256: dict[str, Any] = dict(upsampler="64_256_upsampler", upsampler_steps=250)
_TO_512: dict[str, Any] = dict(upsampler="128_512_upsampler", upsampler_steps=250)

# fmt: off
_SYSTEMS = (
    _system("imagenet64", "ImageNet 64x64, class-conditional, guided", **_BASE_64),
    _system("imagenet128", "ImageNet 128x128, class-conditional, guided", **_BASE_128),
    _system("imagenet256", "ImageNet 256x256, class-conditional, guided",
            "256x256_diffusion", "256x256_classifier", guidance=1.0),
    _system("imagenet256-uncond", "ImageNet 256x256, unconditional model, guided to classes",
            "256x256_diffusion_uncond", "256x256_classifier", guidance=10.0),
    _system("imagenet512", "ImageNet 512x512, class-conditional, guided",
            "512x512_diffusion", "512x512_classifier", guidance=4.0),
    _system("imagenet256-up", "imagenet64, enlarged to 256x256", **_BASE_64, **_TO_256),
    _system("imagenet512-up", "imagenet128, enlarged to 512x512", **_BASE_128, **_TO_512),
    _system("lsun-bedroom", "LSUN bedrooms 256x256", "lsun_bedroom", steps=1000),
    _system("lsun-cat", "LSUN cats 256x256", "lsun_cat", steps=1000),
    _system("lsun-horse", "LSUN horses 256x256", "lsun_horse", steps=1000),
    _system("lsun-horse-nodropout", "LSUN horses 256x256, trained without dropout",
            "lsun_horse_nodropout", steps=1000),
    _system("digits32", "handwritten digits 32x32, class-conditional, guided; ships with the package",
            **_DIGITS),
    _system("digits32-up", "digits32 reduced to 8x8 and enlarged to 32x32 again; ships with the package",
            **_DIGITS, upsampler="digits32_upsampler", upsampler_steps=50),
)
# fmt: on
SYSTEMS: dict[str, SystemPreset] = {system.name: system for system in _SYSTEMS}


def preset(name: str) -> ModelPreset:
    """Return the model called `name` ("64x64_diffusion" or "64x64_diffusion.pt"); raises InvalidArgument."""
    model = None
    if isinstance(name, str):
        model = MODELS.get(name) or MODELS.get(name.removesuffix(".pt"))
    if model is None:
        if isinstance(name, str) and name in SYSTEMS:
            models = ", ".join(model.name for model in SYSTEMS[name].models)
            raise invalid("preset", name, f"a model; this is a system, which is made of {models}")
        raise invalid("preset", name, f"no such model; {allowed_names(name, MODELS)}")
    return model


def system(name: str) -> SystemPreset:
    """Return the system called `name` ("imagenet256"); raises InvalidArgument with the nearest names."""
    if name not in SYSTEMS:
        raise invalid("system", name, f"no such system; {allowed_names(name, SYSTEMS)}")
    return SYSTEMS[name]


def presets_with_fingerprint(fingerprint: str) -> tuple[ModelPreset, ...]:
    """Return the released models with this fingerprint of keys and shapes; empty if there are none."""
    return tuple(model for model in MODELS.values() if model.fingerprint == fingerprint)
