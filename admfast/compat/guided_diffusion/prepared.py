"""Run a published sampling loop as one prepared step, where nothing of the caller's stands in between.

What the loop is given must be a network of this package in evaluation mode, called directly or by a function
that only hands its arguments on, and for guidance a function that computes the published gradient of one
classifier. Such functions are known by the names that they use and by what they give with stand-ins for the
networks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from admfast.accelerate.codes import LIBRARIES, foreign_function
from admfast.accelerate.trials import close, random
from admfast.compat.guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel, is_network
from admfast.engine.guidance import log_probability_gradient
from admfast.engine.numerics import own_numerics
from admfast.engine.step import Batch
from admfast.ops.transforms import in_autocast, in_program
from admfast.solvers import ddim, ddpm

if TYPE_CHECKING:
    from admfast.compat.guided_diffusion.gaussian_diffusion import GaussianDiffusion

Function = Callable[..., Tensor]
HANDS_ON = {"class_cond"}
GUIDES = LIBRARIES | {
    *("classifier_scale", "enable_grad", "detach", "requires_grad_", "log_softmax", "range", "len", "view"),
    *("autograd", "grad", "sum"),
}
INSTANCE = ("p_mean_variance", "p_sample", "ddim_sample", "condition_mean", "condition_score")


def prepared_loop(
    diffusion: GaussianDiffusion, step: str, model: Any, shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor | None:
    """Return the samples of a loop by `step` ("p_sample", "ddim_sample"), or None where its own must run.

    Other arguments: of the loop. x_T and the noise of every row are drawn from torch's generator as the
    published loop draws them.
    """
    published = type(diffusion).__module__.rpartition(".")[0] == __package__
    if not published or set(INSTANCE) & vars(diffusion).keys():
        return None
    loop = getattr(diffusion, f"{step}_loop_progressive")
    bound = inspect.signature(loop).bind(model, shape, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    eta, extra = given.get("eta", 0.0), dict(given["model_kwargs"] or {})
    net = network_of(model)
    guide = (None, 0.0) if given["cond_fn"] is None else guide_of(given["cond_fn"])
    if net is None or guide is None or given["denoised_fn"] is not None or not 0 <= eta <= 1:
        return None
    if not _fits(net, guide[0], extra, shape, given["noise"]):
        return None
    device = next(net.parameters()).device
    if given["device"] is not None and torch.empty(0, device=given["device"]).device != device:
        return None
    x = given["noise"] if given["noise"] is not None else torch.randn(*shape, device=device)
    solver = ddim(eta=eta) if step == "ddim_sample" else ddpm()
    table = solver.table(diffusion._process, bool(given["clip_denoised"]))
    batch = Batch(
        table=table,
        shape=tuple(shape),
        seeds=torch.zeros(shape[0], dtype=torch.int64, device=device),
        labels=extra.get("y"),
        low_res=extra.get("low_res"),
        step_noise=_Draws(x),
        scale=guide[1],
        guided=(guide[1] != 0,) * len(table),
    )
    return _run(net, guide[0], batch, x, given["progress"])


def _run(
    net: UNetModel, classifier: EncoderUNetModel | None, batch: Batch, x: Tensor, progress: bool
) -> Tensor:
    """Run the rows of a batch from x; classifier parameters are frozen meanwhile."""
    from admfast.compat.guided_diffusion.gaussian_diffusion import shown

    engine = net.engine_with(classifier)
    with _frozen(classifier), own_numerics(engine.device, engine.policy.tf32), torch.no_grad():
        engine.ready()
        with engine.using(batch) as step:
            step.fill(batch, x)
            for i in shown(range(len(batch.table)), len(batch.table), progress):
                step.advance(i)
            return step.state.x.clone()


class _Draws:
    """The noise of each row, drawn from torch's generator when it is asked for."""

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def __getitem__(self, row: int) -> Tensor:
        return torch.randn_like(self.like)


