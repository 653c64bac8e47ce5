"""Records of the tables in `presets.py`: a weights file, a system of models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError
from admfast.models.config import NetConfig, UNetConfig
from admfast.models.description import Description, description_from_json
from admfast.models.published import Metric

RELEASE = "openai/guided-diffusion, released July 2021"
DIGITS_FOLDER = Path(__file__).resolve().parent.parent / "data" / "digits32"


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A released or shipped weights file.

    Attributes:
        name, file: such as "64x64_diffusion" and "64x64_diffusion.pt".
        network: its configuration; None for a shipped file, whose JSON is read when `config` is first used.
        process: its diffusion process; None for classifiers, which use that of the model they guide, and for
            shipped files.
        use_fp16: whether the published recipe runs the torso in half precision.
        low_res_size: side in pixels of the image that an upsampler was trained to enlarge.
        parameters: number of parameters; None for a shipped file.
        fingerprint: hash of its keys and shapes, which files can share; None for a shipped file.
        url: address of the published file; None for a shipped file.
        size, sha256, md5: of the published file, in bytes and hexadecimal; None if unknown.
        source: who trained it.
    """

    name: str
    file: str
    network: NetConfig | None = None
    process: DiffusionConfig | None = None
    use_fp16: bool = False
    low_res_size: int | None = None
    parameters: int | None = None
    fingerprint: str | None = None
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    source: str = RELEASE

    @property
    def shipped(self) -> bool:
        """Tell whether the file comes with the package."""
        return self.url is None

    @property
    def released_name(self) -> str | None:
        """Name of a released file; None for a shipped file, which its JSON describes."""
        return None if self.shipped else self.name

    @property
    def shipped_path(self) -> Path | None:
        """Path of a shipped file; None for a released file."""
        return DIGITS_FOLDER / self.file if self.shipped else None

    @cached_property
    def description(self) -> Description:
        """Configuration, process, training facts; raises CheckpointError if a shipped JSON is missing."""
        if self.network is not None:
            return Description(self.network, self.process)
        path = (DIGITS_FOLDER / self.file).with_suffix(".json")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: this installation lacks it ({error.strerror})") from None
        return description_from_json(text, str(path))

    @property
    def config(self) -> NetConfig:
        """The network's configuration; raises the errors of `description`."""
        return self.description.network

    @property
    def diffusion(self) -> DiffusionConfig | None:
        """The diffusion process; None for a classifier. Raises the errors of `description`."""
        return self.description.diffusion


@dataclass(frozen=True, kw_only=True)
class SystemPreset:
    """A system, which one name on the command line selects: models, guidance, steps, published result.

    Attributes:
        diffusion, classifier, upsampler: the models; the last two may be None.
        guidance: published scale of the classifier's gradient; 0 without a classifier.
        steps: steps of the base model, the respacing of its process.
        upsampler_steps: steps of the upsampler; 0 without one. If the upsampler's `low_res_size` is smaller
            than the base image, it gets that image averaged over blocks of pixels.
        published: the published results, that of these settings first; empty without one.
    """

    name: str
    summary: str
    diffusion: ModelPreset
    classifier: ModelPreset | None = None
    guidance: float = 0.0
    steps: int = 250
    upsampler: ModelPreset | None = None
    upsampler_steps: int = 0
    published: tuple[Metric, ...] = ()

    @property
    def models(self) -> tuple[ModelPreset, ...]:
        """The models of the system, in the order diffusion, classifier, upsampler."""
        return tuple(
            model for model in (self.diffusion, self.classifier, self.upsampler) if model is not None
        )

    @property
    def image_size(self) -> int:
        """Side in pixels of the final images."""
        return (self.upsampler or self.diffusion).config.image_size

    @property
    def channels(self) -> int:
        """Channels of the final images."""
        return self.diffusion.config.in_channels

    @property
    def num_classes(self) -> int | None:
        """Number of classes that can be sampled, by conditioning or guidance; None without classes."""
        base = self.diffusion.config
        if isinstance(base, UNetConfig) and base.num_classes is not None:
            return base.num_classes
        return self.classifier.config.out_channels if self.classifier is not None else None
