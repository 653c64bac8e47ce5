"""Define the rows of the tables in `presets.py`: a weights file, a published result, a system of models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError
from admfast.models.config import NetConfig, UNetConfig
from admfast.models.description import Description, description_from_json

RELEASE = "openai/guided-diffusion, released July 2021"
DIGITS_FOLDER = Path(__file__).resolve().parent.parent / "data" / "digits32"


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """One weights file.

    Attributes:
        name, file: "64x64_diffusion" and "64x64_diffusion.pt".
        network: its configuration; None for a shipped file, whose JSON is read when `config` is asked for.
        process: its diffusion process; None for classifiers (they follow the model that they guide).
        use_fp16: whether the published recipe runs the torso in half precision.
        low_res_size: side in pixels of the image that an upsampler was trained to enlarge.
        parameters: number of parameters (None for a shipped file).
        fingerprint: of its keys and shapes; files that share it can't be told apart by them.
        url: where it was published; None for a shipped file.
        size, sha256, md5: of the published file, in bytes and hexadecimal; None where not known.
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
        """Return its name where it is a released file; None for a shipped one, whose JSON says what it is."""
        return None if self.shipped else self.name

    @property
    def shipped_path(self) -> Path | None:
        """Return where a shipped file lies; None for a released one."""
        return DIGITS_FOLDER / self.file if self.shipped else None

    @cached_property
    def description(self) -> Description:
        """Configuration, process, training facts; CheckpointError if a shipped file's JSON is missing."""
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
        """The network's configuration; raises as `description`."""
        return self.description.network

    @property
    def diffusion(self) -> DiffusionConfig | None:
        """The diffusion process, None for a classifier; raises as `description`."""
        return self.description.diffusion


@dataclass(frozen=True)
class Metric:
    """A published result: FID (lower is better), precision and recall (0..1), where and how it was taken."""

    fid: float
    precision: float
    recall: float
    source: str
    conditions: str


@dataclass(frozen=True, kw_only=True)
class SystemPreset:
    """Describe what one name on the command line stands for: models, guidance, steps, published result.

    Attributes:
        diffusion, classifier, upsampler: the models; the last two may be None.
        guidance: published scale of the classifier's gradient; 0 without a classifier.
        steps: of the base model, as respacing of its process.
        upsampler_steps: of the upsampler; 0 without one. An upsampler whose `low_res_size` is smaller than
            the base image takes the means of its blocks.
        metric: the published result; None where there is none.
    """

    name: str
    summary: str
    diffusion: ModelPreset
    classifier: ModelPreset | None = None
    guidance: float = 0.0
    steps: int = 250
    upsampler: ModelPreset | None = None
    upsampler_steps: int = 0
    metric: Metric | None = None

    @property
    def models(self) -> tuple[ModelPreset, ...]:
        """The models there are: diffusion, classifier, upsampler."""
        return tuple(
            model for model in (self.diffusion, self.classifier, self.upsampler) if model is not None
        )

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that come out."""
        return (self.upsampler or self.diffusion).config.image_size

    @property
    def channels(self) -> int:
        """Channels of the images that come out."""
        return self.diffusion.config.in_channels

    @property
    def num_classes(self) -> int | None:
        """Classes that can be asked for, by condition or by guidance alone; None if there are none."""
        base = self.diffusion.config
        if isinstance(base, UNetConfig) and base.num_classes is not None:
            return base.num_classes
        return self.classifier.config.out_channels if self.classifier is not None else None
