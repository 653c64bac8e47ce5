"""The optimiser step: AdamW and any number of moving averages of the weights, over all parameters at once.

Nothing waits for the device: the step count, the learning rate, the scale of the gradients and the flag of an
overflow may all be tensors on it, so that a training step can be captured whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.ops.dispatch import Implementation, OpTable

Average = tuple[Sequence[Tensor], float | Tensor]  # the averaged weights and the share kept of them


def adamw_ema_step_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Average],
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Reference of `adamw_ema_step_`: the formula, tensor by tensor; computes in float32, or float64."""
    stays = torch.zeros_like(step, dtype=torch.bool) if found_inf is None else found_inf.reshape(()) != 0
    step += 1 - stays.to(step.dtype)
    beta1, beta2 = betas
    correction1, correction2 = _corrections(betas, step)

    def write(where: Tensor, value: Tensor) -> None:
        where.copy_(torch.where(stays, where, value.to(where.dtype)))

    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        wide = torch.promote_types(p.dtype, torch.float32)
        rate = torch.as_tensor(lr, dtype=wide, device=p.device)
        g = g.to(wide) if grad_scale is None else g.to(wide) / grad_scale.to(wide)
        m_next = beta1 * m.to(wide) + (1 - beta1) * g
        v_next = beta2 * v.to(wide) + (1 - beta2) * g * g
        m_hat = m_next / correction1.to(wide)
        v_hat = v_next / correction2.to(wide)
        p_next = p.to(wide) * (1 - rate * weight_decay) - rate * m_hat / (v_hat.sqrt() + eps)
        for where, value in ((m, m_next), (v, v_next), (p, p_next)):
            write(where, value)
        for averages, decay in emas:
            # From the parameter as it was stored, as every implementation that makes two passes has it.
            write(averages[i], decay * averages[i].to(wide) + (1 - decay) * p.to(wide))


def _corrections(betas: tuple[float, float], step: Tensor) -> tuple[Tensor, Tensor]:
    """1 - b1^t and 1 - b2^t, in float64: in float32 the second is off by 6e-5 of itself in the first step."""
    t = step.double()
    return 1 - betas[0] ** t, 1 - betas[1] ** t


def adamw_ema_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Average],
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Take one step of AdamW in place, then move every average towards the new parameters.

    With t = step + 1 and g = grad / grad_scale, for every parameter p:
    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    p = p (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),
    ema = decay ema + (1 - decay) p for each of `emas`.
    Source: Loshchilov & Hutter 2019, algorithm 2; the average is the published code's `update_ema`, taken
    after the step.

    Args:
        params: the parameters, floating, any shapes.
        grads, exp_avgs, exp_avg_sqs: for each parameter its gradient, m and v, of its shape.
        emas: pairs of a list like `params` and the share kept, 0..1, a float or a tensor of one element.
        step: [], float32, on the parameters' device: steps taken so far; one more afterwards.
        lr: learning rate, 0 or more, a float or a tensor of one element.
        betas: b1 and b2, 0 or more and below 1.
        eps: 0 or more.
        weight_decay: 0 or more.
        grad_scale: one element, float32: what the loss was multiplied by. `grads` may be written to then.
        found_inf: one element, float32; where it isn't 0 nothing changes, neither `step` nor the averages.
        impl: name of an implementation (see `admfast info`); None chooses.

    Raises:
        InvalidArgument: for lists of different lengths, shapes that differ, or numbers out of range.

    Computes in float32 (float64 for float64 parameters); rounds p, m, v and the averages once each. Waits for
    no device. Not differentiable.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, emas, step, lr, betas, eps, weight_decay)
    _check_one_element(grad_scale=grad_scale, found_inf=found_inf)
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None and value.dtype != torch.float32:
            raise invalid(f"{name}.dtype", value.dtype, "torch.float32")
    if found_inf is not None:
        # The implementations calculate with it, where 2, infinity and NaN would not mean "found".
        found_inf = (found_inf != 0).to(found_inf.dtype)
    options: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    options |= {"grad_scale": grad_scale, "found_inf": found_inf}
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
    averages = [(list(tensors), decay) for tensors, decay in emas]
    entry = TABLE.choose(impl, *lists, averages, step, lr, **options)
    if params:
        with torch.no_grad():
            entry.forward(*lists, averages, step, lr, **options)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Average],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Refuse, by name, what no implementation could do; reads no number that is on the device."""
    for name, tensors in _named(params, grads, exp_avgs, exp_avg_sqs, emas).items():
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise invalid(f"{name}[{i}]", t, "a tensor")
    shapes = [p.shape for p in params]
    for name, tensors in _named(params, grads, exp_avgs, exp_avg_sqs, emas).items():
        if len(tensors) != len(shapes):
            raise invalid(f"len({name})", len(tensors), f"one for each of the {len(shapes)} parameters")
        if [t.shape for t in tensors] != shapes:
            i, wrong = next((i, t) for i, t in enumerate(tensors) if t.shape != shapes[i])
            raise invalid(f"{name}[{i}].shape", tuple(wrong.shape), f"its parameter has {tuple(shapes[i])}")
        if not all(t.is_floating_point() for t in tensors):
            i, wrong = next((i, t) for i, t in enumerate(tensors) if not t.is_floating_point())
            raise invalid(f"{name}[{i}].dtype", wrong.dtype, "a floating dtype")
    if not isinstance(step, Tensor):
        raise invalid("step", step, "a float32 tensor without dimensions")
    if step.dim() or step.dtype != torch.float32:
        raise invalid("step", (tuple(step.shape), step.dtype), "a float32 tensor without dimensions")
    if params and step.device != params[0].device:
        raise invalid("step.device", str(step.device), f"{params[0].device}, where the parameters are")
    _check_numbers(lr, betas, eps, weight_decay, emas)


def _check_numbers(
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    emas: Sequence[Average],
) -> None:
    """Refuse, by name, numbers out of range; reads none that is on the device."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise invalid("betas", betas, "two numbers")
    checks.real("eps", eps, least=0)
    checks.real("weight_decay", weight_decay, least=0)
    if not isinstance(lr, Tensor):
        checks.real("lr", lr, least=0)
    for i, beta in enumerate(betas):
        checks.real(f"betas[{i}]", beta, least=0, below=1)
    for i, (_, decay) in enumerate(emas):
        if not isinstance(decay, Tensor):
            checks.real(f"decay of emas[{i}]", decay, least=0, most=1)
    decays = {f"decay of emas[{i}]": decay for i, (_, decay) in enumerate(emas)}
    _check_one_element(lr=lr, **decays)


