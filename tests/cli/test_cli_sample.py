"""Tests of `admfast sample` through `main(argv)`: files, output, exit statuses and one-line errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from admfast.checkpoints import write_weights
from admfast.checks import MAX_NUMBERS, parse_numbers
from admfast.cli.main import main
from admfast.cli.sample import repeat_classes
from admfast.engine.step import PreparedStep
from admfast.errors import InvalidArgument
from admfast.files.images import read_image, write_png
from admfast.files.npz import read_samples
from admfast.runs.manifest import MANIFEST
from admfast.solvers import unipc
from tests.small import classifier, unet, write

both_defaults = pytest.mark.usefixtures("default_precision")


@pytest.fixture
def sample(weights, tmp_path, capsys):
    """Return a function that calls `admfast sample faces.safetensors --out tmp/out --steps 2 ...`.

    It returns (status, stdout, stderr).
    """

    def call(*options: str, model: str = "faces.safetensors") -> tuple[int, str, str]:
        settings = {"--steps": "2", "--device": "cpu", "--out": str(tmp_path / "out")}
        for name in ("--steps", "--out", "--device"):
            if name in options:
                settings.pop(name)
        if "--respacing" in options:
            settings.pop("--steps")
        flat = [word for pair in settings.items() for word in pair]
        status = main(["sample", str(weights / model), *flat, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def pngs(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "images").glob("*.png"))


def table_of(stdout: str) -> dict[str, str]:
    """Return the printed configuration: the rows up to the first line that isn't one."""
    rows = {}
    for line in stdout.splitlines():
        if "  " not in line:
            break
        name, value = line.split("  ", 1)
        rows[name] = value.strip()
    return rows


def test_images_grid_npz_and_the_resolved_configuration(sample, weights, tmp_path, default_precision):
    guide = str(weights / "guide.safetensors")
    status, stdout, _ = sample("--classes", "1-2", "--per-class", "2", "--classifier", guide, "--batch", "3")
    out = tmp_path / "out"
    assert status == 0
    assert table_of(stdout) == {
        "system": "faces",
        "images": "4 of 8x8, 3 at a time",
        "seeds": "0, 1, 2, 3",
        "classes": "1, 1, 2, 2",
        "solver": f"{unipc()}, 2 steps, uniform spacing",
        "guidance": "classifier 1",
        "device": "cpu",
        "precision": str(default_precision),
        "out": str(out),
    }
    assert pngs(out) == [
        "000000_class1_seed0.png",
        "000001_class1_seed1.png",
        "000002_class2_seed2.png",
        "000003_class2_seed3.png",
    ]
    with np.load(out / "samples_4x8x8x1.npz") as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (4, 8, 8, 1)
        assert archive["arr_1"].dtype == np.int64 and archive["arr_1"].tolist() == [1, 1, 2, 2]
    assert read_image(out / "grid.png").ndim == 3
    last = stdout.splitlines()[-4:]
    assert last[0].startswith("4 images in ") and last[0].endswith(" GB")
    assert last[1:] == [str(out / name) for name in ("images", "grid.png", "samples_4x8x8x1.npz")]


@both_defaults
@pytest.mark.parametrize("size, sides", [("8x12", (8, 12)), ("16", (16, 16)), ("4X8", (4, 8))])
def test_images_of_another_size(sample, tmp_path, size, sides):
    status, stdout, stderr = sample("--size", size)
    assert status == 0, stderr
    assert table_of(stdout)["images"].startswith(f"1 of {sides[0]}x{sides[1]}, ")
    assert read_image(tmp_path / "out" / "images" / "000000_class0_seed0.png").shape == (*sides, 1)


