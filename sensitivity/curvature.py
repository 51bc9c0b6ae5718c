"""Second derivatives of a loss with respect to the model's output, applied to differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.sensitivity.losses import Loss

SOFTMAX_LOSSES = frozenset({"kl", "cross_entropy"})
"""Losses whose Hessian is ``diag(q) - q qᵀ`` with ``q = softmax(output)``."""


def curvature_products(
    loss: Loss,
    output: Tensor,
    reference: Tensor,
    labels: Tensor | None,
    differences: Tensor,
) -> Tensor:
    """Return ``H d`` of every difference ``d``, ``H`` being each sample's own Hessian.

    For KL and cross entropy ``H d = q ⊙ (d - <q, d>)`` at every position, divided by the number
    of positions; for the mean squared error ``H = 2/E`` with ``E`` output elements. Any other
    loss is differentiated twice by autograd, one pass per difference.

    Args:
        loss: The loss.
        output: ``[n, ..., C]``, where the Hessian is taken.
        reference: ``[n, ..., C]`` of the full-precision model.
        labels: Labels, if the loss needs them.
        differences: ``f64[k, n, ..., C]``.

    Returns:
        ``f64[k, n, ..., C]``.
    """
    n = len(output)
    if loss.name in SOFTMAX_LOSSES:
        q = functional.softmax(output.double(), dim=-1)
        positions = _positions(loss, output, labels)
        centred = differences - (differences * q).sum(dim=-1, keepdim=True)
        return centred.mul_(q).mul_(positions)
    if loss.name == "mse":
        return differences * (2.0 / (output.numel() / n))

    def total(z: Tensor) -> Tensor:
        return loss.per_sample(z, reference, labels).sum()

    z = output.detach().double().requires_grad_(True)  # noqa: FBT003
    (gradient,) = torch.autograd.grad(total(z), z, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(differences)
    products = []
    for d in differences:
        (product,) = torch.autograd.grad(gradient, z, grad_outputs=d, retain_graph=True)
        products.append(product)
    return torch.stack(products)


def _positions(loss: Loss, output: Tensor, labels: Tensor | None) -> Tensor | float:
    """Weight of each position in a sample's mean: ``[n, ..., 1]`` or a number."""
    n = len(output)
    count = output.numel() // output.shape[-1] // n
    if loss.name != "cross_entropy" or labels is None:
        return 1.0 / count
    counted = (labels >= 0).double()
    share = counted / counted.reshape(n, -1).sum(dim=1).clamp_min(1).reshape(
        n, *(1,) * (labels.ndim - 1)
    )
    return share[..., None]
