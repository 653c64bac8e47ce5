"""Run a published sampling loop as one prepared step, if it calls no code of the caller but the published.

The model must be a network of this package in evaluation mode, or a function that only passes its arguments
to such a network. The guidance must be a function that computes the published gradient of one classifier. A
function counts as such if it is straight-line code that writes to no object and uses only known names, and if
it gives the expected result with stand-ins for the networks. The process must not have been changed.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from admfast.accelerate.code_inspection import (
    LIBRARY_NAMES,
    SWITCH_NAMES,
    find_branch,
    find_function_difference,
)
from admfast.accelerate.equivalence import is_close, random_normal
from admfast.compat.guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel, is_network
from admfast.engine.guidance import LOSS_SCALE, RowGuidance, label_weights, log_probability_gradient
from admfast.engine.numerics import fixed_numerics
from admfast.engine.step import Batch
from admfast.ops.transforms import in_autocast, in_program_trace
from admfast.solvers import ddim, ddpm

if TYPE_CHECKING:
    from admfast.compat.guided_diffusion.gaussian_diffusion import GaussianDiffusion

Function = Callable[..., Tensor]
Arguments = dict[str, Any]
GUIDANCE_NAMES = LIBRARY_NAMES | {
    *("classifier_scale", "enable_grad", "detach", "requires_grad_", "log_softmax", "range", "len", "view"),
    *("autograd", "grad", "sum"),
}


def prepared_loop(
    diffusion: GaussianDiffusion, step: str, model: Any, shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor | None:
    """Return the samples of the loop over `step` ("p_sample", "ddim_sample"), or None if it must run itself.

    The other arguments are those of the loop. x_T and the noise of every row are drawn from torch's generator
    in the order of the published loop.
    """
    if not isinstance(shape, tuple | list) or not diffusion.is_unchanged():
        return None
    loop = getattr(diffusion, f"{step}_loop_progressive")
    bound = inspect.signature(loop).bind(model, shape, *args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    eta, model_kwargs = arguments.get("eta", 0.0), dict(arguments["model_kwargs"] or {})
    net = find_network(model, model_kwargs)
    guidance = (
        (None, 0.0) if arguments["cond_fn"] is None else find_guidance(arguments["cond_fn"], model_kwargs)
    )
    if net is None or guidance is None or arguments["denoised_fn"] is not None:
        return None
    if not isinstance(eta, int | float) or not 0 <= eta <= 1:
        return None
    if not _can_prepare(net, guidance[0], model_kwargs, shape, arguments["noise"]):
        return None
    device = next(net.parameters()).device
    if arguments["device"] is not None and torch.empty(0, device=arguments["device"]).device != device:
        return None
    x = arguments["noise"] if arguments["noise"] is not None else torch.randn(*shape, device=device)
    solver = ddim(eta=eta) if step == "ddim_sample" else ddpm()
    table = solver.table(diffusion._process, bool(arguments["clip_denoised"]))
    batch = Batch(
        table=table,
        shape=tuple(shape),
        seeds=torch.zeros(shape[0], dtype=torch.int64, device=device),
        labels=model_kwargs.get("y"),
        low_res=model_kwargs.get("low_res"),
        step_noise=_TorchNoise(x),
        guidance=(RowGuidance(guidance[1]),) * len(table),
    )
    return _run(net, guidance[0], batch, x, arguments["progress"])


def _run(
    net: UNetModel, classifier: EncoderUNetModel | None, batch: Batch, x: Tensor, progress: bool
) -> Tensor:
    """Return the samples of a batch that starts at x; the classifier is frozen meanwhile."""
    engine = net.engine_with(classifier)
    with _frozen(classifier), fixed_numerics(engine.device, engine.policy.tf32), torch.no_grad():
        engine.ensure_folded()
        with engine.borrow_step(batch) as step:
            step.fill(batch, x)
            for i in with_progress(range(len(batch.table)), len(batch.table), progress):
                step.advance(i)
            return step.state.x.clone()


def with_progress(steps: Any, total: int, progress: bool) -> Any:
    """Return the steps of a loop, with a progress bar if `progress`."""
    if not progress:
        return steps
    from tqdm.auto import tqdm  # not needed otherwise

    return tqdm(steps, total=total)


class _TorchNoise:
    """The noise of each row, drawn from torch's generator when the row is read."""

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def __getitem__(self, row: int) -> Tensor:
        return torch.randn_like(self.like)