@both_defaults
@pytest.mark.parametrize(
    "options, solver, steps",
    [
        (["--solver", "ddim", "--eta", "0.5"], "ddim:eta=0.5, 2 steps", 2),
        (["--respacing", "ddim4", "--solver", "ddim"], "ddim:eta=0.0, respacing ddim4", 4),
        (["--respacing", "1,2"], "ddpm, respacing 1,2", 3),
    ],
)
def test_solvers_and_respacings(sample, tmp_path, options, solver, steps):
    status, stdout, stderr = sample(*options, "--intermediates", "1")
    assert (status, table_of(stdout)["solver"]) == (0, solver)
    assert len(list((tmp_path / "out" / "intermediates").iterdir())) == steps


@both_defaults
def test_a_model_without_classes(sample, tmp_path):
    status, stdout, _ = sample("--seeds", "3-5,9", model="free.safetensors")
    assert status == 0 and table_of(stdout)["classes"] == "none"
    assert pngs(tmp_path / "out") == [f"{i:06d}_seed{seed}.png" for i, seed in enumerate((3, 4, 5, 9))]
    assert read_samples(tmp_path / "out" / "samples_4x8x8x1.npz").labels is None


def test_many_seeds_are_shown_in_short(sample):
    status, stdout, _ = sample("--seeds", "0-19", "--steps", "1")
    assert status == 0 and table_of(stdout)["seeds"] == "0, 1, 2, 3, 4, 5, ..., 17, 18, 19"
    assert table_of(stdout)["classes"] == "0, 1, 2, 3, 0, 1, ..., 1, 2, 3"


def test_half_precision_and_options_of_a_file(sample):
    status, stdout, _ = sample("--precision", "bf16", "--set", "dropout=0.25", "--set", "steps=50")
    assert status == 0 and table_of(stdout)["precision"] == "bfloat16"


