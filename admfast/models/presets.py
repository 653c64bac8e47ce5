"""The released networks, the shipped digits networks, and the systems that are made of them: one table each.

Flags, classifier scales and file names are those of the published README (openai/guided-diffusion), and
fingerprints those of `admfast.checkpoints.differences.fingerprint`. Sizes and hashes were not published with
the files: those given here were found in public places, and a comment beside each says where. None means that
none was found.
"""

from __future__ import annotations

from typing import Any

from admfast.diffusion import DiffusionConfig
from admfast.errors import invalid, nearest
from admfast.models.config import (
    ClassifierConfig,
    NetConfig,
    UNetConfig,
    UpsamplerConfig,
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)
from admfast.models.preset_types import Metric, ModelPreset, SystemPreset

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
    """A released UNet by the flags in which it differs from the others."""
    flags = {**_COMMON, **flags}
    return unet_config_from_flags(
        image_size=image_size, num_channels=channels, class_cond=class_cond, **flags
    )


def _upsampler(small_size: int, large_size: int, **flags: Any) -> UpsamplerConfig:
    """A released upsampler by the flags in which it differs from the other."""
    flags = {**_COMMON, **flags}
    return upsampler_config_from_flags(
        large_size=large_size, small_size=small_size, num_channels=192, class_cond=True, **flags
    )


def _classifier(image_size: int, depth: int = 2) -> ClassifierConfig:
    return classifier_config_from_flags(image_size=image_size, classifier_depth=depth)


def _released(name: str, network: NetConfig, parameters: int, fingerprint: str, **more: Any) -> ModelPreset:
    """A row of the table below."""
    if not isinstance(network, ClassifierConfig):
        more = {"process": _LINEAR, "use_fp16": True, **more}
    return ModelPreset(
        name=name,
        file=f"{name}.pt",
        network=network,
        parameters=parameters,
        fingerprint=fingerprint,
        url=f"{RELEASE_URL}{name}.pt",
        **more,
    )


def _shipped(part: str, low_res_size: int | None = None) -> ModelPreset:
    """A digits network; all but its name is in the JSON beside it."""
    file = f"{part}.safetensors"
    return ModelPreset(name=f"digits32_{part}", file=file, low_res_size=low_res_size, source=SHIPPED)


# Keys and shapes that 256x256_diffusion_uncond shares with the four LSUN models: only dropout and name
# differ.
_UNCOND_256 = "77e18ded5689d791c0f80de615de87c7b701e6613a73e6856ce4baeebb4a6524"