def _can_prepare(
    net: UNetModel,
    classifier: EncoderUNetModel | None,
    model_kwargs: dict[str, Any],
    shape: Sequence[int],
    noise: Tensor | None,
) -> bool:
    """Tell whether a step can be prepared for a call.

    Its arguments must be known and of the usual dtypes, outside of tracing, autocast and inference mode.
    """
    y, low_res = model_kwargs.get("y"), model_kwargs.get("low_res")
    config: Any = net.config
    expected = {"y"} if config.num_classes is not None or classifier is not None else set()
    if isinstance(net, SuperResModel):
        expected.add("low_res")
    parameter = next(net.parameters())
    if set(model_kwargs) != expected or in_program_trace() or in_autocast(parameter.device):
        return False
    if torch.is_inference_mode_enabled() or torch.get_default_dtype() != torch.float32:
        return False
    if noise is not None:
        is_plain = noise.dtype == torch.float32 and noise.is_contiguous() and type(noise) is Tensor
        if not is_plain or tuple(noise.shape) != tuple(shape):
            return False
    labels_fit = y is None or (isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (shape[0],))
    if labels_fit and y is not None and bool((y < 0).any()):  # as an index it would count from the end
        return False
    low_res_fits = low_res is None or (isinstance(low_res, Tensor) and low_res.dtype == torch.float32)
    image_shape_fits = (
        len(shape) == config.dims + 2 and shape[1] == config.in_channels and config.outputs_images
    )
    tensors = [t for t in (noise, y, low_res) if isinstance(t, Tensor)]
    on_device = all(t.device == parameter.device for t in tensors)
    return labels_fit and low_res_fits and image_shape_fits and on_device


def find_network(model: Any, model_kwargs: Arguments) -> UNetModel | None:
    """Return the network that a loop's model is, or to which it only passes its arguments; else None.

    model_kwargs: the keyword arguments with which the loop calls the model.
    """
    if isinstance(model, UNetModel):
        return model if is_network(model) else None
    net = _find_single_network(model, UNetModel)
    if (
        net is None
        or find_function_difference(model, _outer_names(model), set(), _outer_names(model)) is not None
    ):
        return None
    x, t, out = (random_normal(2, seed=i) for i in range(3))
    named = {name: random_normal(2, seed=7) for name in model_kwargs}
    calls: list[tuple[Any, ...]] = []

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((*args, *kwargs.values()))
        return out

    try:
        result = _replace_network(model, net, stand_in)(x, t, **named)
    except Exception:  # the function needs more of a network than the stand-in has
        return None
    expected = (x, t) if net.num_classes is None else (x, t, named.get("y"))
    received = tuple(value for value in calls[0] if value is not None) if len(calls) == 1 else ()
    same = len(received) == len(expected) and all(a is b for a, b in zip(received, expected, strict=True))
    return net if result is out and same else None


