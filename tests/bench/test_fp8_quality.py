"""Tests of the bench that emulates convolutions of e4m3 numbers."""

from __future__ import annotations

import pytest
import torch

import admfast
from admfast.engine.options import PLAIN
from bench import fp8_quality


def test_numbers_keep_three_bits_of_their_mantissa_and_a_scale_of_their_own():
    x = torch.tensor([[448.0, 1.0, -1.125, 15.0], [-0.5 * 448, 0.5, 7.5, 0.0], [0.0] * 4])
    assert torch.equal(fp8_quality.rounded(x), x)  # all are numbers of e4m3, times a power of two
    x = torch.randn(8, 1000).clamp(-3, 3)
    off = (fp8_quality.rounded(x) - x).abs()
    normal = x.abs() > x.abs().amax(1, keepdim=True) * 2**-14
    assert bool((off[normal] <= 2**-4 * x.abs()[normal] * (1 + 1e-6)).all())
    assert float((off / x.abs())[normal].max()) > 2**-5


def test_gradients_pass_through_the_rounding():
    x, weight = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(4, 8, 3, 3)
    exact = torch.nn.functional.conv2d(x, weight, padding=1)
    (wanted,) = torch.autograd.grad(exact.sum(), x)
    for convolve in (fp8_quality.in_fp8, fp8_quality.in_int8):
        y = convolve(x, weight, None)
        assert 1e-3 < float((y - exact).detach().norm() / exact.detach().norm()) < 0.1
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)


def test_inner_3x3_convolutions_are_replaced_and_restored():
    pipe = admfast.load("digits32", device="cpu", precision="fp32", engine=PLAIN)
    asked = dict(seeds=[0], classes=[3], steps=2, output="float")
    before = pipe.sample(**asked)
    seen = []

    def convolve(x, weight, bias):
        seen.append(weight.shape)
        return fp8_quality.in_fp8(x, weight, bias)

    with fp8_quality.replaced(pipe, convolve):
        assert not torch.equal(pipe.sample(**asked), before)
    assert seen and all(min(shape[:2]) > 3 and shape[2:] == (3, 3) for shape in seen)
    assert torch.equal(pipe.sample(**asked), before)


def test_the_table_has_every_solver(capsys):
    assert fp8_quality.main(["--count", "1", "--steps", "4"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 4 and {row[0].split()[0] for row in rows} == {"ddpm", "ddim"}
    assert all(10 < float(cell) < 90 for row in rows for cell in row[1:])


def test_an_unknown_flag_ends_it():
    with pytest.raises(SystemExit):
        fp8_quality.main(["--speed"])