_MODELS = (
    _released(
        "64x64_diffusion",
        _unet(
            64, 192, True, num_res_blocks=3, dropout=0.1, num_head_channels=64, use_new_attention_order=True
        ),
        295_904_454,
        "cdbf32c1675c84fb6da4f769818eb4980bc71961a09ee1fd72653565ec04d974",
        process=_COSINE,
    ),
    _released(
        "128x128_diffusion",
        _unet(128, 256, True),  # four heads whatever the width, unlike all others
        421_529_606,
        "c56d52445fdb2112b94cacc66f3e72fb277c6468c0a3907521619b0fc87ef37e",
    ),
    _released(
        "256x256_diffusion",
        _unet(256, 256, True, num_head_channels=64),
        553_838_086,
        "e357403fc997eb00c7f3c70091fdc5286057847a0e1ffc31f6140f1fed305261",
        # Size and MD5: one public downloader's record of the release server's headers; the size leaves the
        # same 224.3 bytes a tensor beside the weights as the next file's. No public SHA-256 was found.
        size=2_215_479_544,
        md5="d94f30fb1afb2fe821c24bef2043717e",
    ),
    _released(
        "256x256_diffusion_uncond",
        _unet(256, 256, False, num_head_channels=64),
        552_814_086,
        _UNCOND_256,
        # SHA-256: public notebooks and several independent records of downloaded files, which agree; size and
        # MD5: the same records and the release server's headers. The hash 983e3de6... that older notebooks
        # list is another model's.
        size=2_211_383_297,
        sha256="a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
        md5="fd9dd2335b8736d521de0aed54bd90ca",
    ),
    _released(
        "512x512_diffusion",
        _unet(512, 256, True, num_head_channels=64),
        558_997_638,
        "ab03f15f765591ce8e1ffca2860c02fea26bbe6e0300e58ff6576c7660d272dd",
        use_fp16=False,
    ),
    *(
        _released(
            name, _unet(256, 256, False, num_head_channels=64, dropout=dropout), 552_814_086, _UNCOND_256
        )
        for name, dropout in (
            ("lsun_bedroom", 0.1),
            ("lsun_cat", 0.1),
            ("lsun_horse", 0.1),
            ("lsun_horse_nodropout", 0.0),
        )
    ),
    _released(
        "64_256_upsampler",
        _upsampler(64, 256),  # four heads whatever the width
        311_795_910,
        "3a8b8bceb82c3f82b22b5dcf81f6e36d85ccad0d36e36f0e3a6243bb7a950f30",
        low_res_size=64,
    ),
    _released(
        "128_512_upsampler",
        _upsampler(128, 512, attention_resolutions="32,16", num_head_channels=64),
        308_835_270,
        "7e722e2f64fce61c3f61d6d062dbf1367c8e8b3d238ec71c62173ec6b8d3e3cd",
        low_res_size=128,
    ),
    _released(
        "64x64_classifier",
        _classifier(64, depth=4),
        65_438_568,
        "0b7fc9917ffd8325f41be9ccb410a7ed19b1b246f2ec700d87120b5ec670ee13",
    ),
    _released(
        "128x128_classifier",
        _classifier(128),
        42_568_040,
        "e717337216e0644859cedb0c4ed35bb9012a2c6ddf6d460c4b99ed3af8c704ef",
    ),
    _released(
        "256x256_classifier",
        _classifier(256),
        54_096_360,
        "bc098f973cf9f8b95ca9251e326846016ea8cd08d65e19bba139551b01721c21",
    ),
    _released(
        "512x512_classifier",
        _classifier(512),
        54_448_360,
        "2a24b6c641814825a5b3bc56d50013e856eb1b459b504910ce9a04fa38a6e35f",
    ),
    _shipped("diffusion"),
    _shipped("classifier"),
    _shipped("upsampler", low_res_size=8),
)
MODELS: dict[str, ModelPreset] = {model.name: model for model in _MODELS}

_TABLE_4 = "Dhariwal & Nichol 2021, table 4"
_TABLE_5 = "Dhariwal & Nichol 2021, table 5"
_TABLE_6 = "Dhariwal & Nichol 2021, table 6"
_GUIDED = "50,000 samples, 250 steps, classifier guidance"
_UPSAMPLED = "50,000 samples, 250 steps of the guided base model and 250 of the upsampler"
_LSUN = "50,000 samples, 1000 steps"


def _lsun(name: str, file: str, metric: Metric, summary: str) -> SystemPreset:
    return SystemPreset(name=name, summary=summary, diffusion=MODELS[file], steps=1000, metric=metric)


