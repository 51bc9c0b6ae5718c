"""The instances of ``benchmarks/solver.py``: published ones, and the generator of others."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitquota.solver import Problem

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("BITQUOTA_DATA", ROOT.parent / "shared" / "data")) / "iqp"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """Minimise ``xᵀGx`` over one row per layer, ``sizes`` i64[L, B] within ``limit``."""

    G: np.ndarray[Any, np.dtype[np.float64]]
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    limit: int

    @property
    def problem(self) -> Problem:
        """The problem: terms inside a layer never count."""
        groups, width = self.sizes.shape
        cross = self.G + self.G.T
        group = np.repeat(np.arange(groups), width)
        cross[group[:, None] == group[None, :]] = 0.0
        return Problem(
            diagonal=np.diag(self.G).copy(),
            cross=cross,
            offsets=np.arange(groups + 1) * width,
            costs=self.sizes.reshape(1, -1),
            limits=np.array([self.limit]),
        )


def drawn(
    groups: int, width: int, *, correlated: bool, noise: float, seed: int, average: float = 3
) -> Instance:
    """Draw a Gram of layer errors: low rank, AR(1) along depth and a part of its own per layer."""
    rng = np.random.default_rng(seed)
    bits = {3: [2, 4, 8], 5: [2, 3, 4, 6, 8], 6: [2, 3, 4, 5, 6, 8]}[width]
    low, along = (0.35, 0.24) if correlated else (0.15, 0.10)
    factors = rng.normal(size=(groups, 6))
    factors /= np.linalg.norm(factors, axis=1, keepdims=True)
    near = 0.8 ** np.abs(np.subtract.outer(np.arange(groups), np.arange(groups)))
    between = low * factors @ factors.T + along * near + (1 - low - along) * np.eye(groups)
    error = np.exp(rng.normal(0, 0.6, (groups, 1)) + rng.normal(0, 0.1, (groups, width)))
    error = (error * 2.0 ** -np.array(bits, dtype=np.float64)).ravel()
    within = 0.9 + 0.1 * np.eye(width)
    gram = np.kron(between, np.ones((width, width))) * np.outer(error, error)
    gram *= np.tile(within, (groups, groups))
    factor = np.triu(rng.normal(size=gram.shape), 1) * noise
    gram *= 1 + factor + factor.T
    weights = (np.round(10 ** rng.uniform(5.5, 8, groups) / 256) * 256).astype(np.int64)
    sizes = weights[:, None] * np.array(bits)
    return Instance(G=gram, sizes=sizes, limit=int(average * int(weights.sum())))


def noisy(instance: Instance, noise: float, seed: int) -> Instance:
    """Multiply every cross term by one plus noise."""
    factor = np.triu(np.random.default_rng(seed).normal(size=instance.G.shape), 1) * noise
    return replace(instance, G=instance.G * (1 + factor + factor.T))


def published(name: str, index: int) -> Instance | None:
    """Return a published instance, or ``None`` where the data are missing."""
    path = DATA / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return Instance(
            G=archive["G"],
            sizes=archive["sizes"].astype(np.int64),
            limit=int(np.floor(archive["budgets"][index])),
        )