def _named(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Average],
) -> dict[str, Sequence[Tensor]]:
    """Every list by the name of its argument."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return lists | {f"emas[{i}]": averages for i, (averages, _) in enumerate(emas)}


def _check_one_element(**values: float | Tensor | None) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        if value.numel() != 1:
            raise invalid(f"{name}.shape", tuple(value.shape), "one element")
        if not value.is_floating_point():
            raise invalid(f"{name}.dtype", value.dtype, "a floating dtype: torch.float32")


def _fused(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Average],
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """torch's fused AdamW, which reads and writes everything once, and one pass for each average."""
    step += 1 if found_inf is None else 1 - found_inf.reshape(()).to(step.dtype)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(params),
        lr=lr,  # type: ignore[arg-type]
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    # torch's op doesn't say that it wrote: without this a backward through the old weights goes unnoticed.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])
    _average(emas, params, found_inf)


def _foreach(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Average],
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One pass over all parameters for each operation of the formula."""
    step += 1
    beta1, beta2 = betas
    correction1, correction2 = _corrections(betas, step)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    # p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps): two numbers that serve all parameters.
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, correction2.sqrt().to(params[0].dtype))
    torch._foreach_add_(denominators, eps)
    scale = (-lr / correction1).to(params[0].dtype)
    torch._foreach_addcdiv_(params, torch._foreach_mul(exp_avgs, scale), denominators)
    _average(emas, params, found_inf)


def _average(emas: list[Average], params: list[Tensor], found_inf: Tensor | None) -> None:
    """ema += (1 - decay) (p - ema), or nothing where `found_inf` is set."""
    for tensors, decay in emas:
        averages = list(tensors)
        if found_inf is None and not isinstance(decay, Tensor):
            torch._foreach_lerp_(averages, params, 1 - decay)
            continue
        share = 1 - decay if found_inf is None else (1 - decay) * (1 - found_inf.reshape(()))
        moves = torch._foreach_sub(params, averages)
        torch._foreach_mul_(moves, torch.as_tensor(share, dtype=params[0].dtype).reshape(()))
        torch._foreach_add_(averages, list(moves))


def _of_one_kind(*lists: Any, **_: Any) -> str | None:
    """Lists of tensors are handed to one kernel where they have one dtype and device."""
    kinds = {name: {(t.dtype, t.device) for t in tensors} for name, tensors in _named(*lists[:5]).items()}
    if len(set().union(*kinds.values())) <= 1:
        return None
    name, found = next((n, kind) for n, kind in kinds.items() if kind != kinds["params"] or len(kind) > 1)
    return f"{name} has {' and '.join(sorted(f'{dtype} on {device}' for dtype, device in found))}"


def _fused_supports(*lists: Any, **_: Any) -> str | None:
    """The fused kernels walk through memory: everything must lie in it as the parameters do."""
    reason = _of_one_kind(*lists)
    if reason is not None:
        return reason
    strides = [p.stride() for p in lists[0]]
    for name, tensors in _named(*lists[:5]).items():
        if [t.stride() for t in tensors] != strides:
            i = next(i for i, t in enumerate(tensors) if t.stride() != strides[i])
            return f"{name}[{i}] has other strides than its parameter"
    for i, p in enumerate(lists[0]):
        # A copy takes over the strides of what is dense, and of nothing else.
        if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
            return f"params[{i}] has gaps or overlaps in memory"
    return None


def _foreach_supports(*lists: Any, **options: Any) -> str | None:
    if options["grad_scale"] is not None or options["found_inf"] is not None:
        return "no grad_scale or found_inf"
    if any(p.element_size() < 4 for p in lists[0]):
        return "rounds after every operation: float32 and float64 alone"
    return _of_one_kind(*lists)


TABLE = OpTable(
    "adamw_ema_step",
    [
        Implementation("fused", _fused, supports=_fused_supports),
        Implementation("foreach", _foreach, supports=_foreach_supports),
        Implementation("reference", adamw_ema_step_ref_),
    ],
)
