"""Train a small class-conditional model on a folder of images with your own loop.

    python examples/train_on_a_folder.py FOLDER model.safetensors --steps 2000
    admfast sample model.safetensors --classes 0-3 --per-class 4 --out out/

Each folder in FOLDER is a class. `learner.update(batch)` makes one step, and any loop may call it. In
addition, `admfast train` writes snapshots, logs and grids, resumes exactly, and uses several processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from admfast.checkpoints import write_weights
from admfast.models.description import Description
from admfast.training.images import training_source
from admfast.training.learner import Learner
from admfast.training.loop import build_samples
from admfast.training.loss import make_batch
from admfast.training.network import build_network
from admfast.training.recipes import recipe_from_preset
from admfast.training.samples import iterate_batches


def train(folder: Path, out: Path, steps: int, batch_size: int, device: str) -> list[float]:
    """Train for `steps` steps and write the averaged weights to `out`; return the mean loss of every step."""
    source = training_source(folder)
    settings = recipe_from_preset(
        "diffusion", steps=steps, batch_size=batch_size, num_classes=len(source.class_names), in_channels=3,
        random_flip=True, warmup=min(200, steps), ema=0.999, precision="fp32",
    )  # fmt: skip
    learner = Learner(settings, build_network(settings).to(device))
    # The image, crop, flip, timestep, noise and dropout of sample k depend only on the seed and on k.
    numbers = (range(step * batch_size, (step + 1) * batch_size) for step in range(steps))
    losses = []
    for images in iterate_batches(build_samples(settings, source), numbers):
        batch = make_batch(settings, learner.sampler, images.sample_ids, images.images, images.labels, device)
        report = learner.update(batch)
        losses.append(float(report.terms["loss"].mean()))
        if learner.step % 100 == 0:
            print(f"step {learner.step}: loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    description = Description(settings.network, settings.process, {"recipe": settings.to_dict()})
    write_weights(out, learner.averages.weights(), description)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(arguments.folder, arguments.out, arguments.steps, arguments.batch_size, arguments.device)
    print(arguments.out.resolve())