@both_defaults
def test_the_same_command_gives_the_same_images(sample, tmp_path):
    found = []
    for name, batch in (("a", "1"), ("b", "4")):
        out = tmp_path / name
        assert sample("--seeds", "0-3", "--out", str(out), "--batch", batch)[0] == 0
        found.append(read_samples(out / "samples_4x8x8x1.npz").images.astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1


def test_threads_of_a_step(sample, monkeypatch):
    seen, advance = [], PreparedStep.advance

    def watched(step: PreparedStep, i: int) -> None:
        seen.append(step.threads)
        advance(step, i)

    monkeypatch.setattr(PreparedStep, "advance", watched)
    assert sample("--seeds", "0", "--threads", "3", "--device", "cpu")[0] == 0
    assert set(seen) == {3}


def test_a_profile_says_how_the_whole_run_went(sample, weights):
    guide = str(weights / "guide.safetensors")
    status, stdout, _ = sample("--seeds", "0-2", "--classifier", guide, "--batch", "2", "--profile")
    assert status == 0
    lines = stdout.splitlines()
    assert any(line.startswith("images") and "3 of 8x8, 2 at a time" in line for line in lines)
    assert all(any(line.startswith(f"op {op}") for line in lines) for op in ("conv", "attention", "normal"))
    (share,) = (line.split()[-2] for line in lines if line.split()[:1] == ["share"])
    assert 0 < float(share) < 1000
    assert any("batches of 2" in line for line in lines), "no advice on the batch size"
    assert "share" not in sample("--seeds", "0", "--overwrite")[1]


# Mistakes


def assert_one_line(status: int, stderr: str, message: str) -> None:
    assert status == 2
    assert stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert message in stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--classes", "0-4"], "admfast: --classes=4: "),
        (["--classes", "a"], "classes='a': whole numbers and ranges separated by commas, such as 0-9"),
        (["--classes", ""], "classes='': whole numbers and ranges separated by commas"),
        (["--classes", "3-1"], "classes='3-1': the range 3-1 runs backwards"),
        (["--seeds", "-1"], "seeds='-1': whole numbers and ranges"),
        (["--seeds", "1-2-3"], "seeds='1-2-3': whole numbers and ranges"),
        (["--seeds", "1,,2"], "seeds='1,,2': whole numbers and ranges"),
        (["--seeds", "0-99999999999"], "at most 10,000,000 numbers; this has 100,000,000,000 or more"),
        (["--seeds", "18446744073709551616"], "seeds=18446744073709551616: a whole number from 0 to"),
        (["--seeds", "9" * 5000], "whole numbers of at most 20 digits"),
        (["--per-class", "0"], "per-class=0: 1 or more"),
        (["--per-class", "99999999999"], "per-class=99999999999: at most 10,000,000 images in all"),
        (["--per-class", "2", "--seeds", "0-2"], "seeds='3 seeds': one for each of the 8 images, or none"),
        (["--solver", "ddim-inverse"], "--solver='ddim-inverse': in Python only: pipe.sample(x_start="),
        (["--low-res", "small.npz"], "--low-res: path='small.npz': no such file"),
        (["--preset", "64x64"], "--preset='64x64': no such model; nearest: 64x64_diffusion"),
        (["--set", "device=cpu"], "--set='device': no such option of a file"),
        (["--set-classifier", "num_heads=2"], "classifier_options={'num_heads': 2}: there is no classifier"),
        (["--steps", "0"], "--steps=0: "),
        (["--size", "8x"], "size='8x': "),
        (["--size", "0x8"], "--size=0: "),
        (["--size", "8x13"], "--size=(8, 13): "),
        (["--size", "8x13"], "nearest: 8x12"),
        (["--steps", "two"], "admfast: --steps='two': "),
        (["--steps=1.5"], "admfast: --steps='1.5': "),
        (["--guidance", "high"], "guidance='high': a number"),
        (["--set", "model_channels=64"], "faces.safetensors: does not fit model_channels=64 (it has 32): "),
        (["--num_channels", "64"], "faces.safetensors: does not fit num_channels=64 (it has 32): "),
        (["--low-res", "http://a.b/c.png"], "a URL"),
        (["--solver", "ddin"], "solver='ddin': nearest: ddim"),
        (["--respacing", "dim25"], "respacing='dim25'"),
        (["--respacing", "dim25"], "nearest: ddim25"),
        (["--steps", "2", "--eta", "0.5"], "eta=0.5: only together with a solver that has it"),
        (["--guidance", "2"], "guidance=2.0: faces has no classifier; 0 is none"),
        (["--upsampler-steps", "3"], "--upsampler-steps=3: faces has no upsampler"),
        (["--batch", "0"], "batch=0: 1 or more"),
        (["--threads", "0"], "threads=0: "),
        (["--intermediates", "-1"], "intermediates=-1: 0 for none, or every so many steps"),
        (["--precision", "fp8"], "precision='fp8': nearest: "),
        (["--device", "tpu"], "device='tpu': cpu, cuda, or cuda:N"),
        (["--weights", "models"], "weights='models': for a system, as the folder of its files"),
        (["--classifier", "gone.pt"], "gone.pt: no such file"),
        (["--set", "num_heads"], "set='num_heads': NAME=VALUE, such as num_heads=4"),
        (["--set", "num_head=4"], "nearest: num_heads"),
        (["--stepz", "4"], "admfast sample: No such option: --stepz"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_status_2(sample, tmp_path, options, message):
    status, stdout, stderr = sample(*options)
    assert_one_line(status, stderr, message)
    assert stdout == "" and not list(tmp_path.iterdir()), "output or files before all arguments were checked"


def test_the_home_folder_is_meant_by_its_sign(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sample("--seeds", "0", "--out", "~/small")[0] == 0
    status, stdout, stderr = sample("--low-res", "~/small/images", "--out", "~/large", model="up.safetensors")
    assert status == 0, stderr
    assert table_of(stdout)["out"] == str(tmp_path / "large") and len(pngs(tmp_path / "large")) == 1
    (tmp_path / "file").write_text("")
    for out in ("~/file", "~/file/out"):
        status, stdout, stderr = sample("--out", out)
        assert_one_line(status, stderr, f"admfast: {tmp_path}/file: not written: it is a file")
        assert stdout == ""
    status, stdout, stderr = sample("--compile", "--compile-cache", "~/file")
    assert_one_line(status, stderr, f"admfast: {tmp_path}/file: not written: it is a file")


def test_classes_of_a_model_without_are_refused(sample):
    for option in ("--classes", "--per-class"):
        status, _, stderr = sample(option, "1", model="free.safetensors")
        assert_one_line(status, stderr, "no classes")


def test_wrong_environments_are_found_before_anything_is_made(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("ADMFAST_IMPL", "nvcc")
    status, stdout, stderr = sample()
    assert_one_line(status, stderr, "ADMFAST_IMPL='nvcc': no implementation of")
    assert stdout == "" and not list(tmp_path.iterdir())


@both_defaults
def test_an_upsampler_enlarges_images_that_are_given(sample, weights, tmp_path, capsys):
    assert sample("--seeds", "0-2")[0] == 0
    given = tmp_path / "out"
    found = []
    for small in (given / "samples_3x8x8x1.npz", given / "images"):
        out = tmp_path / small.stem
        status, _, stderr = sample("--low-res", str(small), "--out", str(out), model="up.safetensors")
        assert status == 0, stderr
        found.append(read_samples(out / "samples_3x16x16x1.npz"))
    assert [samples.labels.tolist() for samples in found] == [[0, 1, 2]] * 2
    assert np.array_equal(found[0].images, found[1].images)
    status, _, stderr = sample(model="up.safetensors")
    assert_one_line(2, stderr.splitlines()[-1] + "\n", "admfast: --low-res=None: upsamplers need it")
    one = str(given / "images" / "000000_class0_seed0.png")
    status, _, stderr = sample("--low-res", one, "--seeds", "0-1", model="up.safetensors")
    assert_one_line(status, stderr.splitlines()[-1] + "\n", "low_res.shape=(1, 1, 8, 8): (2, 1, h, w)")


@both_defaults
def test_an_upsampler_enlarges_colour_images_in_grey(sample, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    levels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    write_png(folder / "a.png", levels)
    write_png(folder / "b.png", levels[..., :1])
    options = ["--low-res", str(folder), "--set", "low_res_size=8"]
    status, _, stderr = sample(*options, model="up.safetensors")
    assert status == 0, stderr
    assert read_samples(tmp_path / "out" / "samples_2x16x24x1.npz").images.shape == (2, 16, 24, 1)


@both_defaults
def test_a_cascade_of_files(sample, weights, tmp_path):
    up = str(weights / "up.safetensors")
    status, stdout, stderr = sample(
        "--upsampler", up, "--upsampler-steps", "2", "--set-upsampler", "low_res_size=4"
    )
    assert status == 0, stderr
    assert table_of(stdout)["upsampler"] == "to 16x16, 2 steps"
    assert read_samples(tmp_path / "out" / "samples_1x16x16x1.npz").images.shape == (1, 16, 16, 1)


@both_defaults
def test_options_of_a_classifier_s_file(sample, weights, tmp_path):
    write_weights(tmp_path / "bare.pt", classifier(1).state_dict())
    bare = str(tmp_path / "bare.pt")
    status, _, stderr = sample("--classifier", bare, "--out", str(tmp_path / "out"))
    assert_one_line(status, stderr, "give num_head_channels (a divisor of 64)")
    assert "--set-classifier on the command line" in stderr
    assert sample("--classifier", bare, "--set-classifier", "num_head_channels=32")[0] == 0


def test_unknown_models_are_named_with_the_nearest(capsys):
    assert main(["sample", "imagenet265"]) == 2
    assert_one_line(2, capsys.readouterr().err, "neither a system nor a file; nearest: imagenet256")
    assert main(["sample", "imagenet64"]) == 2
    assert_one_line(2, capsys.readouterr().err, "admfast fetch imagenet64 --out models")
    assert main(["sample"]) == 2
    assert_one_line(2, capsys.readouterr().err, "admfast sample: Missing argument 'name'.")


def test_other_kinds_of_files_are_refused(sample, weights, tmp_path):
    status, _, stderr = sample(model="guide.safetensors")
    assert_one_line(status, stderr, "a diffusion model; this file holds a classifier")
    status, _, stderr = sample("--classifier", str(weights / "faces.safetensors"))
    assert_one_line(status, stderr, "a classifier; this file holds a unet")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 100)
    assert main(["sample", str(tmp_path / "broken.safetensors")]) == 2


def test_samples_that_are_there_need_overwrite(sample, tmp_path):
    assert sample("--seeds", "0-1")[0] == 0
    status, _, stderr = sample("--seeds", "5")
    assert_one_line(
        status, stderr, "holds images of another request (images=2, not 1; seeds='0-1', not '5'; "
    )
    (tmp_path / "out" / MANIFEST).unlink()
    status, _, stderr = sample("--seeds", "5")
    assert_one_line(status, stderr, "holds 4 files of samples already; give another folder, or --overwrite")
    assert len(pngs(tmp_path / "out")) == 2
    assert sample("--seeds", "5", "--overwrite")[0] == 0
    assert pngs(tmp_path / "out") == ["000000_class1_seed5.png"]


def test_an_output_folder_below_a_file(sample, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, stderr = sample("--out", str(tmp_path / "file" / "below"))
    assert_one_line(status, stderr, f"admfast: {tmp_path}/file: not written: it is a file")


@both_defaults
def test_nan_in_the_weights_names_the_layer(weights, tmp_path, capsys):
    net = unet()
    net.middle_block[0].in_layers[2].weight.data[0, 0, 0, 0] = float("nan")
    path = write(tmp_path / "bad.safetensors", net)
    assert main(["sample", str(path), "--steps", "2", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "admfast: x is not finite after step 1 (t = 99); the first layer to put it out is "
        "net.middle_block.0.in_layers.2 (Conv2d); "
        "weights that are not finite: net.middle_block.0.in_layers.2.weight"
    )
    assert not pngs(tmp_path / "out")


def test_ctrl_c_leaves_what_is_finished(sample, tmp_path, monkeypatch):
    calls = []
    own = PreparedStep.advance

    def interrupted(step, i):
        own(step, i)
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(PreparedStep, "advance", interrupted)
    status, stdout, stderr = sample("--seeds", "0-5", "--batch", "2")
    assert status == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "admfast: interrupted by SIGINT"
    out = tmp_path / "out"
    assert stdout.splitlines()[-1] == f"4 of 6 images are finished and kept in {out}"
    samples = read_samples(out / "samples_4x8x8x1.npz")
    assert samples.labels.tolist() == [0, 1, 2, 3] and len(pngs(out)) == 4
    assert read_image(out / "grid.png").shape[2] == 3


# Which images


@pytest.mark.parametrize(
    "text, numbers", [("7", [7]), ("0-3", [0, 1, 2, 3]), ("207,360", [207, 360]), (" 1 - 2 , 5", [1, 2, 5])]
)
def test_numbers_and_ranges(text, numbers):
    assert parse_numbers("seeds", text) == numbers


@pytest.mark.parametrize(
    "asked, planned",
    [
        (([3, 1], 2, None, 4), ([3, 3, 1, 1], None)),
        ((None, 2, None, 2), ([0, 0, 1, 1], None)),
        (([1], 2, [8, 9], 2), ([1, 1], [8, 9])),
    ],
)
def test_so_many_images_of_each_class(asked, planned):
    assert repeat_classes(*asked) == planned


def test_a_slip_does_not_fill_the_memory():
    with pytest.raises(InvalidArgument, match="at most"):
        parse_numbers("seeds", f"0-9,0-{MAX_NUMBERS}")
    with pytest.raises(InvalidArgument, match="at most"):
        repeat_classes([0, 1], MAX_NUMBERS, None, 4)
