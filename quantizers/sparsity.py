"""Two of four weights: which of them stay, and how their places are stored.

References:
    [Wanda] M. Sun, Z. Liu, A. Bair, J. Z. Kolter. A simple and effective pruning approach for
    large language models. ICLR 2024. arXiv 2306.11695.
    [SparseGPT] E. Frantar, D. Alistarh. SparseGPT: massive language models can be accurately
    pruned in one-shot. ICML 2023. arXiv 2301.00774.

Design: docs/design/zero-bits.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.candidates.storage import (
    SPARSE_BLOCK,
    SPARSE_KEPT,
    check_sparse,
    kept_weights,
)
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.storage import Scheme


def stays(values: Tensor, bits: int, scheme: Scheme, weight: Tensor | None) -> Tensor | None:
    """Return bool[rows, columns]: which weights are stored, or ``None`` for all of them.

    Of every four neighbours those two with the largest ``|w| sqrt(E[x^2])``, which is the output
    error of leaving one out alone [Wanda, equation 1]; feedback of the rounder moves the others
    to make up for it [SparseGPT].

    Args:
        values: f64[rows, columns].
        bits: Bit-width.
        scheme: With ``sparsity``, if any.
        weight: What a squared error of each weight counts for: the mean squared input, if known.
    """
    if scheme.sparsity is None:
        return None
    check_sparse(values.shape[1], bits)
    loss = values.square() if weight is None else values.square() * weight
    best = loss.reshape(-1, SPARSE_BLOCK).topk(SPARSE_KEPT, dim=1).indices
    kept = torch.zeros(loss.numel() // SPARSE_BLOCK, SPARSE_BLOCK, dtype=torch.bool)
    return kept.to(values.device).scatter_(1, best, value=True).reshape(values.shape)


def with_places(
    codes: NDArray[np.uint16], kept: NDArray[np.bool_], bits: int
) -> NDArray[np.uint16]:
    """Return u16[rows, columns / 2]: the codes that stay, each with its place above its bits.

    Where fewer than two of four neighbours differ from zero, the first zeros are stored, too.

    Raises:
        InvalidInput: More than two of four neighbours differ from zero.
    """
    rows, columns = codes.shape
    blocks = kept.reshape(-1, SPARSE_BLOCK)
    if int(blocks.sum(axis=1).max()) > SPARSE_KEPT:
        msg = "weights of sparsity 2:4 must have two zeros among every four neighbours; got fewer"
        raise InvalidInput(msg)
    places = np.sort(np.argsort(~blocks, axis=1, kind="stable")[:, :SPARSE_KEPT], axis=1)
    values = np.take_along_axis(codes.reshape(-1, SPARSE_BLOCK), places, axis=1)
    joined = values | (places.astype(np.uint16) << np.uint16(bits))
    return joined.reshape(rows, kept_weights(columns))


def at_places(
    joined: NDArray[np.uint16], columns: int, bits: int, *, fill: int
) -> NDArray[np.uint16]:
    """Return u16[rows, columns]: codes at their places, and ``fill`` elsewhere."""
    blocks = joined.reshape(-1, SPARSE_KEPT)
    found = np.full((len(blocks), SPARSE_BLOCK), fill, dtype=np.uint16)
    low = np.uint16((1 << bits) - 1)
    np.put_along_axis(found, (blocks >> np.uint16(bits)).astype(np.int64), blocks & low, axis=1)
    return found.reshape(len(joined), columns)
