"""Tests of the counted memory of a training step against that of a real step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from admfast.checkpoints.describe import LiveBytes
from admfast.cli.main import main
from admfast.models import UNetConfig
from admfast.models.layers import ResBlock
from admfast.training.learner import Learner
from admfast.training.loss import make_batch
from admfast.training.memory import step_memory
from admfast.training.network import build_network
from admfast.training.recipe import KINDS, Recipe
from admfast.training.recipes import recipe_from_preset
from tests.small import PROCESS
from tests.training.small_runs import learner_of, small_recipe

ROOT = Path(__file__).resolve().parents[2]
# 64x64 pixels with few channels: activations are nearly all of a step's memory.
WIDE = {"image_size": 64, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 2}
WIDE |= {"attention_resolutions": (4,), "channel_mult": (1, 1, 2), "num_heads": 2, "num_head_channels": 32}
WIDE |= {"use_scale_shift_norm": True, "resblock_updown": True, "dropout": 0.1}


def wide(**changes: object) -> Recipe:
    settings = {"network": UNetConfig(**WIDE), "process": PROCESS, "precision": "fp32", "ema": (0.99,)}
    return Recipe(kind="diffusion", steps=2, lr=1e-4, **{**settings, "batch_size": 16, **changes})


def steps(learner: Learner, count: int = 2) -> None:
    """Make training steps on random images."""
    recipe, network = learner.recipe, learner.recipe.network
    n = recipe.batch_size
    shape = (n, network.in_channels, network.image_size, network.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    for first in range(0, count * n, n):
        labels = None if recipe.num_image_classes is None else torch.zeros(n, dtype=torch.int64)
        learner.update(make_batch(recipe, learner.sampler, range(first, first + n), images, labels))


def alive(recipe: Recipe) -> int:
    """Return the peak bytes of tensors in a real step, without those that exist before it."""
    learner = learner_of(recipe)
    steps(learner)
    learner.optimiser.zero_grad()
    with (live := LiveBytes(learner.net, {})):
        steps(learner, 1)
    return live.peak


CASES = [(kind, *of) for kind in KINDS for of in (("fp32", "none"), ("bf16", "all"))]
CASES += [("diffusion", "fp32", "attention"), ("diffusion", "bf16", 2)]


@pytest.mark.parametrize("kind, precision, checkpointing", CASES)
def test_as_many_bytes_are_alive_as_in_a_real_step(kind, precision, checkpointing):
    changes = {"precision": precision, "checkpointing": checkpointing, "batch_size": 32, "microbatch": 16}
    recipe = small_recipe(kind, **changes)
    found = step_memory(recipe)
    counted = found.peak - found.parameters - found.moments - found.averages
    pixels = 4 * 32 * recipe.network.image_size**2
    # The images, their noise and the terms of the loss add a few images more.
    assert counted <= alive(recipe) <= counted + 20 * pixels


def test_parameters_moments_and_averages_by_arithmetic():
    count = sum(p.numel() for p in learner_of(small_recipe()).net.parameters())
    found = step_memory(small_recipe(ema=(0.9, 0.99), ema_power=(0.1,)))
    assert (found.parameters, found.gradients, found.moments) == (4 * count, 4 * count, 8 * count)
    assert found.averages == 3 * 4 * count
    frozen = step_memory(small_recipe(freeze=("input_blocks.*", "middle_block.*", "time_embed.*")))
    names = dict(learner_of(small_recipe()).net.named_parameters())
    left = sum(p.numel() for name, p in names.items() if name.startswith(("output_blocks", "out", "label")))
    assert (frozen.parameters, frozen.gradients, frozen.moments) == (4 * count, 4 * left, 8 * left)


def test_what_saves_memory_does():
    whole = step_memory(wide())
    assert whole.saved_for_backward > 0.9 * whole.peak
    parts = step_memory(wide(microbatch=4))
    assert (
        parts.saved_for_backward == pytest.approx(whole.saved_for_backward / 4, rel=0.01)
        and parts.peak < whole.peak / 3
    )
    assert step_memory(wide(checkpointing="all")).peak < whole.peak / 2
    assert step_memory(wide(precision="bf16")).saved_for_backward < 0.7 * whole.saved_for_backward


# Makes small steps first, because libraries allocate 200 MB in the first step of any network.
MEASURE = """
import resource, sys
from admfast.engine.numerics import peak_memory
from tests.training.small_runs import learner_of, small_recipe
from tests.training.test_step_memory import *
torch.set_num_threads(1)
steps(learner_of(small_recipe()))
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
steps(Learner(recipe := wide(**json.loads(sys.argv[1])), build_network(recipe)))
print(peak_memory(torch.device("cpu")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("changes", [{"batch_size": 8}, {"checkpointing": "all"}], ids=["none", "all"])
def test_the_peak_is_that_of_a_process_within_a_fifth(changes):
    # Otherwise glibc keeps fragments of freed memory, up to a third of a step's peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(changes)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert step_memory(wide(**changes)).peak == pytest.approx(int(done.stdout), rel=0.2)


def test_the_command_says_it_for_presets_and_files(tmp_path, capsys):
    assert main(["inspect", "digits32", "--train", "--precision", "fp32", "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    for kind in KINDS:
        found = step_memory(recipe_from_preset(kind, precision="fp32", batch_size=8))
        assert f"{kind} " in printed and f"{found.peak / 1e6:.1f} MB" in printed
    run = str(tmp_path / "run")
    assert main(["train", "diffusion", "--out", run, "--steps", "1", "--set", "channel_mult=1"]) == 0
    capsys.readouterr()
    options = ["--microbatch", "4", "--checkpointing", "2", "--precision", "bf16", "--set", "ema=0.5,0.9"]
    assert main(["inspect", run, "--train", *options]) == 0
    changes = {"microbatch": 4, "checkpointing": 2, "precision": "bf16", "ema": (0.5, 0.9)}
    found = step_memory(recipe_from_preset("diffusion", channel_mult=(1,), **changes))
    assert f"{found.peak / 1e6:.1f} MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["imagnet64", "--train"], "imagenet64"),
        (["digits32", "--train", "--checkpointing", "some"], "--checkpointing"),
        (["digits32", "--train", "--microbatch", "1000"], "--microbatch"),
        (["digits32", "--train", "--set", "colour=1"], "colour"),
        (["digits32", "--train", "--batch", "256"], "use --batch-size"),
        (["digits32", "--train", "--dtype", "float16"], "use --precision"),
        (["digits32", "--train", "--preset", "64x64_diffusion"], "in place of the file"),
        (["digits32", "--train", "--no-values"], "leave it out"),
        (["digits32", "--batch-size", "3"], "--batch-size"),
        (["digits32", "--precision", "bf16"], "--precision"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, named):
    assert main(["inspect", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and named in printed


def test_norms_that_are_made_again_are_not_kept():
    plain, again = (
        wide(checkpointing=which, network=UNetConfig(**{**WIDE, "dropout": 0.0}))
        for which in ("none", "norms")
    )
    blocks = [module for module in build_network(plain).modules() if isinstance(module, ResBlock)]
    # In a block that resamples, the input of the first convolution is still kept.
    saved = 0
    sides = [64] * 2 + [32] * 3 + [16] * 8 + [32] * 4 + [64] * 4  # side of each block's output
    for block, side in zip(blocks, sides, strict=True):
        channels = block.out_layers[0].num_channels + (
            block.in_layers[0].num_channels if block.resample is None else 0
        )
        saved += 4 * plain.batch_size * channels * side**2
    assert step_memory(plain).saved_for_backward - step_memory(again).saved_for_backward == saved
