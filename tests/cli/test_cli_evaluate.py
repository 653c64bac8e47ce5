"""Tests of `admfast evaluate`: inputs, tables, files, mistakes, several processes, training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from admfast.cli.main import main
from admfast.cli.run_images import open_set
from admfast.errors import InvalidArgument
from admfast.evaluation.features import FeatureNet, ImageFeatures
from admfast.files.images import write_png
from admfast.runs import collect

RNG = np.random.default_rng(0)
DIGITS = RNG.integers(0, 256, (40, 32, 32, 1), dtype=np.uint8)
FEATURES = ["--features", "digits32_classifier"]
ROOT = Path(__file__).resolve().parents[2]


def archive(path, images=DIGITS, **others):
    np.savez(path, arr_0=images, **others)
    return str(path)


class MeanGrey(FeatureNet):
    """Features of known images without weights: the mean grey of the upper and of the lower half."""

    device = torch.device("cpu")

    def __init__(self, name):
        self.name, self.frechet_name = name, f"FD of {name}"

    def __call__(self, images):
        return ImageFeatures(images.float().unflatten(1, (2, -1)).mean((2, 3, 4)))


@pytest.fixture
def sets(tmp_path):
    return archive(tmp_path / "a.npz", DIGITS[:18]), archive(tmp_path / "b.npz", DIGITS[18:])


def test_the_table_and_the_json_have_every_measure(sets, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main(["evaluate", *sets, *FEATURES, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    (result,) = json.loads(out.read_text())
    assert result["samples"]["images"] == 18 and result["reference"]["images"] == 22
    names = [measure["name"] for measure in result["measures"]]
    assert names == ["classifier score", "FD", "precision", "recall", "density", "coverage", "KD"]
    for measure in result["measures"]:
        line = next(line for line in text.splitlines() if line.startswith(measure["name"]))
        assert f"{measure['value']:.5g}" in line
    assert all(f"warning: {warning}" in text for warning in result["warnings"]) and result["warnings"]


def test_the_report_is_written_beside_the_table(sets, tmp_path, capsys):
    report = tmp_path / "report.html"
    assert main(["evaluate", *sets, *FEATURES, "--report", str(report), "--expected", "imagenet64"]) == 0
    assert str(report) in capsys.readouterr().out
    text = report.read_text(encoding="utf-8")
    assert "classifier score" in text and "2.07" in text and sets[0] in text
    assert main(["evaluate", *sets, *FEATURES, "--report", str(report)]) == 2


def test_the_report_is_of_the_first_features_and_the_table_of_all(sets, tmp_path, capsys, monkeypatch):
    opened = {"one": MeanGrey("one"), "two": MeanGrey("two")}
    monkeypatch.setattr("admfast.cli.evaluate.open_features", lambda name, *_: opened[name])
    report = tmp_path / "report.html"
    assert main(["evaluate", *sets, "--features", "two", "--features", "one", "--report", str(report)]) == 0
    page = report.read_text(encoding="utf-8")
    assert "FD of two" in page and "FD of one" not in page
    text = capsys.readouterr().out
    assert text.index("FD of two") < text.index("FD of one")


class Failing(MeanGrey):
    """Features that can be computed a number of times."""

    def __init__(self, name, calls):
        super().__init__(name)
        self.calls = calls

    def __call__(self, images):
        self.calls -= 1
        if self.calls < 0:
            raise InvalidArgument("images: damaged")
        return super().__call__(images)


@pytest.mark.parametrize(("calls", "results"), [(0, []), (2, ["one"])], ids=["first image", "later"])
def test_a_second_network_that_fails_does_so_at_once_or_loses_nothing(
    calls, results, sets, tmp_path, monkeypatch
):
    opened, out = {"one": MeanGrey("one"), "two": Failing("two", calls)}, tmp_path / "out.json"
    monkeypatch.setattr("admfast.cli.evaluate.open_features", lambda name, *_: opened[name])
    assert main(["evaluate", *sets, "--features", "one", "--features", "two", "--out", str(out)]) == 2
    written = json.loads(out.read_text()) if out.exists() else []
    assert [result["features"] for result in written] == results


def test_images_of_a_run_are_read_by_name_and_checked(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    sample = ["sample", "digits32", "--steps", "1", "--guidance", "0", "--classes", "3,7", "--seeds", "0-3"]
    assert main([*sample, "--out", str(run)]) == 0
    names = sorted((run / "images").iterdir())
    decoded, own = [], collect.read_image
    monkeypatch.setattr(collect, "read_image", lambda path: decoded.append(path) or own(path))
    images = open_set(str(run), "samples")
    images.pick([3, 1])
    assert decoded == [names[1], names[3]]
    assert open_set(str(run / "images"), "samples").labels.tolist() == images.labels.tolist()
    write_png(names[2], np.zeros((8, 8, 1), np.uint8))
    assert main(["evaluate", str(run), *FEATURES]) == 2
    assert names[2].name in capsys.readouterr().err
    names[2].unlink()
    with pytest.raises(InvalidArgument, match="is missing"):
        open_set(str(run), "samples")


def test_the_seed_draws_the_images_of_a_reference(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("admfast.cli.evaluate.open_features", lambda name, *_: MeanGrey(name))
    monkeypatch.setattr("admfast.evaluation.reference.IMAGES", 5)
    kept = []
    for number, seed in enumerate(("0", "1", "0")):
        out = tmp_path / f"{number}.npz"
        assert main(["evaluate", sets[0], "--make-reference", "--seed", seed, "--out", str(out)]) == 0
        with np.load(out) as archive:
            kept.append(archive["arr_0"].tobytes())
    assert kept[0] == kept[2] != kept[1]


def test_published_results_stand_below_those_of_the_samples(sets, capsys):
    assert main(["evaluate", *sets, *FEATURES, "--expected", "imagenet64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[-5:] for line in lines if line.startswith(("these samples", "250 steps"))]
    # The features are not Inception's, so the samples have no row.
    assert rows == [["2.07", "4.29", "-", "0.74", "0.63"], ["2.61", "3.77", "-", "0.73", "0.63"]]


def test_a_folder_and_a_finished_run_are_read(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(DIGITS[:10]):
        write_png(folder / f"{i}.png", image[..., 0])
    results = []
    run = tmp_path / "run"
    sample = ["sample", "digits32", "--steps", "1", "--guidance", "0", "--batch", "2"]
    assert main([*sample, "--seeds", "0-11", "--out", str(run)]) == 0
    assert main([*sample, "--num-images", "12", "--shard", "8", "--out", str(tmp_path / "shards")]) == 0
    for name in ("run", "shards"):
        out = tmp_path / f"{name}.json"
        assert main(["evaluate", str(tmp_path / name), str(folder), *FEATURES, "--out", str(out)]) == 0
        (result,) = json.loads(out.read_text())
        assert result["samples"]["images"] == 12 and result["reference"]["images"] == 10
        results.append({measure["name"]: measure["value"] for measure in result["measures"]})
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    images = open_set(str(tmp_path / "shards"), "samples")
    whole = np.concatenate(list(images.batches(0, 12, 5)))
    for first, stop in ((0, 3), (2, 9), (9, 12)):
        assert np.array_equal(np.concatenate(list(images.batches(first, stop, 2))), whole[first:stop])
    report = tmp_path / "report.html"
    assert main(["evaluate", str(tmp_path / "run"), *FEATURES, "--report", str(report)]) == 0
    assert "samples: solver" in report.read_text(encoding="utf-8")


def test_the_seed_moves_the_intervals(sets, tmp_path):
    found = []
    for seed in ("0", "1", "0"):
        out = tmp_path / "result.json"
        assert main(["evaluate", *sets, *FEATURES, "--seed", seed, "--out", str(out), "--overwrite"]) == 0
        found.append(json.loads(out.read_text())[0]["measures"])
    assert found[0] == found[2] != found[1]


MISTAKES = {
    "no such system": (["--expected", "imagenet65"], "expected='imagenet65'"),
    "no such features": (["--features", "vgg"], "features='vgg'"),
    "no weights": (["--weights", "gone"], "admfast fetch inception"),
    "out of another kind": (["--out", "x.txt"], "out='x.txt'"),
    "report of another kind": (["--report", "x.pdf"], "report='x.pdf'"),
    "make-reference with a reference": (["--make-reference", "--out", "r.npz"], "--make-reference"),
    "no images at a time": (["--batch-size", "0"], "batch-size"),
}


@pytest.mark.parametrize(("arguments", "text"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(arguments, text, sets, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *sets, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error.splitlines()[-1] and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz"}


BAD = {
    "no arr_0": dict(images=DIGITS),
    "floats": dict(arr_0=DIGITS / 255),
    "one image": dict(arr_0=DIGITS[:1]),
    "of another size": dict(arr_0=DIGITS[:, :16]),
    "colours": dict(arr_0=np.repeat(DIGITS, 3, axis=3)),
}


@pytest.mark.parametrize("arrays", BAD.values(), ids=BAD)
@pytest.mark.parametrize("place", ["samples", "reference"])
def test_sets_that_do_not_fit_are_one_line(place, arrays, sets, tmp_path, capsys):
    bad = tmp_path / "bad.npz"
    np.savez(bad, **arrays)
    paths = [str(bad), sets[1]] if place == "samples" else [sets[0], str(bad)]
    assert main(["evaluate", *paths, *FEATURES]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("admfast: ")


def test_an_existing_file_is_kept(sets, tmp_path, capsys):
    out = tmp_path / "result.json"
    out.write_text("mine")
    assert main(["evaluate", *sets, *FEATURES, "--out", str(out)]) == 2
    assert out.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    assert main(["evaluate", *sets, *FEATURES, "--out", str(out), "--overwrite"]) == 0
    assert json.loads(out.read_text())


def command(*arguments):
    return [sys.executable, "-m", "admfast", "evaluate", *map(str, arguments)]


def test_an_interrupted_evaluation_leaves_nothing(tmp_path):
    many = archive(tmp_path / "many.npz", np.repeat(DIGITS, 3000, axis=0))
    out = tmp_path / "result.json"
    process = subprocess.Popen(
        command(many, *FEATURES, "--out", out), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    used, deadline = 0.0, time.monotonic() + 120
    while used < 8 and time.monotonic() < deadline:  # seconds of the processor: imports take fewer
        times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"many.npz"}


def test_two_processes_give_the_result_of_one(sets, tmp_path):
    alone, together = tmp_path / "1.json", tmp_path / "2.json"
    assert main(["evaluate", *sets, *FEATURES, "--out", str(alone)]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "admfast"]
    done = subprocess.run(
        [sys.executable, *launch, "evaluate", *sets, *FEATURES, "--out", str(together)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("classifier score") == 1  # one process prints
    found, expected = (json.loads(path.read_text())[0]["measures"] for path in (together, alone))
    for measure, wanted in zip(found, expected, strict=True):
        assert measure["value"] == pytest.approx(wanted["value"], rel=1e-5, abs=1e-6), measure["name"]


def test_training_logs_evaluations_and_draws_them(tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "run.png"
    train = ["train", "diffusion", "--out", str(run), "--steps", "3", "--batch-size", "4"]
    evaluation = ["--evaluate-every", "2", "--evaluate-images", "8", "--grid-every", "0"]
    assert main([*train, *evaluation]) == 0
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if any(name.startswith("evaluation/") for name in row)]
    assert [row["step"] for row in evaluated] == [2, 3] and evaluated[0]["evaluation/FD"] > 0
    assert "step 2: classifier score" in capsys.readouterr().out
    assert main(["train", "export", str(run), "--picture", str(picture)]) == 0
    from PIL import Image

    assert Image.open(picture).width == 2000  # the charts of the loss and of FD
    # What is evaluated changes no step.
    plain = tmp_path / "plain"
    assert main(["train", "diffusion", "--out", str(plain), *train[4:], "--grid-every", "0"]) == 0
    losses = [
        [
            row["loss"]
            for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if "loss" in row
        ]
        for folder in (run, plain)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classifier", []),
        ("diffusion", ["--evaluate-features", "vgg"]),
        ("diffusion", ["--set", "image_size=16"]),
    ],
    ids=["classifier", "features", "size"],
)
def test_evaluations_that_cannot_be_are_refused_before_the_first_step(kind, options, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", kind, "--out", str(run), "--steps", "2", "--batch-size", "2", "--evaluate-every", "1"]
    assert main([*train, *options]) == 2
    assert not (run / "log.jsonl").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_an_upsampler_is_evaluated(tmp_path):
    run = tmp_path / "run"
    options = ["--steps", "1", "--batch-size", "2", "--evaluate-every", "1", "--evaluate-images", "6"]
    assert main(["train", "upsampler", "--out", str(run), *options, "--grid-every", "0"]) == 0
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any("evaluation/FD" in row for row in rows)
