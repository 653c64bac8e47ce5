"""Base class of a process that uses admfast's formulas, and raises if it was changed in a way they ignore."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from admfast.diffusion import GaussianDiffusion as Process
from admfast.diffusion import Schedule

Array = npt.NDArray[np.float64]
SCHEDULE_ARRAYS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
GUARDED_ATTRIBUTES = (
    "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps", "num_timesteps", "use_timesteps",
    "timestep_map", "original_num_steps", "_schedule", "_guarded_process",
)  # fmt: skip
# The methods of this package's classes as they were defined; a program may replace one.
_METHODS_BY_CLASS: dict[type, dict[str, Any]] = {}


def record_methods(cls: type) -> None:
    """Record the methods of a class as they are now."""
    _METHODS_BY_CLASS[cls] = dict(vars(cls))


class ChangeGuard:
    """Base class of a process that remembers the attributes and arrays from which its formulas were built."""

    _schedule: Schedule

    def _guard(self, process: Process) -> None:
        """Store the formulas; to be called after all other attributes are set."""
        self._guarded_process, self._arrays = process, dict[str, Array]()
        self._values_at_start = {
            name: _copy_container(vars(self)[name]) for name in GUARDED_ATTRIBUTES if name in vars(self)
        }

    @property
    def _process(self) -> Process:
        """The formulas. Raises NotImplementedError if an attribute was changed, which they would ignore."""
        changed = [name for name, value in self._values_at_start.items() if vars(self)[name] != value]
        for name, values in self._arrays.items():
            if not np.array_equal(values, getattr(self._schedule, name)):
                changed.append(name)
        if changed:
            raise NotImplementedError(f"diffusion.{changed[0]} was changed: build another diffusion instead")
        return self._guarded_process

    def _formulas(self, *names: str) -> Process:
        """Return the formulas; they do not call the methods `names`, which the published code calls.

        Raises: NotImplementedError if a program has replaced one of these methods.
        """
        for name in names:
            if not self._is_own(name):
                where = f"{type(self).__name__}.{name} was replaced"
                raise NotImplementedError(f"{where}, but admfast's formulas would not call it")
        return self._process

    def _is_own(self, name: str) -> bool:
        """Tell whether a method is the one that this package defined."""
        if name in vars(self):
            return False
        defining_class = next((cls for cls in type(self).__mro__ if name in vars(cls)), None)
        return defining_class is None or vars(defining_class)[name] is _METHODS_BY_CLASS.get(
            defining_class, {}
        ).get(name)

    def is_unchanged(self) -> bool:
        """Tell whether attributes and methods are those that this process was built with."""
        methods = {
            name for part in _METHODS_BY_CLASS.values() for name, value in part.items() if callable(value)
        }
        if not all(self._is_own(name) for name in methods if not name.startswith("__")):
            return False
        try:
            return self._process is self._guarded_process
        except NotImplementedError:
            return False


def _copy_container(value: Any) -> Any:
    """Return a copy of a list or set, which could be changed in place; any other value itself."""
    return type(value)(value) if isinstance(value, list | set) else value


def _array_property(name: str) -> property:
    """Return a property whose value is an array of the schedule, the same object at each use."""

    def read(self: ChangeGuard) -> Array:
        if name not in self._arrays:
            self._arrays[name] = np.array(getattr(self._schedule, name))
        return self._arrays[name]

    return property(read, doc=f"{name}, float64 [S]; do not write to it.")


for _name in SCHEDULE_ARRAYS:
    setattr(ChangeGuard, _name, _array_property(_name))
