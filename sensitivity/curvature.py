"""Second derivatives of a loss with respect to the model's output, applied to differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from bitquota.errors import InvalidInput
from bitquota.sensitivity.losses import RelativeSquaredError, SumOfLosses, position_weights

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
    of positions that count; for the mean squared error ``H = 2/E`` with ``E`` output elements. Any
    other loss is differentiated twice by autograd, one pass per difference.

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


def curvature_factor(loss: Loss, output: Tensor, noise: Tensor) -> Tensor:
    """Return ``B ξ`` with ``B Bᵀ = H``, each sample's own Hessian, for random ``ξ``.

    If the elements of ``ξ`` are independent with mean 0 and variance 1, the products ``(B ξ)·d``
    have the second moments ``d_iᵀ H d_j``. For a softmax ``B = diag(√q) - q √qᵀ``; positions of a
    sequence that count are independent and weigh ``1/T`` in the loss, hence ``1/√T`` here.

    Args:
        loss: The loss.
        output: ``[n, ..., C]``, where the Hessian is taken.
        noise: ``f64[r, n, ..., C]``, ``ξ``.

    Returns:
        ``f64[r, n, ..., C]``.

    Raises:
        InvalidInput: No factor of the loss's Hessian is known.
    """
    n = len(output)
    if isinstance(loss, SumOfLosses):
        r = len(noise)
        outputs, noises = loss.split(output), loss.split(noise.flatten(0, 1))
        factors = [
            curvature_factor(own, z, xi.reshape(r, n, *z.shape[1:])) * weight**0.5
            for z, xi, (weight, own, _) in zip(outputs, noises, loss.parts, strict=True)
        ]
        joined: Tensor = torch.cat([f.reshape(r, n, -1) for f in factors], dim=2)
        return joined.reshape(noise.shape)
    positions = output.numel() // output.shape[-1] // n if output.ndim > 1 else 1
    if loss.name in SOFTMAX_LOSSES:
        q = functional.softmax(output.to(noise.dtype), dim=-1)
        spread: Tensor = q.sqrt() * noise
        spread = spread - q * spread.sum(dim=-1, keepdim=True)
        weights = position_weights(output) if output.ndim > 1 else 1.0
        scaled: Tensor = spread * weights**0.5
        return scaled
    if loss.name == "binary_kl":
        yes = output.to(noise.dtype).sigmoid()
        return noise * (yes * (1 - yes) / positions).sqrt()
    if loss.name in {"mse", "relative_mse"}:
        scale = loss.scale if isinstance(loss, RelativeSquaredError) else 1.0
        even: Tensor = noise * float(2.0 * n / output.numel() / scale) ** 0.5
        return even
    msg = (
        f"the loss '{loss.name}' has no known factor of its Hessian, which random directions "
        "need: use 'kl' or 'mse', or the measure 'gram'"
    )
    raise InvalidInput(msg, loss=loss.name)


def _positions(loss: Loss, output: Tensor, labels: Tensor | None) -> Tensor | float:
    """Weight of each position in a sample's mean: ``[n, ..., 1]`` or a number."""
    n = len(output)
    if loss.name != "cross_entropy" or labels is None:
        return position_weights(output)
    counted = (labels >= 0).double()
    share = counted / counted.reshape(n, -1).sum(dim=1).clamp_min(1).reshape(
        n, *(1,) * (labels.ndim - 1)
    )
    return share[..., None]
