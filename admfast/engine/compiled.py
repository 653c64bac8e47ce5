"""Compile a prepared step by torch.compile, compare it with the eager step, and cache the compiled code."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from admfast.engine.guidance import LOSS_SCALE, RowKind
from admfast.errors import Unavailable, first_line
from admfast.files.atomic import check_folder
from admfast.ops.update import Clip, Row, pack

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")
# The environment variables that name the folders of compiled code belong to the whole process.
_COMPILING = threading.RLock()
# Relative root-mean-square rounding error of a layer's output: half an epsilon in half precision and with
# TF32 factors, which float32 on a GPU may have. In float32, the rounding of sums dominates.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TF32_ROUNDING, FLOAT32_ROUNDING = 2.0**-11, 2e-5
MAX_COMPILED_STEPS = 10_000  # maximum number of compiled steps in a process
# First known version of torch that can trace a gradient in an input made inside the graph; 2.11 can't.
FIRST_TORCH_TRACING_GRADIENTS = "2.13"


def compile_step(step: PreparedStep, cache: str | PathLike[str] | None = None) -> None:
    """Compile each body of a step as one graph, and run it once, which makes torch compile it.

    The step must not be filled yet. The package's own ops run unchanged. The gradient is traced with the
    networks.
    cache: folder in which torch stores compiled code and finds it again, for the same torch, Triton and GPU;
    made if it is missing. None is torch's default folder.

    Raises:
        OutputError: before anything is compiled, if nothing can be written into the folder.
        Unavailable: if torch fails to compile, or a compiled row differs from the eager one by more than
            rounding, or the step is guided and torch can't trace its gradient.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    if step.classifier is not None and torch.__version__ < FIRST_TORCH_TRACING_GRADIENTS:
        reason = (
            f"a guided step needs torch {FIRST_TORCH_TRACING_GRADIENTS} or later, this is {torch.__version__}"
        )
        raise Unavailable(f"compile=True: {reason}; without compile it runs as a CUDA graph")
    if cache is not None:
        check_folder(cache)
    with _cache_folder(cache):
        for kind in list(step.bodies):
            body = step.bodies[kind]
            start = time.monotonic()
            x = _fill_test_row(step, kind)
            # An eager run first: what layers derive at their first call must exist before they are traced.
            eager_result = _run_test_row(step, body, x)
            noise = torch.randn(x.shape, generator=_generator(x.device, 1), device=x.device)
            perturbed_result = _run_test_row(step, body, x + _relative_rounding(step) * x * noise)
            described = "guided" if kind.is_guided else "plain"
            LOG.warning("compiling the %s step of %s ...", described, step.key.shape)
            compiled_fn = compiled_body(step, kind)
            try:
                compiled_result = _run_test_row(step, compiled_fn, x)
            except BackendCompilerFailed as error:
                cause = error.inner_exception
                reason = f"torch raises {type(cause).__name__} ({first_line(cause)}); turn compile off"
                raise Unavailable(f"compile=True: {reason}") from error
            _check_results(step, compiled_result, eager_result, perturbed_result)
            step.bodies[kind] = compiled_fn
            step.compiled = True
            LOG.warning("compiled in %.0f s", time.monotonic() - start)


def check_compiler(device: torch.device) -> None:
    """Raise Unavailable if torch.compile can't find the C++ compiler that it needs on a CPU."""
    if device.type != "cpu":
        return  # Triton compiles the code
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        reason = f"torch.compile needs a C++ compiler on a CPU ({first_line(error)})"
        raise Unavailable(f"compile=True: {reason}; install g++ or clang++, or turn compile off") from error


