"""Tests of the bench that emulates convolutions of e4m3 numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import admfast
from admfast.engine.options import PLAIN
from admfast.files.images import read_image
from admfast.ops import conv_int8_ref
from bench import fp8_quality


def test_numbers_keep_three_bits_of_their_mantissa_and_a_scale_of_their_own():
    x = torch.tensor([[448.0, 1.0, -1.125, 15.0], [-0.5 * 448, 0.5, 7.5, 0.0], [0.0] * 4])
    assert torch.equal(fp8_quality.round_to_e4m3(x), x)  # all are numbers of e4m3, times a power of two
    x = torch.randn(8, 1000).clamp(-3, 3)
    off = (fp8_quality.round_to_e4m3(x) - x).abs()
    normal = x.abs() > x.abs().amax(1, keepdim=True) * 2**-14
    assert bool((off[normal] <= 2**-4 * x.abs()[normal] * (1 + 1e-6)).all())
    assert float((off / x.abs())[normal].max()) > 2**-5


def test_factors_are_rounded_and_gradients_pass_through():
    x, weight = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(4, 8, 3, 3)
    exact = F.conv2d(x, weight, padding=1)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    for convolve in (fp8_quality.fp8_conv, conv_int8_ref):
        y = fp8_quality.straight_through(convolve, x, weight, None)
        torch.testing.assert_close(y, convolve(x, weight, None))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    # Each factor of a product is off by 1/16 at most, unless it is too small to matter in the sum.
    off = (fp8_quality.fp8_conv(x, weight, None) - exact).abs()
    assert bool((off <= 2**-3 * (1 + 2**-5) * F.conv2d(x.abs(), weight.abs(), padding=1)).all()) and bool(
        off.any()
    )


def test_inner_3x3_convolutions_are_replaced_and_restored():
    pipe = admfast.load("digits32", device="cpu", precision="fp32", engine=PLAIN)
    request = dict(seeds=[0], classes=[3], steps=2, output="float")
    before = pipe.sample(**request)
    seen = []

    def convolve(x, weight, bias):
        seen.append(weight.shape)
        return fp8_quality.fp8_conv(x, weight, bias)

    with fp8_quality.replace_convolutions(pipe, convolve):
        assert not torch.equal(pipe.sample(**request), before)
    assert seen and all(min(shape[:2]) > 3 and shape[2:] == (3, 3) for shape in seen)
    assert torch.equal(pipe.sample(**request), before)


def test_the_table_has_every_solver(capsys):
    assert fp8_quality.main(["--count", "1", "--steps", "4"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 4 and {row[0].split()[0] for row in rows} == {"ddpm", "ddim"}
    assert all(0 < float(cell) < math.inf for row in rows for cell in row[1:])


def test_numbers_and_pictures_are_written(tmp_path):
    assert fp8_quality.main(["--count", "2", "--steps", "4", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "fp8_quality.json").read_text())
    assert [(row["solver"], row["guidance"], row["steps"], row["count"]) for row in rows] == [
        (solver, guidance, 4, 2) for solver in ("ddpm", "ddim") for guidance in (2.0, 0.0)
    ]
    # Coarser numbers change the images more.
    assert all(row["psnr_db"]["bf16"] > row["psnr_db"]["e4m3"] for row in rows)
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 4
    for path in pictures:
        rows_of_tiles = read_image(path).shape[0] / (64 + 4)
        assert math.floor(rows_of_tiles) == 4  # float32, bf16, 8 bits, e4m3


def test_an_unknown_flag_ends_it():
    with pytest.raises(SystemExit):
        fp8_quality.main(["--speed"])