def find_guidance(cond_fn: Any, model_kwargs: Arguments) -> tuple[EncoderUNetModel, float] | None:
    """Return the classifier and scale of a published guidance function, or None for any other function.

    The function returns scale * d/dx sum_n log_softmax(classifier(x, t))[n, y_n]. model_kwargs: the keyword
    arguments with which the loop calls it.
    """
    classifier = _find_single_network(cond_fn, EncoderUNetModel)
    if classifier is None or set(model_kwargs) != {"y"}:
        return None
    if (
        find_function_difference(
            cond_fn, GUIDANCE_NAMES | _outer_names(cond_fn), {0, 1, -1}, _outer_names(cond_fn)
        )
        is not None
    ):
        return None
    scales = [
        inspect.getattr_static(value, "classifier_scale", None)
        for value in _outer_variables(cond_fn).values()
    ]
    scale = next((float(value) for value in scales if _is_number(value)), 1.0)
    weights = random_normal(8, 3, seed=1)

    def stand_in(x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ weights + t[:, None]).tanh()

    for count in (1, 2, 3):
        x, t = random_normal(count, 2, 2, 2, seed=2), torch.arange(count, device="cpu") * 0.4
        y = torch.arange(count, device="cpu").flip(0)
        unscaled = log_probability_gradient(stand_in, x, t, label_weights(y, 3))  # type: ignore[arg-type]
        expected = scale / LOSS_SCALE * unscaled
        try:
            gradient = _replace_network(cond_fn, classifier, stand_in)(x.clone(), t, y=y)
        except Exception:  # the function needs more of a classifier than the stand-in has
            return None
        if not is_close(gradient, expected):
            return None
    return classifier, scale


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _outer_variables(function: Any) -> dict[str, Any]:
    """Return a function's global and closure variables by name; {} for an object that is not a function."""
    try:
        variables = inspect.getclosurevars(function)
    except (TypeError, ValueError):  # not a function, or a closure variable without a value
        return {}
    return {**variables.globals, **variables.nonlocals}


def _outer_names(function: Any) -> set[str]:
    """Return the names of a function's outer variables that hold networks or parsed arguments.

    If any holds parsed arguments, the names of the switches among them are returned too.
    """
    variables = _outer_variables(function).items()
    names = {
        name for name, value in variables if _holds_parsed_arguments(value) or isinstance(value, nn.Module)
    }
    return names | (SWITCH_NAMES if any(_holds_parsed_arguments(value) for _, value in variables) else set())


def _holds_parsed_arguments(value: Any) -> bool:
    """Tell whether a value holds parsed arguments: a switch or `classifier_scale` as a plain attribute."""
    attributes = [inspect.getattr_static(value, name, None) for name in (*SWITCH_NAMES, "classifier_scale")]
    return any(isinstance(value, bool | int | float) for value in attributes)


def _find_single_network(function: Any, kind: type[nn.Module]) -> Any:
    """Return the only network among a simple function's outer variables if it is of this class, else None.

    A simple function is straight-line code with no parameters but x, t and y.
    """
    if not isinstance(function, FunctionType) or find_branch(function) is not None:
        return None
    code = function.__code__
    starred = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    if starred or not set(inspect.signature(function).parameters) <= {"x", "t", "y"}:
        return None
    nets = [value for value in _outer_variables(function).values() if isinstance(value, nn.Module)]
    return nets[0] if len(nets) == 1 and isinstance(nets[0], kind) and is_network(nets[0]) else None


def _replace_network(function: FunctionType, net: nn.Module, stand_in: Any) -> Function:
    """Return a copy of a function in which a stand-in replaces a network."""
    new_globals = {name: stand_in if value is net else value for name, value in function.__globals__.items()}
    cells = tuple(
        CellType(stand_in) if cell.cell_contents is net else cell for cell in function.__closure__ or ()
    )
    copied = FunctionType(function.__code__, new_globals, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


# By a classifier's id: how many loops use it, and the parameters that they froze.
_FROZEN_CLASSIFIERS: dict[int, tuple[int, list[nn.Parameter]]] = {}
_FREEZE_LOCK = threading.Lock()


@contextlib.contextmanager
def _frozen(classifier: nn.Module | None) -> Iterator[None]:
    """Freeze a classifier within the `with` block, so that its parameters' gradients are not computed."""
    if classifier is None:
        yield
        return
    key = id(classifier)
    with _FREEZE_LOCK:  # loops on several threads may share a classifier: the last one unfreezes it
        loops, trained = _FROZEN_CLASSIFIERS.get(key, (0, []))
        trained = trained or [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        _FROZEN_CLASSIFIERS[key] = (loops + 1, trained)
        for parameter in trained:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _FREEZE_LOCK:
            loops, trained = _FROZEN_CLASSIFIERS.pop(key)
            if loops > 1:
                _FROZEN_CLASSIFIERS[key] = (loops - 1, trained)
            else:
                for parameter in trained:
                    parameter.requires_grad_(True)
