"""What compute-sanitizer is given: it runs every kernel there is, and notices one that is wrong."""

from __future__ import annotations

from unittest import mock

import pytest

from admfast.ops import native
from tests.kernels.norm_cases import DEVICE, module, poison
from tests.tools import small_kernels

pytest.importorskip("triton")


def test_no_triton_kernel_is_left_out():
    names = {
        name
        for file in ("group_norm", "group_norm_bwd", "conv_epilogue")
        for name in vars(module(file))
        if name.endswith("_kernel")
    }
    ran = {*small_kernels.norms(DEVICE), *small_kernels.epilogues(DEVICE)}
    assert len(names) == 9 and ran == names


@pytest.mark.skipif(native.reason_missing() is not None, reason=f"{native.reason_missing()}")
def test_the_update_runs_in_every_layout_and_type(capsys):
    with mock.patch.multiple(small_kernels, norms=lambda device: [], epilogues=lambda device: []):
        assert small_kernels.main(["--device", DEVICE]) == 0
    assert capsys.readouterr().out == "16 launches of 16 kernels agree with the reference\n"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kernel", ["stats", "apply_bwd"])
def test_a_kernel_that_does_nothing_is_noticed(kernel, monkeypatch):
    poison(monkeypatch)
    launch = module("norm_launch")

    def run(calls, device, real=launch.run):
        real([call for call in calls if f"_{kernel}_kernel" not in call.kernel.__name__], device)

    monkeypatch.setattr(launch, "run", run)
    with pytest.raises(AssertionError, match="largest error nan"):
        list(small_kernels.norms(DEVICE))
