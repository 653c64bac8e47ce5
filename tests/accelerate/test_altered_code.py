"""Tests that a one-line change in a copy of the published code keeps its effect, as forks of it need.

Most of these changes act only at certain batch sizes, image sizes, timesteps or settings, so a small trial
may miss them.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import admfast
from tests.accelerate import client
from tests.accelerate.client import filled
from tests.small import assert_close

SOURCE = Path(client.__file__).read_text()
ATTENTION = "weight = torch.einsum"
SKIP, END = "return self.skip_connection(x) + h", "        return x\n\n\nclass Upsample"
OUT, ANGLES = "return self.out(h.type(x.dtype))", "angles = timesteps"
ALTERED = {
    "attention scaled by length": (ATTENTION, "q = q * math.sqrt(math.log(length, 64))\n        {}"),
    "attention of many images": (ATTENTION, "q = q if n < 3 else q.roll(1, 0)\n        {}"),
    "attention by a global": (ATTENTION, "q = q * TAU\n        {}"),
    "attention in training": (ATTENTION, "q = q * (2 if self.training else 1)\n        {}"),
    "block of many images": (SKIP, "h = h if len(h) < 3 else -h\n        {}"),
    "block by its count": (SKIP, "{} * x.shape[0] / 2"),
    "sequence of one layer": (END, "        x = x if len(self) != 1 else -x\n{}"),
    "output cut": (OUT, "{}[:, :3]"),
    "nothing at t = 0": (OUT, "{} * (timesteps != 0)[:, None, None, None]"),
    "timesteps scaled": (ANGLES, "timesteps = timesteps * (1 if timesteps.max() > 1 else 1000)\n    {}"),
    "timesteps rounded": (ANGLES, "timesteps = timesteps.long()\n    {}"),
}


def altered(name: str, old: str = "", new: str = "{}"):
    """Return the client's module with the code `old` replaced by `new`, in which {} stands for `old`."""
    assert old in SOURCE, f"{name}: the client has no {old!r}"
    spec = importlib.util.spec_from_loader(f"altered_{name.replace(' ', '_')}", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.TAU = 1.0
    sys.modules[spec.name] = module
    source = SOURCE.replace(old, new.replace("{}", old)) if old else SOURCE
    exec(compile(source, spec.name, "exec"), vars(module))
    return module


@pytest.mark.parametrize("name", ALTERED)
def test_a_changed_line_keeps_its_effect(name):
    module = altered(name, *ALTERED[name])
    net = filled(module.UNetModel())
    fast = admfast.accelerate(copy.deepcopy(net))
    module.TAU = 3.0
    for training in (False, True):
        net.train(training)
        fast.train(training)
        for count, side, t in ((2, 16, 10.0), (1, 16, 0.5), (4, 24, 999.0), (3, 16, 0.0)):
            x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
            times = torch.full((count,), t)
            with torch.no_grad():
                assert_close(fast(x, times), net(x, times))


@pytest.mark.parametrize("name", ["timestep_embedding", "F", "math"])
def test_a_function_or_module_that_is_exchanged_later_is_used(name):
    module = altered(f"later {name}")
    net = filled(module.UNetModel())
    fast = admfast.accelerate(copy.deepcopy(net))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        fast(x, t)
        before = vars(module)[name]
        if name == "timestep_embedding":
            module.timestep_embedding = lambda *given: 2 * before(*given)
        else:
            vars(module)[name] = type("Stand", (), {"__getattr__": lambda self, key: getattr(before, key)})()
        assert_close(fast(x, t), net(x, t))
    # The replacement may do anything, so the program's own network must run again.
    assert type(fast) is module.UNetModel
