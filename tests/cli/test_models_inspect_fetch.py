"""Tests of `admfast models`, `inspect` and `fetch`: output, errors, and signatures that typer accepts."""

from __future__ import annotations

import importlib
import json

import pytest
import typer
from typer.testing import CliRunner

from admfast.checkpoints import write_weights
from admfast.cli.fetch import resolve_names, run_fetch
from admfast.cli.inspect import run_inspect
from admfast.cli.models import run_models
from admfast.cli.options import parse_settings
from admfast.errors import AdmfastError, CheckpointError, InvalidArgument, OutputError
from admfast.evaluation.published_weights import PUBLISHED_WEIGHTS
from admfast.files.download import FetchedFile
from admfast.files.tables import table
from admfast.models.description import Description
from admfast.models.presets import MODELS, SYSTEMS, preset
from tests.small import SMALL_UNET
from tests.tools.random_checkpoint import random_state

fetch_module = importlib.import_module("admfast.cli.fetch")


@pytest.fixture
def app():
    app = typer.Typer()
    for name, function in (("models", run_models), ("inspect", run_inspect), ("fetch", run_fetch)):
        app.command(name)(function)
    return app


def test_tables_are_aligned():
    assert table([("a", "bb"), ("ccc", "d")], ("x", "y")) == "x    y\n---  --\na    bb\nccc  d"
    assert table([("a", "b")], indent="  ") == "  a  b"
    assert table([]) == ""


def test_models_lists_every_system(capsys):
    run_models()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-1] == "models" and "published FID, taken with" in lines[0]
    assert "2.07, 250 steps, no guidance" in next(line for line in lines if line.startswith("imagenet64"))
    for name, system in SYSTEMS.items():
        run_models(name)
        detail = capsys.readouterr().out
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        if system.published:
            best = system.published[0]
            assert f"{best.fid:.2f}, {best.conditions}" in line
        assert all(metric.conditions in detail for metric in system.published)
    assert [line.split()[0] for line in lines[2:]] == list(SYSTEMS)
    row = next(line for line in lines if line.startswith("imagenet256-up"))
    assert row.split(maxsplit=5)[1:5] == ["256", "1000", "1", "250+250"]
    assert row.endswith("  64x64_diffusion, 64x64_classifier, 64_256_upsampler")
    assert not any(line.endswith(" ") for line in lines)


def test_models_lists_every_file(capsys):
    run_models(files=True)
    out = capsys.readouterr().out
    for model in MODELS.values():
        assert f"\n{model.name} " in out
        assert model.shipped or str(model.url) in out
    row = next(line for line in out.splitlines() if line.startswith("256x256_diffusion_uncond"))
    assert row.split()[1:5] == ["unet", "552,814,086", "2,211,383,297", "sha256"]


def test_models_where_the_digits_are_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("admfast.models.preset_types.DIGITS_FOLDER", tmp_path)
    for model in MODELS.values():
        model.__dict__.pop("description", None)  # clear the cached description
    run_models(files=True)
    assert "not in this installation" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="this installation lacks it"):
        run_models("digits32")


def test_models_describes_one(capsys):
    run_models("imagenet512")
    out = capsys.readouterr().out
    assert "512x512_classifier.pt, guidance scale 4" in out
    assert (
        "FID 7.72, sFID 6.57, precision 0.87, recall 0.42, Inception Score 172.71 (Dhariwal & Nichol 2021, "
        in out
    )
    run_models("imagenet512-up")
    assert "128_512_upsampler.pt, 250 steps, from 128 pixels" in capsys.readouterr().out
    run_models("64x64_diffusion.pt")
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["use_new_attention_order"] == "True" and rows["noise_schedule"] == "cosine"
    assert rows["precision"] == "published with the torso in float16; by default bfloat16 on a GPU"
    assert rows["parameters"] == "295,904,454"
    with pytest.raises(
        InvalidArgument, match="name='imagenet265': no such system or model; nearest: imagenet256"
    ):
        run_models("imagenet265")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_heads=4", ("num_heads", 4)),
        ("dropout=0.1", ("dropout", 0.1)),
        ("use_new_attention_order=True", ("use_new_attention_order", True)),
        ("use_new_attention_order=false", ("use_new_attention_order", False)),
        ("use_new_attention_order=no", ("use_new_attention_order", False)),
        ("learn_sigma=1", ("learn_sigma", True)),
        ("attention_resolutions=8,16", ("attention_resolutions", (8, 16))),
        ("attention_resolutions=8", ("attention_resolutions", 8)),
        ("num_classes=None", ("num_classes", None)),
        ("channel_mult=0.5,1,2", ("channel_mult", (0.5, 1, 2))),
        ("channel_mult=[1, 2]", ("channel_mult", [1, 2])),
        ("noise_schedule=cosine", ("noise_schedule", "cosine")),
        ("kind = upsampler", ("kind", "upsampler")),
    ],
)
def test_options_on_the_command_line(text, expected):
    ((name, value),) = parse_settings("--set", [text]).items()
    assert (name, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["num_heads", "=4", ""])
def test_a_malformed_option(text):
    with pytest.raises(InvalidArgument, match="NAME=VALUE"):
        parse_settings("--set", [text])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("use_new_attention_order=maybe", "--set='use_new_attention_order=maybe': True or False"),
        ("device=cpu", "--set='device': no such option of a file"),
        ("learn_sigma=2", "--set='learn_sigma=2': True or False"),
        *((f"{name}=x", f"--set='{name}'") for name in ("precision", "name", "weights", "classifier")),
        *((f"{name}=x", f"--set='{name}'") for name in ("path", "dtype", "config", "preset", "checksums")),
    ],
)
def test_an_option_that_no_file_has_or_that_says_nothing(text, said):
    with pytest.raises(InvalidArgument, match=said):
        parse_settings("--set", [text])