def compiled_body(step: PreparedStep, kind: RowKind) -> Callable[[], None]:
    """Return a step's body as a function that torch compiles at its first call, with a weak reference to it.

    A function that kept its step alive would be part of a reference cycle, so that a dropped step kept its
    memory. torch.compile can't trace a body whose step is a weak proxy, so it gets the step at every call.
    """
    body, step_ref = type(step).body, weakref.ref(step)
    options: dict[str, object] = {}
    if step.state.x.device.type == "cuda":
        import torch._inductor as inductor

        options = inductor.list_mode_options("max-autotune-no-cudagraphs")
        # torch 2.11's Triton template of a 3x3 convolution can give wrong numbers with 8 warps.
        options |= {"max_autotune_conv_backends": "ATEN"}
    compiled_fn = torch.compile(body, fullgraph=True, options=options)  # type: ignore[arg-type]

    @functools.wraps(body)
    def run() -> None:
        # Without the first setting, torch.autograd.grad for the guidance gradient would break the graph. The
        # limits are raised because torch allows eight compilations of one code, and every step needs one.
        settings = {
            "trace_autograd_ops": True,
            "recompile_limit": MAX_COMPILED_STEPS,
            "accumulated_recompile_limit": MAX_COMPILED_STEPS,
        }
        with torch._dynamo.config.patch(settings):  # type: ignore[attr-defined]
            step = step_ref()
            assert step is not None, "only a step calls its body"
            compiled_fn(step, kind)

    return run


@contextlib.contextmanager
def _cache_folder(folder: str | PathLike[str] | None) -> Iterator[None]:
    """Let torch and Triton store code compiled within the block in `folder`; None: in the default folders."""
    with _COMPILING:
        if folder is None:
            yield
            return
        path = Path(folder).resolve()
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(path), "TRITON_CACHE_DIR": str(path / "triton")}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _fill_test_row(step: PreparedStep, kind: RowKind) -> Tensor:
    """Fill a step with a row that sets x_0 to the network's output and x to the gradient; return its x.

    With a second output x_0 is the sum of both.
    """
    device = step.state.x.device
    generator = _generator(device, 0)
    mix = -0.5 if kind.null or kind.weak else 0.0
    k_mean = (kind.gradient or kind.kept) / LOSS_SCALE
    packed = pack([Row(0.0, 0.0, k_out=1.0, k_mean=k_mean, mix=mix, clip=Clip.NONE)], device)
    step.table.host[:1] = packed.host
    step.table.device[:1] = packed.device
    step.timesteps.fill_(500)
    if step.low_res is not None:
        step.low_res.normal_(generator=generator)
    step.weak_shares.fill_(0.5)
    if step.kept_gradient is not None:
        step.kept_gradient.normal_(generator=generator)
    step.fill_embeddings(0, 1)
    return torch.randn(step.state.x.shape, generator=generator, device=device)


def _run_test_row(step: PreparedStep, run: Callable[[], None], x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the row on x; return the network's output and the guidance gradient."""
    step.state.x.copy_(x)
    step.counters.zero_()
    with torch.no_grad():
        run()
    return step.state.x0.clone(), step.state.x.clone()


def _relative_rounding(step: PreparedStep) -> float:
    """Return the relative rounding error of a layer in the network that rounds most."""
    float32_rounding = TF32_ROUNDING if step.state.x.device.type == "cuda" else FLOAT32_ROUNDING
    dtypes = [net.torso_dtype for net in step.networks]
    return max(ROUNDING.get(dtype, float32_rounding) for dtype in dtypes)


def _check_results(
    step: PreparedStep,
    compiled: tuple[Tensor, Tensor],
    eager: tuple[Tensor, Tensor],
    perturbed: tuple[Tensor, Tensor],
) -> None:
    """Reject a compiled row that differs from the eager one by more than rounding.

    perturbed: the eager row for an x with the rounding error of one layer. The errors of L layers are
    independent and add up to sqrt(L) times that error. Both rows round, which doubles the number of errors. A
    gradient passes the layers twice, which doubles it again.
    """
    outputs = (("network's output", step.net, 2), ("guidance gradient", step.classifier, 4))
    for i, (name, net, roundings) in enumerate(outputs):
        if net is None or not eager[i].isfinite().all():  # sampling reports values that aren't finite
            continue
        layers = sum(isinstance(getattr(module, "weight", None), Tensor) for module in net.modules())
        difference = float((compiled[i] - eager[i]).norm())
        allowed = math.sqrt(roundings * layers) * float((perturbed[i] - eager[i]).norm())
        if not difference <= allowed:
            norm = float(eager[i].norm()) or 1.0
            raise Unavailable(
                f"compile=True: the compiled step is wrong: its {name} has a relative error of "
                f"{difference / norm:.2g}, but rounding causes at most {allowed / norm:.2g}; turn compile off"
            )
