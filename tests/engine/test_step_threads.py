"""Tests of a step's thread count: work and machine decide it unless the user does; results don't change."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import admfast
from admfast import host
from admfast.engine.numerics import THREAD_VARIABLES, choose_threads, on_threads
from admfast.engine.options import EngineOptions
from admfast.engine.threads import convolution_operations, threads_for
from admfast.errors import InvalidArgument
from admfast.models.presets import SYSTEMS
from tests.small import pipeline


@pytest.fixture(autouse=True)
def two_of_nobodys_choice(monkeypatch: pytest.MonkeyPatch):
    """Set up torch as on a machine with two processors where the user has chosen no number of threads."""
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"usable_cpus": 2, "usable_cores": 2, "processor_ids": {0, 1}}.items():
        monkeypatch.setattr(host, name, lambda value=value: value)
    with restored():
        torch.set_num_threads(2)
        yield


class restored:
    """Context manager that restores torch's number of threads."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def work(name: str, batch: int) -> int:
    config = SYSTEMS[name].diffusion.config
    return convolution_operations(config, (batch, config.in_channels, *[config.image_size] * 2))


def test_the_work_is_a_convolution_at_full_resolution():
    assert work("imagenet64", 3) == 3 * 2 * 9 * 192 * 192 * 64 * 64
    narrow = SimpleNamespace(model_channels=32, channel_mult=(0.5, 1), dims=3)
    assert convolution_operations(narrow, (2, 1, 4, 5, 6)) == 2 * 2 * 27 * 16 * 16 * 4 * 5 * 6


@pytest.mark.parametrize(
    ("name", "batch", "processors", "threads"),
    [
        *(("digits32", batch, 2, 1) for batch in (1, 4, 16)),
        *(("imagenet64", batch, 2, 2) for batch in (1, 4)),
        ("imagenet64", 1, 1, 1),
        ("digits32", 1, 64, 1),
        ("imagenet64", 4, 64, 63),
        ("imagenet256", 8, 64, 64),
    ],
)
def test_threads_by_work_and_processors(name, batch, processors, threads):
    assert threads_for(work(name, batch), processors) == threads


@pytest.mark.parametrize("processors", [1, 2, 3, 8])
def test_more_work_never_has_fewer_threads(processors):
    found = [threads_for(2.0**i, processors) for i in range(60)]
    assert found == sorted(found) and (found[0], found[-1]) == (1, processors)


@pytest.mark.parametrize("name", THREAD_VARIABLES)
def test_the_environment_decides(name, monkeypatch):
    assert choose_threads(None, 1) == 1
    monkeypatch.setenv(name, "2")
    assert (choose_threads(None, 1), choose_threads(1, 2)) == (2, 1)


@pytest.mark.parametrize("asked", [1, 3])
def test_a_number_that_is_not_torchs_own_decides(asked):
    torch.set_num_threads(asked)
    assert [choose_threads(None, own) for own in (1, 2)] == [asked] * 2


def test_a_quota_is_nobodys_choice(monkeypatch):
    monkeypatch.setattr(host, "processor_ids", lambda: set(range(64)))
    for threads in (2, 64):
        torch.set_num_threads(threads)
        assert choose_threads(None, 1) == 1


def mkl() -> int | None:
    """Return MKL's number of threads, or None if torch has no MKL."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return None if found is None else int(found[1])


def test_only_the_calling_thread_computes_on_another_number():
    seen = []

    def look() -> tuple[int, int | None]:
        return torch.get_num_threads(), mkl()

    before = look()
    with ThreadPoolExecutor(1) as older, ThreadPoolExecutor(1) as newer:
        older.submit(look).result()
        with pytest.raises(ZeroDivisionError), on_threads(1):
            seen = [look(), older.submit(look).result(), newer.submit(look).result()]
            raise ZeroDivisionError
        seen += [look(), older.submit(look).result(), newer.submit(look).result()]
    assert seen == [(1, before[1] and 1), *[before] * 5]


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("asked", [None, 2])
def test_a_row_runs_on_the_steps_threads_and_a_callback_on_the_users(asked, prepared):
    pipe = pipeline(options=EngineOptions(threads=asked, fold=None, prepared=prepared))
    inside, between = [], []
    for net in (pipe.net, pipe.classifier):
        net.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))
    for given in (2, 1):
        torch.set_num_threads(given)
        pipe.sample(seeds=[1], steps=2, callback=lambda _: between.append(torch.get_num_threads()))
        assert (set(inside), set(between)) == ({asked or 1}, {given}) and torch.get_num_threads() == given
        inside.clear()
        between.clear()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_is_refused(threads):
    with pytest.raises(InvalidArgument, match="threads"):
        EngineOptions(threads=threads)


def test_the_number_of_threads_changes_no_bit_of_a_step():
    images = [
        admfast.load("digits32", engine=EngineOptions(threads=threads)).sample(
            [1, 2, 3], [0, 1, 2], steps=3, output="float"
        )
        for threads in (1, 2)
    ]
    assert torch.equal(*images)
