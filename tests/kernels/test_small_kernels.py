"""Tests of the program that compute-sanitizer runs: it runs every kernel, and detects a wrong one."""

from __future__ import annotations

import pytest

from admfast.ops import native
from tests.kernels.norm_cases import CALLS, DEVICE, module, poison
from tests.kernels.values import kernel_names
from tests.ops.tolerance import HALF_AND_SINGLE
from tests.tools import small_kernels

pytest.importorskip("triton")


def test_no_triton_kernel_is_left_out():
    ran = {
        name
        for cases, impl in small_kernels.every(DEVICE)
        if impl == "triton"
        for name in small_kernels.ran_by(cases, impl, DEVICE)
    }
    assert ran == kernel_names()


@pytest.mark.skipif(native.reason_missing() is not None, reason=f"{native.reason_missing()}")
def test_compiled_ops_run_in_every_layout_and_type(capsys, monkeypatch):
    compiled = [(cases, impl) for cases, impl in small_kernels.every(DEVICE) if impl != "triton"]
    monkeypatch.setattr(small_kernels, "every", lambda device: compiled)
    assert small_kernels.main(["--device", DEVICE]) == 0
    assert capsys.readouterr().out.endswith(" kernels agree with the reference\n")
    ((update, impl),) = (pair for pair in compiled if pair[0].op == "sampler_step")
    ran = set(small_kernels.ran_by(update, impl, DEVICE))
    assert len(ran) == len(update.small) * len(HALF_AND_SINGLE)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kernel", ["stats", "apply_bwd"])
def test_a_kernel_that_does_nothing_is_noticed(kernel, monkeypatch):
    poison(monkeypatch)
    launch = module("norm_launch")

    def run(calls, device, real=launch.run):
        real([call for call in calls if f"_{kernel}_kernel" not in call.kernel.__name__], device)

    monkeypatch.setattr(launch, "run", run)
    with pytest.raises(AssertionError, match="largest error nan"):
        list(small_kernels.ran_by(CALLS, "triton", DEVICE))
