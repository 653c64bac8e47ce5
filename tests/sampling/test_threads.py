"""Tests of pipelines that several threads use, and that are called from each other's callbacks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.small import assert_close, pipeline

GIVEN = {"classes": [1, 2], "seeds": [3, 4], "steps": 3, "output": "float"}
PATIENCE = 60.0  # seconds to wait for work of about one second


def waited(threads: list[threading.Thread]) -> bool:
    """Start threads and return whether all of them end in time."""
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return not any(thread.is_alive() for thread in threads)


def test_callbacks_that_cross_do_not_wait_for_each_other():
    first, second = pipeline(), pipeline()
    both = threading.Barrier(2, timeout=PATIENCE)
    met = []

    def work(own, other) -> None:
        def crossing(progress) -> None:
            if progress.done == 1:
                both.wait()
                met.append(other.sample(**GIVEN))

        own.sample(**GIVEN, callback=crossing)

    pairs = ((first, second), (second, first))
    assert waited([threading.Thread(target=work, args=pair) for pair in pairs]) and len(met) == 2
    assert torch.equal(met[0], met[1]) and torch.equal(met[0], pipeline().sample(**GIVEN))


def test_a_callback_may_wait_for_a_thread_that_uses_the_pipeline():
    pipe, found = pipeline(), []

    def waiting(progress) -> None:
        if progress.done == 1:
            worker = threading.Thread(target=lambda: found.append(pipe.sample(**GIVEN)))
            assert waited([worker])

    outer = pipe.sample(**GIVEN, callback=waiting)
    assert torch.equal(found[0], outer)


def test_several_threads_get_the_images_that_one_gets():
    pipe = pipeline()
    sizes = [1, 2, 3, 4, 5, 1, 2, 3]
    wanted = [pipeline().sample([1], range(n), steps=3, output="float") for n in sizes]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda n: pipe.sample([1], range(n), steps=3, output="float"), sizes))
    # Threads may run different algorithms of a convolution, for example one packed for another shape.
    for got, exact in zip(found, wanted, strict=True):
        assert_close(got, exact)