def _fits(
    net: UNetModel,
    classifier: EncoderUNetModel | None,
    extra: dict[str, Any],
    shape: Sequence[int],
    noise: Tensor | None,
) -> bool:
    """Tell whether a step can be prepared for a call: of known arguments, in plain float32 surroundings."""
    y, low_res = extra.get("y"), extra.get("low_res")
    config: Any = net.config
    wanted = {"y"} if config.num_classes is not None or classifier is not None else set()
    if isinstance(net, SuperResModel):
        wanted.add("low_res")
    parameter = next(net.parameters())
    if set(extra) != wanted or in_program() or in_autocast(parameter.device):
        return False
    if torch.is_inference_mode_enabled() or torch.get_default_dtype() != torch.float32:
        return False
    if noise is not None and (noise.dtype != torch.float32 or tuple(noise.shape) != tuple(shape)):
        return False
    labelled = y is None or (isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (shape[0],))
    enlarged = low_res is None or (isinstance(low_res, Tensor) and low_res.dtype == torch.float32)
    images = len(shape) == config.dims + 2 and shape[1] == config.in_channels and config.of_images
    tensors = [t for t in (noise, y, low_res) if isinstance(t, Tensor)]
    here = all(t.device == parameter.device for t in tensors)
    return labelled and enlarged and images and here


def network_of(model: Any) -> UNetModel | None:
    """Return the network that a loop's model is, or that it only hands its arguments on to; else None."""
    if isinstance(model, UNetModel):
        return model if is_network(model) else None
    net = _one_of(model, UNetModel)
    if net is None or foreign_function(model, HANDS_ON | _named(model), set(), _named(model)) is not None:
        return None
    x, t, y = (torch.zeros(1) for _ in range(3))
    calls: list[tuple[Any, ...]] = []

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((*args, *kwargs.values()))
        return x_out

    x_out, labels = torch.zeros(1), y if net.num_classes is not None else None
    try:
        out = _with(model, net, stand_in)(x, t, y=y)
    except Exception:  # of a function that expects more of a network
        return None
    wanted = (x, t) if labels is None else (x, t, labels)
    handed = len(calls) == 1 and len([v for v in calls[0] if v is not None]) == len(wanted)
    same = handed and all(a is b for a, b in zip(calls[0], wanted, strict=False))
    return net if out is x_out and same else None


def guide_of(cond_fn: Any) -> tuple[EncoderUNetModel, float] | None:
    """Return the classifier and scale of a published guidance function, or None for any other function.

    It gives scale * d/dx sum_n log_softmax(classifier(x, t))[n, y_n].
    """
    classifier = _one_of(cond_fn, EncoderUNetModel)
    if classifier is None:
        return None
    if foreign_function(cond_fn, GUIDES | _named(cond_fn), {0, 1, -1}, _named(cond_fn)) is not None:
        return None
    said = (getattr(value, "classifier_scale", None) for value in _held(cond_fn).values())
    scale = next((float(value) for value in said if _is_number(value)), 1.0)
    weights = random(8, 3, seed=1)

    def stand_in(x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ weights + t[:, None]).tanh()

    x, t, y = random(2, 2, 2, 2, seed=2), torch.tensor([0.1, 0.2]), torch.tensor([2, 0])
    wanted = scale * log_probability_gradient(stand_in, x, t, y[:, None])  # type: ignore[arg-type]
    try:
        found = _with(cond_fn, classifier, stand_in)(x.clone(), t, y=y)
    except Exception:  # of a function that expects more of a classifier
        return None
    return (classifier, scale) if close(found, wanted) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _held(function: Any) -> dict[str, Any]:
    """Return the values of the variables that a function takes from around it, by name."""
    if not isinstance(function, FunctionType):
        return {}
    found = inspect.getclosurevars(function)
    return {**found.globals, **found.nonlocals}


def _named(function: Any) -> set[str]:
    """Return the names of networks and parsed arguments that a function takes from around it."""
    return {
        name
        for name, value in _held(function).items()
        if isinstance(value, nn.Module) or hasattr(value, "classifier_scale") or hasattr(value, "class_cond")
    }


def _one_of(function: Any, kind: type[nn.Module]) -> Any:
    """Return the only network that a function takes from around it, if it is of a kind."""
    nets = [value for value in _held(function).values() if isinstance(value, nn.Module)]
    return nets[0] if len(nets) == 1 and isinstance(nets[0], kind) and is_network(nets[0]) else None


def _with(function: FunctionType, net: nn.Module, stand_in: Any) -> Function:
    """Return a function in which a stand-in takes the place of a network."""
    around = {name: stand_in if value is net else value for name, value in function.__globals__.items()}
    cells = tuple(
        CellType(stand_in) if cell.cell_contents is net else cell for cell in function.__closure__ or ()
    )
    made = FunctionType(function.__code__, around, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@contextlib.contextmanager
def _frozen(classifier: nn.Module | None) -> Iterator[None]:
    """Freeze a classifier within the block: gradients of its parameters would be computed and dropped."""
    trained: Iterable[nn.Parameter] = [] if classifier is None else classifier.parameters()
    trained = [parameter for parameter in trained if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
