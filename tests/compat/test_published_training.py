"""Tests of the published training loop: files, resuming, logs. tests/parity tests its arithmetic."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from admfast.compat.guided_diffusion import dist_util, image_datasets, logger, script_util, train_util
from admfast.compat.guided_diffusion.fp16_util import MixedPrecisionTrainer
from admfast.errors import CheckpointError


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1, {}


def loop(folder: Path, steps: int, resume="", data=None, **options):
    """Train a small network, with its files in `folder`, and return the loop."""
    torch.manual_seed(0)
    net = script_util.create_model(16, 32, 1, channel_mult="1,2", num_head_channels=16, learn_sigma=True)
    diffusion = script_util.create_gaussian_diffusion(learn_sigma=True)
    train_loop = train_util.TrainLoop(
        model=net, diffusion=diffusion, data=data or batches(), batch_size=4, microbatch=-1, lr=1e-3,
        ema_rate="0.5,0.9", log_interval=1, save_interval=2, resume_checkpoint=resume,
        lr_anneal_steps=steps, **options,
    )  # fmt: skip
    with logger.scoped_configure(str(folder), ["csv", "json", "log"]):
        np.random.seed(len(resume))
        torch.manual_seed(1)
        train_loop.run_loop()
    return train_loop


def test_a_run_goes_on_where_its_files_end(tmp_path):
    first = loop(tmp_path / "a", 3)
    names = sorted(path.name for path in (tmp_path / "a").glob("*.pt"))
    assert names == [
        f"{kind}{step:06d}.pt" for kind in ("ema_0.5_", "ema_0.9_", "model", "opt") for step in (0, 2)
    ]
    resumed = loop(tmp_path / "b", 3, resume=str(tmp_path / "a" / "model000002.pt"))
    assert resumed.resume_step == 2
    # As in the published code, the resumed loop repeats step 2. It starts from the files.
    state = dist_util.load_state_dict(tmp_path / "a" / "opt000002.pt")
    assert len(state["state"]) == len(first.opt.state_dict()["state"])
    again = loop(tmp_path / "c", 2, resume=str(tmp_path / "a" / "model000002.pt"))  # no step is left to run
    for parameter, saved in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(parameter, saved)
    for rate, average in zip((0.5, 0.9), again.ema_params, strict=True):
        saved = dist_util.load_state_dict(tmp_path / "a" / f"ema_{rate}_000002.pt")
        assert all(torch.equal(a, b) for a, b in zip(average, saved.values(), strict=True))


def test_numbers_are_logged_in_every_format(tmp_path):
    loop(tmp_path, 3)
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [int(row["step"]) for row in rows] == [line["step"] for line in lines] == [0, 1, 2]
    assert [row["samples"] for row in rows] == ["4", "8", "12"]
    for row, line in zip(rows, lines, strict=True):
        assert {name for name, value in row.items() if value} == set(line)
        assert float(row["loss"]) == pytest.approx(line["mse"] + line["vb"])
    text = (tmp_path / "log.txt").read_text()
    assert "grad_norm" in text and "saving model000002.pt" in text


def test_means_of_an_iteration_and_levels(tmp_path, capsys):
    with logger.scoped_configure(str(tmp_path), ["stdout"]):
        for value in (1.0, 2.0, 6.0):
            logger.logkv_mean("x", value)
        logger.logkv("a long name that does not fit in a column", "text")
        logger.debug("hidden")
        assert logger.dumpkvs()["x"] == 3.0 and logger.getkvs() == {}
        logger.set_level(logger.ERROR)
        logger.warn("hidden too")
    printed = capsys.readouterr().out
    assert "| 3 " in printed and "..." in printed and "hidden" not in printed
    with pytest.raises(ValueError, match="tensorboard"):
        logger.configure(str(tmp_path), ["tensorboard"])


def test_half_precision_skips_a_step_that_overflows(tmp_path):
    net = script_util.create_model(16, 32, 1, channel_mult="1,1", use_fp16=True)
    with logger.scoped_configure(str(tmp_path), []):
        trainer = MixedPrecisionTrainer(model=net, use_fp16=True, initial_lg_loss_scale=4.0)
        assert [tuple(p.shape[:-1]) for p in trainer.master_params] == [(), (1,)]
        assert {p.dtype for p in trainer.master_params} == {torch.float32}
        optimiser = torch.optim.SGD(trainer.master_params, lr=1.0)
        before = [p.detach().clone() for p in trainer.master_params]
        out = net.out[2].weight
        for factor, train_loop in ((float("inf"), False), (1.0, True)):
            trainer.zero_grad()
            trainer.backward(factor * (out * torch.ones_like(out)).sum())
            assert trainer.optimize(optimiser) is train_loop
        assert trainer.lg_loss_scale == 4.0 - 1 + 1e-3
    # The gradient of the sum is 1 for every element of `out` and 0 for all other parameters.
    moved = trainer.master_params_to_state_dict(
        [a - b for a, b in zip(before, trainer.master_params, strict=True)]
    )
    assert torch.equal(moved["out.2.weight"], torch.ones_like(out, dtype=torch.float32))
    assert moved["input_blocks.0.0.weight"].abs().max() == 0
    assert torch.equal(out, trainer.master_params_to_state_dict(trainer.master_params)["out.2.weight"])


def test_images_come_scaled_with_the_class_of_their_names(tmp_path):
    levels = {"b_1.png": 0, "a_2.jpeg": 255, "sub/a_3.PNG": 51}
    (tmp_path / "sub").mkdir()
    for name, level in levels.items():
        Image.new("RGB", (20, 24), (level,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = image_datasets.load_data(
        data_dir=str(tmp_path), batch_size=3, image_size=16, class_cond=True, deterministic=True
    )
    images, labels = next(data)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert labels["y"].tolist() == [0, 1, 0]
    for kwargs, named in (
        ({"data_dir": str(tmp_path / "nowhere"), "batch_size": 1}, "data_dir"),
        ({"data_dir": str(tmp_path), "batch_size": 4}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=named):
            next(image_datasets.load_data(image_size=16, **kwargs))


def test_one_process_makes_a_group_of_its_own():
    assert not dist.is_initialized()
    try:
        dist_util.setup_dist()
        dist_util.setup_dist()
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        parameter = torch.ones(2)
        dist_util.sync_params([parameter])
        gathered = [torch.zeros(2)]
        dist.all_gather(gathered, parameter)
        assert torch.equal(gathered[0], parameter)
    finally:
        dist.destroy_process_group()


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        dist_util.load_state_dict(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match=r"y\.pt"):
        dist_util.load_state_dict(str(tmp_path / "y.pt"), map_location="cpu")
    torch.save(Path("x"), tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="code"):
        dist_util.load_state_dict(str(tmp_path / "code.pt"))


@pytest.mark.parametrize(
    ("name", "step"), [("a/model000120.pt", 120), ("ema_0.9_000120.pt", 0), ("models/x.pt", 0), ("model7", 7)]
)
def test_the_step_is_in_the_name(name, step):
    assert train_util.parse_resume_step_from_filename(name) == step
