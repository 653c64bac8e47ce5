"""Tests of `python -m admfast.accelerate --package`: `guided_diffusion` is imported from admfast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import argparse
import torch
import blobfile as bf
from guided_diffusion import dist_util, logger
from guided_diffusion.script_util import (
    model_and_diffusion_defaults, create_model_and_diffusion, add_dict_to_argparser, args_to_dict,
)
parser = argparse.ArgumentParser()
add_dict_to_argparser(parser, model_and_diffusion_defaults())
args = parser.parse_args()
dist_util.setup_dist()
logger.configure()
model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / max(parameter[0].numel(), 4) ** 0.5)
model.eval().to(dist_util.dev())
sample = diffusion.p_sample_loop(model, (1, 3, 16, 16), clip_denoised=True)
*_, last = diffusion.p_sample_loop_progressive(model, (1, 3, 16, 16))
with bf.BlobFile(bf.join(logger.get_dir(), "a.txt"), "w") as file:
    file.write(type(model).__module__)
logger.log("mean", f"{sample.mean():.3f}", bf.exists(file.name))
"""
FLAGS = (
    "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --learn_sigma True "
    "--timestep_respacing 4 --attention_resolutions 8"
).split()


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENAI_LOGDIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_a_program_of_the_published_package_runs(tmp_path):
    (tmp_path / "sample.py").write_text(PROGRAM)
    found = run(tmp_path, "-m", "admfast.accelerate", "--package", "sample.py", *FLAGS)
    assert found.returncode == 0, found.stderr
    assert "mean" in found.stdout and "True" in found.stdout
    # p_sample_loop makes four steps as a prepared loop, of which the last repeats recorded operations without
    # a call; p_sample_loop_progressive makes four one by one.
    assert "7 calls" in found.stderr and "whole" in found.stderr
    assert (tmp_path / "a.txt").read_text() == "admfast.compat.guided_diffusion.unet"
    without = run(tmp_path, "-m", "admfast.accelerate", "sample.py", *FLAGS)
    assert without.returncode != 0 and "blobfile" in without.stderr


def test_the_package_hides_a_copy_beside_the_program(tmp_path):
    (tmp_path / "guided_diffusion").mkdir()
    (tmp_path / "guided_diffusion" / "__init__.py").write_text("raise SystemExit('the copy')")
    (tmp_path / "says.py").write_text("import guided_diffusion; print(guided_diffusion.__doc__.split()[0])")
    found = run(tmp_path, "-m", "admfast.accelerate", "--package", "says.py")
    assert found.stdout == "The\n" and str(tmp_path / "guided_diffusion") in found.stderr
    assert "the copy" in run(tmp_path, "-m", "admfast.accelerate", "says.py").stderr


def test_a_real_blobfile_is_preferred(tmp_path):
    (tmp_path / "blobfile.py").write_text("name = 'real'")
    (tmp_path / "says.py").write_text("import blobfile; print(blobfile.name)")
    assert run(tmp_path, "-m", "admfast.accelerate", "--package", "says.py").stdout == "real\n"
