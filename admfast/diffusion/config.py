"""The settings of a diffusion process, under the names of the published flags."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from admfast import checks
from admfast.diffusion.parameterisation import LossType, MeanType, VarType, enum_member
from admfast.diffusion.process import GaussianDiffusion
from admfast.diffusion.respacing import Respacing, check_respacing
from admfast.diffusion.schedule import NOISE_SCHEDULES, make_schedule
from admfast.errors import allowed_names, invalid

SWITCHES = (
    "learn_sigma",
    "sigma_small",
    "predict_xstart",
    "rescale_timesteps",
    "rescale_learned_sigmas",
    "use_kl",
)
# The settings that describe a weights file; the other fields are for processes of your own.
SETTINGS = ("noise_schedule", "steps", *SWITCHES)
_PUBLISHED_NAMES = {"diffusion_steps": "steps", "timestep_respacing": "respacing"}


def check_setting(setting: str, value: object, name: str | None = None) -> object:
    """Return the checked and normalized value of one of `SETTINGS`, without regard to the others.

    name: the setting's name in errors, if the value comes from a flag with another name.
    Raises: InvalidArgument for a wrong value.
    """
    name = name or setting
    if setting == "noise_schedule":
        return checks.one_of(name, value, NOISE_SCHEDULES)
    return checks.whole_number(name, value, 1) if setting == "steps" else checks.boolean(name, value)


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of a diffusion process and its training objective, stored with weights by `to_dict`.

    Source: `create_gaussian_diffusion` of the published code.

    noise_schedule: "linear" or "cosine". steps: length of the original process.
    learn_sigma: LEARNED_RANGE variance, and an output with twice the channels; else FIXED_LARGE, or
      FIXED_SMALL with sigma_small. predict_xstart: the output is x_0 instead of the noise.
    rescale_timesteps: the network sees float timesteps in 0..1000.
    use_kl: the loss is RESCALED_KL; else with rescale_learned_sigmas RESCALED_MSE; else MSE.
    respacing: see `kept_timesteps`; None is the original process without the published respacing wrapper.
    mean_type, var_type, loss_type: an enum member or its name, for types that the switches can't express.
      The switches that it replaces must then be off.
    Raises: InvalidArgument.
    """

    noise_schedule: str = "linear"
    steps: int = 1000
    learn_sigma: bool = False
    sigma_small: bool = False
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    rescale_learned_sigmas: bool = False
    use_kl: bool = False
    respacing: Respacing | None = ""
    mean_type: MeanType | str | None = None
    var_type: VarType | str | None = None
    loss_type: LossType | str | None = None

    def __post_init__(self) -> None:
        for name in SETTINGS:
            object.__setattr__(self, name, check_setting(name, getattr(self, name)))
        if self.respacing is not None:
            object.__setattr__(self, "respacing", check_respacing(self.respacing))
        make_schedule(self.noise_schedule, self.steps, self.respacing)
        self._resolve_type("mean_type", MeanType, "predict_xstart")
        self._resolve_type("var_type", VarType, "learn_sigma", "sigma_small")
        self._resolve_type("loss_type", LossType, "use_kl", "rescale_learned_sigmas")

    def _resolve_type(self, name: str, kind: Any, *switches: str) -> None:
        """Replace a member's name by the member, and reject switches that set the same thing."""
        value = getattr(self, name)
        if value is None:
            return
        object.__setattr__(self, name, enum_member(kind, value, name))
        for switch in switches:
            if getattr(self, switch):
                raise invalid(switch, True, f"off where {name} is given")

    @classmethod
    def from_flags(cls, **flags: Any) -> DiffusionConfig:
        """Return the config of flags; accept the published `diffusion_steps` and `timestep_respacing` too.

        Raises: InvalidArgument for an unknown flag, with the nearest names.
        """
        names = [entry.name for entry in dataclasses.fields(cls)]
        settings: dict[str, Any] = {}
        for flag, value in flags.items():
            name = _PUBLISHED_NAMES.get(flag, flag)
            if name not in names:
                raise invalid(
                    flag, value, f"unknown setting, {allowed_names(flag, [*names, *_PUBLISHED_NAMES])}"
                )
            if name in settings:
                raise invalid(flag, value, f"the same setting as {name}, which is given too")
            # The published code keeps all steps for any empty respacing.
            settings[name] = "" if flag == "timestep_respacing" and not value else value
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON: `SETTINGS`, and others only if they aren't the default."""
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        fields = {name: getattr(self, name) for name in defaults}
        return {
            name: value.name if isinstance(value, enum.Enum) else value
            for name, value in fields.items()
            if name in SETTINGS or value != defaults[name]
        }

    @property
    def types(self) -> tuple[MeanType, VarType, LossType]:
        """The types that the settings select: of the mean, the variance and the loss."""
        fixed = VarType.FIXED_SMALL if self.sigma_small else VarType.FIXED_LARGE
        mse = LossType.RESCALED_MSE if self.rescale_learned_sigmas else LossType.MSE
        mean = self.mean_type or (MeanType.START_X if self.predict_xstart else MeanType.EPSILON)
        var = self.var_type or (VarType.LEARNED_RANGE if self.learn_sigma else fixed)
        loss = self.loss_type or (LossType.RESCALED_KL if self.use_kl else mse)
        return (
            enum_member(MeanType, mean, "mean_type"),
            enum_member(VarType, var, "var_type"),
            enum_member(LossType, loss, "loss_type"),
        )

    def build(self, respacing: Respacing | None = None) -> GaussianDiffusion:
        """Return the process.

        respacing: replaces the config's respacing; None keeps the config's.
        Raises: InvalidArgument.
        """
        used_respacing = self.respacing if respacing is None else respacing
        schedule = make_schedule(self.noise_schedule, self.steps, used_respacing, self.rescale_timesteps)
        return GaussianDiffusion(schedule, *self.types)
