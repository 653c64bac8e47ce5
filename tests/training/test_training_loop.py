"""The training loop: exact resume, the average, the rate, and how it stops."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.errors import CheckpointError, InvalidArgument, NonFiniteError, OutputError
from admfast.models.fold import FoldOptions
from admfast.training.loop import Batch, TrainConfig, train
from tests.small import unet

CONFIG = TrainConfig(steps=12, batch_size=2, lr=1e-2, warmup=4, save_seconds=0.0, weight_decay=0.1)


def batches(generator: torch.Generator) -> Iterator[Batch]:
    """Endless random images, drawn from the generator alone."""
    while True:
        x, noise = (torch.randn(2, 1, 8, 8, generator=generator) for _ in range(2))
        labels = torch.randint(4, (2,), generator=generator)
        yield Batch(x, labels, torch.randint(1000, (2,), generator=generator), noise)


class Elementwise(nn.Module):
    """Products and dropout alone: no sum whose order could depend on where a tensor lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(x * self.scale + y.view(-1, 1, 1, 1))


class Training:
    """A network with its loss; `stop_at` is the number of the call that a kill interrupts."""

    def __init__(self, net: nn.Module, stop_at: int | None = None, bad_at: int | None = None):
        self.net, self.stop_at, self.bad_at = net.train(), stop_at, bad_at
        self.calls: list[Tensor] = []

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.calls.append(batch.images)
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        out = self.net(batch.images, batch.t, batch.labels)[:, :1]
        loss = (out - batch.noise).square().flatten(1).mean(1)
        if len(self.calls) == self.bad_at:
            loss = loss * float("nan")
        return {"loss": loss, "size": out.abs().mean()}

    def run(self, out: Path, config: TrainConfig = CONFIG) -> nn.Module:
        return train(self.net, self, batches, config, out)


def assert_equal_states(found: nn.Module, wanted: nn.Module) -> None:
    a, b = found.state_dict(), wanted.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Resume


