"""CUDA graphs of a prepared step: one of the guided body, one of the unguided."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")
WARM_UPS = 3  # compiles kernels and lets cuDNN search, which neither may happen while capturing


def capture(step: PreparedStep) -> None:
    """Run a step's rows by replaying graphs from now on; where CUDA refuses, as before, and say why.

    The step must not be filled yet: warming up writes to its buffers. Errors of the networks themselves show
    in the warm-up, and are raised.
    """
    device = step.state.x.device
    with torch.cuda.device(device), torch.no_grad():
        here, side = torch.cuda.current_stream(), torch.cuda.Stream(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for body in step.run.values():
                for _ in range(WARM_UPS):
                    step.counters.zero_()
                    body()
        here.wait_stream(side)
        torch.cuda.synchronize(device)
        pool, captured = torch.cuda.graph_pool_handle(), {}
        try:
            for guided, body in step.run.items():
                graph = torch.cuda.CUDAGraph()
                # Only this thread's calls are watched: a user's other threads may go on working.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    body()
                captured[guided] = graph.replay
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            step.refused = str(error).strip().splitlines()[0]
            LOG.warning("rows are launched one by one: no CUDA graph of the step (%s)", step.refused)
            return
    step.run.update(captured)
