"""Guidance of a row: the classifier's gradient, and the weights of a second output of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from admfast.errors import invalid
from admfast.models.hooks import has_hooks
from admfast.ops.update import COLUMNS

GuidanceFn = Callable[[Tensor, Tensor], Tensor]
# The log-probabilities are multiplied by this before the backward pass, and the gradient is divided by it in
# float32. With the torso in float16, this reduces the error of the digits' gradient at t = 0 from 3.7 % to
# 0.1 %. It is a power of two, so that no bit changes if nothing underflows.
LOSS_SCALE = 2.0**10
GRADIENT_COLUMNS = [COLUMNS.index(name) for name in ("k_pre", "k_post", "k_mean")]
MIX_COLUMN = COLUMNS.index("mix")


class RowKind(NamedTuple):
    """Name what a row computes for its guidance; rows of one kind run the same operations.

    gradient: computes the classifier's gradient. kept: uses the gradient of the last row that computed one.
    null, weak: evaluates the network for the null class, or the weak network.
    """

    gradient: bool = False
    kept: bool = False
    null: bool = False
    weak: bool = False

    @property
    def is_guided(self) -> bool:
        return any(self)


class RowGuidance(NamedTuple):
    """The guidance of a row.

    scale: factor of the classifier's gradient; at 0 it is neither computed nor used. keeps: the gradient is
    that of the last row which computed one. null, weak: weights of the differences of the network's output
    from that for the null class, and from that of the weak network; at 0 these are not computed. The output
    becomes out + null (out - out_null) + weak (out - out_weak).
    """

    scale: float = 0.0
    keeps: bool = False
    null: float = 0.0
    weak: float = 0.0

    @property
    def kind(self) -> RowKind:
        """The operations that the row runs."""
        uses_gradient = self.scale != 0
        return RowKind(
            uses_gradient and not self.keeps, uses_gradient and self.keeps, self.null != 0, self.weak != 0
        )

    @property
    def weak_share(self) -> float:
        """Share of the weak network in the second output, the mean of both weighted by `null` and `weak`."""
        return self.weak / (self.null + self.weak) if self.weak else 0.0


def guided_coefficients(rows: Tensor, guidance: Sequence[RowGuidance]) -> Tensor:
    """Return packed rows [rows, columns] for a gradient that `log_probability_gradient` returns."""
    scales, mixes = torch.tensor(
        [(row.scale / LOSS_SCALE, row.null + row.weak) for row in guidance], dtype=rows.dtype, device="cpu"
    ).T
    rows = rows.clone()
    for column in GRADIENT_COLUMNS:
        rows[:, column] *= scales
    rows[:, MIX_COLUMN] = mixes
    return rows


def log_probability_gradient(
    classifier: nn.Module, x: Tensor, t: Tensor, weights: Tensor, projected: Tensor | None = None
) -> Tensor:
    """Return d/dx sum_nk weights[n, k] log_softmax(classifier(x, t))[n, k] in x's shape, without a graph.

    The result is float32, or float64 if x is. Only the gradient in x is computed: the parameters are frozen.
    weights: [N, K] float32; `label_weights` makes those of one class for each image, which multiply the
    gradient by LOSS_SCALE. projected: see `Classifier.forward`.
    """
    kwargs = {} if projected is None else {"projected": projected}
    with torch.enable_grad():
        x_in = x.detach().requires_grad_(True)
        logits = classifier(view_if_hooked(x_in), t, **kwargs)
        logits_gradient = _logits_gradient(logits.detach().float(), weights).to(logits.dtype)
        (g,) = torch.autograd.grad(logits, x_in, logits_gradient)
    return g.to(torch.promote_types(g.dtype, torch.float32))


def label_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return LOSS_SCALE at each image's class and 0 elsewhere: labels [N] -> [N, num_classes] float32."""
    weights = torch.zeros(len(labels), num_classes, dtype=torch.float32, device=labels.device)
    return weights.scatter_(1, labels[:, None], LOSS_SCALE)


def _logits_gradient(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of sum_nk weights[n, k] log_softmax(logits)[n, k] in the logits [N, K].

    It is what autograd computes, in two operations of the device instead of eight.
    """
    with torch.no_grad():
        log_probability = torch.log_softmax(logits, dim=-1)
        return torch.ops.aten._log_softmax_backward_data(weights, log_probability, -1, logits.dtype)


def view_if_hooked(x: Tensor) -> Tensor:
    """Return x, or a view of it if it is a leaf that requires a gradient and a global hook exists.

    torch's FLOP counter registers a global hook, and can't follow `torch.autograd.grad` to a leaf itself.
    The published code fails under it.
    """
    return x.view_as(x) if x.requires_grad and x.is_leaf and has_hooks(()) else x


def check_frozen(classifier: nn.Module) -> None:
    """Reject a classifier with trainable parameters: their gradients would be computed and dropped."""
    if any(parameter.requires_grad for parameter in classifier.parameters()):
        raise invalid("classifier", "trainable", "freeze its parameters first (requires_grad_(False))")


def classifier_guidance(classifier: nn.Module, labels: Tensor, guidance_scale: float) -> GuidanceFn:
    """Return g(x, t) = guidance_scale * d/dx sum_n log_softmax(classifier(x, t))[n, labels_n], at x_t.

    Source: "Diffusion Models Beat GANs", section 4; `cond_fn` of the published sampling script. Only the
    gradient in x is needed: parameters must not require gradients, which would be computed and dropped.

    labels: [N] int64. The function takes x [N, C, H, W] and t [N] and returns float32 of x's shape, without a
    graph.
    """
    check_frozen(classifier)
    num_classes: int = classifier.config.out_channels  # type: ignore[union-attr, assignment]
    weights = label_weights(labels, num_classes)
    factor = guidance_scale / LOSS_SCALE
    return lambda x, t: log_probability_gradient(classifier, x, t, weights) * factor