@pytest.mark.parametrize("stop_at", [2, 6, 12])
def test_a_run_that_was_killed_and_resumed_is_one_that_was_not(tmp_path, stop_at):
    whole = Training(Elementwise())
    whole_ema = whole.run(tmp_path / "whole")
    killed = Training(Elementwise(), stop_at)
    with pytest.raises(KeyboardInterrupt):
        killed.run(tmp_path / "killed")
    torch.manual_seed(123)  # what the process draws meanwhile must not matter
    resumed = Training(Elementwise())
    with torch.no_grad():
        resumed.net.scale.fill_(7.0)  # the saved state must replace it
    ema = resumed.run(tmp_path / "killed")
    assert_equal_states(resumed.net, whole.net)
    assert_equal_states(ema, whole_ema)
    assert len(resumed.calls) == 12 - stop_at + 1
    assert torch.equal(resumed.calls[0], whole.calls[stop_at - 1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of products are ordered by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_unet_resumes_exactly(tmp_path, one_thread):
    config = TrainConfig(steps=3, batch_size=2, lr=1e-3, warmup=1, save_seconds=0.0)
    whole = Training(unet(dropout=0.5))
    whole_ema = whole.run(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        Training(unet(dropout=0.5), stop_at=3).run(tmp_path / "killed", config)
    resumed = Training(unet(seed=1, dropout=0.5))
    ema = resumed.run(tmp_path / "killed", config)
    assert_equal_states(resumed.net, whole.net)
    assert_equal_states(ema, whole_ema)


def test_a_run_that_is_done_stays_done(tmp_path):
    first = Training(Elementwise())
    ema = first.run(tmp_path)
    state = (tmp_path / "state.pt").read_bytes()
    again = Training(Elementwise())
    assert_equal_states(again.run(tmp_path), ema)
    assert not again.calls and (tmp_path / "state.pt").read_bytes() == state


def test_more_steps_go_on_from_where_it_ended(tmp_path):
    Training(Elementwise()).run(tmp_path)
    longer = Training(Elementwise())
    longer.run(tmp_path, dataclasses.replace(CONFIG, steps=15))
    assert len(longer.calls) == 3


def test_states_are_saved_now_and_then(tmp_path):
    killed = Training(Elementwise(), stop_at=12)
    with pytest.raises(KeyboardInterrupt):
        killed.run(tmp_path, TrainConfig(steps=12, batch_size=2, lr=1e-2, save_seconds=3600.0))
    assert not (tmp_path / "state.pt").exists(), "an hour has not passed"


def test_states_that_are_not_this_training_s_are_refused(tmp_path):
    Training(Elementwise()).run(tmp_path)
    with pytest.raises(CheckpointError, match="state.pt: not a state of this training: ") as caught:
        Training(unet()).run(tmp_path)
    assert "\n" not in str(caught.value)
    data = (tmp_path / "state.pt").read_bytes()
    for content in (data[:200], b"", b"not a state"):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="state.pt: not a state of this training"):
            Training(Elementwise()).run(tmp_path)


# What a step does


def test_the_average_is_frozen_and_follows_the_weights(tmp_path):
    weights: list[Tensor] = []

    class Watched(Training):
        def __call__(self, batch):
            weights.append(self.net.scale.detach().clone())
            return super().__call__(batch)

    training = Watched(Elementwise())
    config = TrainConfig(steps=12, batch_size=2, lr=1e-2, warmup=4, ema_decay=0.3)
    ema = training.run(tmp_path, config)
    weights.append(training.net.scale.detach())
    average = weights[0].double()
    for step, value in enumerate(weights[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value.double()
    # Twelve averages, each rounded to float32.
    torch.testing.assert_close(ema.scale.double(), average, rtol=0, atol=12 * 2**-24)
    assert not ema.training and not ema.scale.requires_grad and ema is not training.net
    assert training.net.training


def test_a_folded_network_that_was_trained_is_folded_anew(tmp_path):
    net = unet().requires_grad_(False)
    net.fold()
    net.requires_grad_(True)
    Training(net).run(tmp_path, dataclasses.replace(CONFIG, steps=1))
    net.eval().requires_grad_(False)
    wanted = unet(1)
    wanted.load_state_dict(net.state_dict())
    wanted.requires_grad_(False).fold()
    net.ensure_folded(FoldOptions(), torch.float32)
    given = torch.ones(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1])
    assert net.is_folded and torch.equal(net(*given), wanted(*given))


def test_the_first_step_moves_every_weight_by_the_rate(tmp_path):
    training = Training(Elementwise())
    before = training.net.scale.detach().clone()
    training.run(tmp_path, TrainConfig(steps=1, batch_size=2, lr=0.01, warmup=1, cooldown=0.0))
    moved = (training.net.scale.detach() - before).abs()
    # Adam's first step is lr * g / (|g| + 1e-8); dropout leaves few weights without a gradient at all.
    assert moved.max() <= 0.01 * (1 + 1e-5) and moved[moved > 0].min() > 0.0099


def test_learning_rate_rises_holds_and_falls():
    config = TrainConfig(steps=100, batch_size=1, lr=2.0, warmup=10, cooldown=0.3)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9:71] == [2.0] * 62
    assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 30)
    flat = TrainConfig(steps=10, batch_size=1, lr=2.0, warmup=0, cooldown=0.0)
    assert {flat.rate(step) for step in range(10)} == {2.0}


def test_the_log_has_means_of_a_hundred_steps(tmp_path, capsys):
    config = TrainConfig(steps=200, batch_size=2, lr=1e-3, save_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        Training(Elementwise(), stop_at=151).run(tmp_path, config)
    resumed = Training(Elementwise())
    resumed.run(tmp_path, config)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 200]
    assert set(rows[0]) == {"step", "images_per_second", "loss", "size"}
    # The second row is that of the fifty steps after the kill: a mean, not half of one.
    assert 0.5 < rows[1]["size"] / rows[0]["size"] < 1.5
    assert capsys.readouterr().out.count("images_per_second") == 2


# How it stops


def test_a_loss_that_is_nan_stops_before_the_weights_are_touched(tmp_path):
    training = Training(Elementwise(), bad_at=4)
    with pytest.raises(NonFiniteError) as caught:
        training.run(tmp_path)
    assert str(caught.value) == f"the loss of step 3 is nan; the last saved state is {tmp_path / 'state.pt'}"
    assert training.net.scale.isfinite().all()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3


def test_a_gradient_that_is_infinite_stops_before_the_weights_are_touched(tmp_path):
    net = Elementwise().train()
    before = net.scale.detach().clone()

    def loss(batch: Batch) -> dict[str, Tensor]:
        # The root has an infinite slope at 0, where its value is fine.
        return {"loss": (0 * net.scale).abs().sqrt().mean().view(1) + F.mse_loss(net.scale, net.scale)}

    with pytest.raises(NonFiniteError, match="the gradient of step 0 has norm (nan|inf); the last saved"):
        train(net, loss, batches, CONFIG, tmp_path)
    assert torch.equal(net.scale, before) and not (tmp_path / "state.pt").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/state.pt: not written: File exists"):
        Training(Elementwise()).run(tmp_path / "file")
    with pytest.raises(OutputError, match="below/state.pt: not written: .*/file/below is not a folder"):
        Training(Elementwise()).run(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps=0: a whole number"),
        ({"batch_size": 0}, "batch_size=0: a whole number"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup": -1}, "warmup=-1"),
        ({"save_seconds": -1.0}, "save_seconds=-1.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"cooldown": 1.5}, "cooldown=1.5"),
    ],
)
def test_settings_that_are_not_allowed(changes, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainConfig(**{"steps": 1, "batch_size": 1, "lr": 1e-3, **changes})
