"""Tests that bits per dimension equal the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from admfast.diffusion import bits_per_dimension
from tests.parity.analytic import analytic_model, build_diffusion
from tests.parity.golden import NETWORK_SAMPLES_LIMIT, POINT_LIMIT, cases, compare, load_json, load_tensors
from tests.parity.nets import conditions, load_golden_net

INPUTS = ("x_start", "y", "low_res", "noises")


@pytest.mark.parametrize("path", cases("sampling", "bpd"))
def test_bits_per_dimension(path: Path):
    case, golden = load_json(path), load_tensors(path)
    diffusion = build_diffusion(case["diffusion"])
    if case.get("net") is None:
        model, limit = analytic_model(diffusion), POINT_LIMIT
        extra = {name: golden[name] for name in ("y",) if name in golden}
    else:
        model, limit = load_golden_net(path.parents[1] / "nets" / case["net"]), NETWORK_SAMPLES_LIMIT
        extra = conditions(model, golden)
    result = bits_per_dimension(
        diffusion,
        model,
        golden["x_start"],
        case["clip_denoised"],
        model_kwargs=extra,
        noises=golden["noises"],
    )
    ours = vars(result)
    assert set(ours) == set(golden) - set(INPUTS)
    for name, value in ours.items():
        compare(value, golden[name], limit, name)