def test_inspect_prints_the_report(tmp_path, capsys):
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET), Description(SMALL_UNET))
    run_inspect(tmp_path / "x.pt", batch=2, dtype="bfloat16")
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["network"] == "unet" and rows["values"] == "all finite"
    assert "at batch 2, torso bfloat16" in rows["memory"]


def test_inspect_takes_options(tmp_path, capsys):
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET))
    run_inspect(tmp_path / "x.pt", values=False)
    assert "give num_heads or num_head_channels" in capsys.readouterr().out
    options = ["num_heads=2", "use_new_attention_order=True", "image_size=32"]
    run_inspect(tmp_path / "x.pt", set_=options, values=False)
    assert "2 heads, new qkv order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "half"}, "dtype='half'"),
        ({"batch": 0}, "batch=0"),
        ({"set_": ["heads=4"]}, "nearest: "),
        ({"preset": "nothing"}, "preset='nothing'"),
    ],
    ids=str,
)
def test_inspect_refuses(tmp_path, arguments, said):
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET))
    with pytest.raises(InvalidArgument, match=said):
        run_inspect(tmp_path / "x.pt", **arguments)


def test_inspect_of_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        run_inspect(tmp_path / "x.pt")


@pytest.fixture
def fetched(monkeypatch):
    """Record the calls of `fetch` without using a network."""
    calls = []

    def pretend(name, folder, **options):
        calls.append((name, options))
        path = folder / f"{name}.pt"
        path.write_bytes(b"new")
        return FetchedFile(path, "http://x", 3, ("size",))

    monkeypatch.setattr(fetch_module, "fetch", pretend)
    return calls


def test_fetch_takes_systems_models_and_files(fetched, tmp_path, capsys):
    run_fetch(["imagenet512-up", "128x128_diffusion.pt", "lsun_cat"], out=tmp_path / "a" / "b", timeout=7.0)
    names = ["128x128_diffusion", "128x128_classifier", "128_512_upsampler", "lsun_cat"]
    assert [name for name, _ in fetched] == names
    assert fetched[0][1] == {"base_url": None, "overwrite": False, "timeout": 7.0, "retries": 3}
    out = capsys.readouterr().out.splitlines()
    assert out[3] == f"{tmp_path}/a/b/lsun_cat.pt: 3 bytes, checked by size"


def test_fetch_leaves_what_is_there(fetched, tmp_path, capsys):
    (tmp_path / "lsun_cat.pt").write_bytes(b"mine")
    run_fetch(["lsun_cat"], out=tmp_path)
    assert "is there already (4 bytes), left as it is" in capsys.readouterr().out
    assert fetched == [] and (tmp_path / "lsun_cat.pt").read_bytes() == b"mine"
    run_fetch(["lsun_cat"], out=tmp_path, overwrite=True)
    assert fetched[0][1]["overwrite"] is True
    (tmp_path / "256x256_diffusion_uncond.pt").write_bytes(b"half")
    with pytest.raises(OutputError, match="4 bytes, not the published 2,211,383,297"):
        run_fetch(["256x256_diffusion_uncond"], out=tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [(["imagnet64"], "nearest: imagenet64"), (["digits32"], "ships with the package")],
)
def test_fetch_refuses_before_it_begins(fetched, tmp_path, names, said):
    with pytest.raises(InvalidArgument, match=said):
        run_fetch(["lsun_cat", *names], out=tmp_path / "new")
    assert fetched == [] and not (tmp_path / "new").exists()


def test_fetch_into_what_is_no_folder(fetched, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not written"):
        run_fetch(["lsun_cat"], out=tmp_path / "file" / "below")


def test_a_fetch_that_fails_leaves_no_folder(monkeypatch, tmp_path):
    def refused(*given, **options):
        raise OutputError("the server is gone")

    monkeypatch.setattr(fetch_module, "fetch", refused)
    with pytest.raises(OutputError):
        run_fetch(["lsun_cat"], out=tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_wanted_files_are_unique():
    models = [preset(name) for name in ("64x64_diffusion", "64x64_classifier", "64_256_upsampler")]
    files = resolve_names(["imagenet64", "dinov2", "imagenet256-up", "dinov2"])
    dinov2 = PUBLISHED_WEIGHTS["dinov2"]
    assert files == {model.file: model for model in models} | dinov2
    assert list(files) == [*(model.file for model in models[:2]), *dinov2, models[2].file]


def test_typer_takes_the_signatures(app, tmp_path):
    runner = CliRunner()
    assert runner.invoke(app, ["models", "imagenet64"]).exit_code == 0
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET))
    arguments = ["--set", "num_heads=2", "--set", "use_new_attention_order=true", "--set", "image_size=16"]
    done = runner.invoke(app, ["inspect", str(tmp_path / "x.pt"), *arguments, "--no-values"])
    assert done.exit_code == 0 and "2 heads" in done.output
    failed = runner.invoke(app, ["inspect", str(tmp_path / "missing.pt")])
    assert isinstance(failed.exception, AdmfastError)
    for name in ("models", "inspect", "fetch"):
        shown = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert shown.count("efault") >= {"models": 2, "inspect": 5, "fetch": 5}[name], shown


def test_a_file_beside_the_weights_answers_the_question(tmp_path, capsys):
    """The JSON file can be written by hand; the error message suggests that."""
    write_weights(tmp_path / "x.pt", random_state(SMALL_UNET))
    document = {"format": "admfast-1", "network": SMALL_UNET.to_dict()}
    (tmp_path / "x.json").write_text(json.dumps(document))
    run_inspect(tmp_path / "x.pt", values=False)
    assert "source      the description that the file carries" in capsys.readouterr().out