_SYSTEMS = (
    SystemPreset(
        name="imagenet64",
        summary="ImageNet 64x64, class-conditional, guided",
        diffusion=MODELS["64x64_diffusion"],
        classifier=MODELS["64x64_classifier"],
        guidance=1.0,
        # Users of the public 64-pixel archives report 2.61: table 5's figure for ADM without dropout.
        metric=Metric(2.07, 0.74, 0.63, _TABLE_5, "50,000 samples, 250 steps, no guidance"),
    ),
    SystemPreset(
        name="imagenet128",
        summary="ImageNet 128x128, class-conditional, guided",
        diffusion=MODELS["128x128_diffusion"],
        classifier=MODELS["128x128_classifier"],
        guidance=0.5,
        metric=Metric(2.97, 0.78, 0.59, _TABLE_5, _GUIDED),
    ),
    SystemPreset(
        name="imagenet256",
        summary="ImageNet 256x256, class-conditional, guided",
        diffusion=MODELS["256x256_diffusion"],
        classifier=MODELS["256x256_classifier"],
        guidance=1.0,
        metric=Metric(4.59, 0.82, 0.52, _TABLE_5, _GUIDED),
    ),
    SystemPreset(
        name="imagenet256-uncond",
        summary="ImageNet 256x256, unconditional model, guided to classes",
        diffusion=MODELS["256x256_diffusion_uncond"],
        classifier=MODELS["256x256_classifier"],
        guidance=10.0,
        metric=Metric(12.00, 0.76, 0.44, _TABLE_4, _GUIDED),
    ),
    SystemPreset(
        name="imagenet512",
        summary="ImageNet 512x512, class-conditional, guided",
        diffusion=MODELS["512x512_diffusion"],
        classifier=MODELS["512x512_classifier"],
        guidance=4.0,
        metric=Metric(7.72, 0.87, 0.42, _TABLE_5, _GUIDED),
    ),
    SystemPreset(
        name="imagenet256-up",
        summary="imagenet64, enlarged to 256x256",
        diffusion=MODELS["64x64_diffusion"],
        classifier=MODELS["64x64_classifier"],
        guidance=1.0,
        upsampler=MODELS["64_256_upsampler"],
        upsampler_steps=250,
        metric=Metric(3.94, 0.83, 0.53, _TABLE_6, _UPSAMPLED),
    ),
    SystemPreset(
        name="imagenet512-up",
        summary="imagenet128, enlarged to 512x512",
        diffusion=MODELS["128x128_diffusion"],
        classifier=MODELS["128x128_classifier"],
        guidance=0.5,
        upsampler=MODELS["128_512_upsampler"],
        upsampler_steps=250,
        metric=Metric(3.85, 0.84, 0.53, _TABLE_6, _UPSAMPLED),
    ),
    _lsun("lsun-bedroom", "lsun_bedroom", Metric(1.90, 0.66, 0.51, _TABLE_5, _LSUN), "LSUN bedrooms 256x256"),
    _lsun("lsun-cat", "lsun_cat", Metric(5.57, 0.63, 0.52, _TABLE_5, _LSUN), "LSUN cats 256x256"),
    _lsun("lsun-horse", "lsun_horse", Metric(2.57, 0.71, 0.55, _TABLE_5, _LSUN), "LSUN horses 256x256"),
    _lsun(
        "lsun-horse-nodropout",
        "lsun_horse_nodropout",
        Metric(2.95, 0.69, 0.55, _TABLE_5, _LSUN),
        "LSUN horses 256x256, trained without dropout",
    ),
    SystemPreset(
        name="digits32",
        summary="handwritten digits 32x32, class-conditional, guided; ships with the package",
        diffusion=MODELS["digits32_diffusion"],
        classifier=MODELS["digits32_classifier"],
        guidance=2.0,
        steps=50,
    ),
    SystemPreset(
        name="digits32-up",
        summary="digits32 brought to 8x8 and enlarged to 32x32 again; ships with the package",
        diffusion=MODELS["digits32_diffusion"],
        classifier=MODELS["digits32_classifier"],
        guidance=2.0,
        steps=50,
        upsampler=MODELS["digits32_upsampler"],
        upsampler_steps=50,
    ),
)
SYSTEMS: dict[str, SystemPreset] = {system.name: system for system in _SYSTEMS}


def preset(name: str) -> ModelPreset:
    """Return the model called `name` ("64x64_diffusion" or "64x64_diffusion.pt"); raises InvalidArgument."""
    found = MODELS.get(name) or MODELS.get(name.removesuffix(".pt"))
    if found is None:
        raise invalid("preset", name, f"no such model; {nearest(name, MODELS)}")
    return found


def system(name: str) -> SystemPreset:
    """Return the system called `name` ("imagenet256"); raises InvalidArgument with the nearest names."""
    if name not in SYSTEMS:
        raise invalid("system", name, f"no such system; {nearest(name, SYSTEMS)}")
    return SYSTEMS[name]


def presets_with_fingerprint(fingerprint: str) -> tuple[ModelPreset, ...]:
    """Return the released models that have these keys and shapes; empty if none has."""
    return tuple(model for model in MODELS.values() if model.fingerprint == fingerprint)
