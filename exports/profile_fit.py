"""From timed files to a table of costs: what each layer adds at each candidate.

The time of a plan is taken for a constant and the sum over its layers of one cost for each kind of
layer and candidate (``profile_files``): a linear model of counts, fitted by ridge regression on
relative errors. The penalty is the one whose leave-one-out error is smallest, so that what is only
noise becomes small. Costs and constant cannot be told apart further than this: the cheapest
candidate of a kind gets the cost 0, and what all layers take at their cheapest is in the constant.

Design: docs/design/latency.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitquota.candidates.cost_table import LATENCY, CheckedPlan, CostTable, LayerCost
from bitquota.canonical import JsonObject, read_json
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

    from bitquota.exports.profile_order import Order

    Floats = NDArray[np.float64]

WINDOW = 4
"""Times before and after one that tell how fast the machine was."""
QUIET = 0.1
"""Costs are those of the quietest tenth of the time."""
PENALTIES = np.logspace(-6, 1, 29)
_Term = tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Times(Document):
    """What ``time_files`` writes.

    Attributes:
        device: Name of the processor.
        runtime: Name, version and options.
        threads: That it ran on.
        clock: ``processor`` or ``wall``.
        digest: Of the order.
        times: Number of a file and nanoseconds of a run, in the order of the runs.
    """

    FORM: ClassVar[Form] = Form(what="times of files", schema="bitquota/times/1")

    device: str
    runtime: JsonObject
    threads: int
    clock: str
    digest: str
    times: tuple[tuple[int, int], ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``times.json``; raises ``InvalidInput``."""
        return cls.from_json(
            read_json(path, "times of files", "run time_files.py again", InvalidInput)
        )

    def require(self, order: Order) -> None:
        """Raise ``InvalidInput`` unless these are times of all files of ``order``."""
        if self.threads != order.threads or self.runtime.get("name") != order.runtime:
            msg = (
                f"files must be timed as was ordered, by {order.runtime} with {order.threads} "
                f"threads; got times by {self.runtime.get('name')} with {self.threads}: run "
                "time_files.py of that folder again"
            )
            raise InvalidInput(msg, threads=self.threads)
        if self.digest != order.digest or {k for k, _ in self.times} != set(
            range(len(order.files))
        ):
            msg = (
                "times must be of all files of their folder; these are of other files: run "
                "time_files.py of that folder again"
            )
            raise InvalidInput(msg)
        if min(ns for _, ns in self.times) <= 0:
            msg = "times of files must be positive; one is not: run time_files.py again"
            raise InvalidInput(msg)

    def of_files(self) -> tuple[Floats, Floats]:
        """Return what each file takes, f64[files] in ns, and the relative standard errors.

        With ``log t = a(file) + g(time)``, ``g`` is a running median of what files do not explain.
        Medians over rounds estimate ``a``; the lower decile of ``g`` is the quiet machine.
        """
        files = np.array([k for k, _ in self.times])
        logs = np.log(np.array([ns for _, ns in self.times], dtype=np.float64))
        n = int(files.max()) + 1
        own = np.array([np.median(logs[files == k]) for k in range(n)])
        for _ in range(8):
            rest = logs - own[files]
            slow = np.array(
                [np.median(rest[max(0, i - WINDOW) : i + WINDOW + 1]) for i in range(len(rest))]
            )
            own = np.array([np.median((logs - slow)[files == k]) for k in range(n)])
        left = logs - slow - own[files]
        # A median of n normal errors has the standard error 1.25 sigma / sqrt(n).
        errors = [
            1.25 * np.std(x) / np.sqrt(len(x)) for k in range(n) if (x := left[files == k]).size
        ]
        return np.exp(own + np.quantile(slow, QUIET)), np.array(errors)


def fitted_table(order: Order, times: Times) -> CostTable:
    """Return the costs that explain ``times`` of the files of ``order``.

    Raises:
        InvalidInput: The times are of something else.

    Cost: a singular value decomposition of files by terms.
    """
    times.require(order)
    measured, noise = times.of_files()
    terms = list(
        dict.fromkeys(
            (kind, label)
            for labels in order.labels
            for kind, label in zip(order.kinds, labels, strict=True)
        )
    )
    counts = np.array([_counts(order, labels, terms) for labels in order.labels])
    n = len(order.files) - order.checked
    level, effects, errors = _fit(counts[:n], measured[:n])

    # The cheapest of each kind costs nothing; the constant has what it takes.
    cost: dict[_Term, tuple[float, float]] = {}
    for kind in dict.fromkeys(order.kinds):
        own = {t: k for k, t in enumerate(terms) if t[0] == kind}
        least = min(float(effects[k]) for k in own.values())
        level += least * order.kinds.count(kind)
        cost |= {t: (float(effects[k]) - least, float(errors[k])) for t, k in own.items()}
    constant = max(0, round(level))
    layers = tuple(
        LayerCost(
            layer=name,
            candidate=label,
            cost=round(value),
            standard_error=round(error, 1),
        )
        for name, kind in zip(order.layers, order.kinds, strict=True)
        for (k, label), (value, error) in cost.items()
        if k == kind
    )
    priced = {(c.layer, c.candidate): c.cost for c in layers}
    predicted = [
        constant + sum(priced[name] for name in zip(order.layers, labels, strict=True))
        for labels in order.labels
    ]
    gaps = np.array(predicted[:n]) / measured[:n] - 1
    return CostTable(
        resource=LATENCY,
        model_digest=order.model_digest,
        constant=constant,
        layers=layers,
        target=order.target,
        device=times.device,
        runtime=times.runtime,
        threads=times.threads,
        batch=order.batch,
        length=order.length,
        constant_error=round(float(np.std(gaps) * level / np.sqrt(n)), 1),
        checked=tuple(
            CheckedPlan(predicted=predicted[k], measured=round(float(measured[k])))
            for k in range(n, len(order.files))
        ),
        source={
            "method": "ridge regression over timed plans",
            "clock": times.clock,
            "files": len(order.files),
            "times": len(times.times),
            "noise": round(float(np.median(noise)), 4),
            "misfit": round(float(np.std(gaps)), 4),
        },
    )


def _counts(order: Order, labels: tuple[str, ...], terms: list[_Term]) -> list[int]:
    """Return how many layers of each kind have each candidate."""
    chosen = list(zip(order.kinds, labels, strict=True))
    return [chosen.count(term) for term in terms]


def _fit(counts: NDArray[np.int64], measured: Floats) -> tuple[float, Floats, Floats]:
    """Return constant, effects f64[terms] and their standard errors, in the unit of ``measured``.

    Each row is divided by what it measured: ``1 = (c + counts b) / t + error``.
    """
    centre = counts.mean(axis=0)
    design = (counts - centre) / measured[:, None]  # f64[n, terms]
    ones = 1 / measured[:, None]
    # The constant is not penalised: both sides without what it explains.
    away = np.eye(len(measured)) - ones @ ones.T / float((ones**2).sum())
    scaled, wanted = away @ design, away @ np.ones(len(measured))
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    largest = max(float(values.max()) ** 2, np.finfo(np.float64).tiny)
    best: tuple[float, float] | None = None
    hat_of_constant = np.diag(ones @ ones.T) / float((ones**2).sum())
    for penalty in PENALTIES * largest:
        shrink = values**2 / (values**2 + penalty)
        hat = (left**2 * shrink).sum(axis=1) + hat_of_constant
        rest = wanted - left @ (shrink * (left.T @ wanted))
        error = float(((rest / np.maximum(1 - hat, 1e-6)) ** 2).mean())
        if best is None or error < best[0]:
            best = error, float(penalty)
    assert best is not None  # noqa: S101  # there are penalties
    penalty = best[1]
    inverse = right.T * (1 / (values**2 + penalty)) @ right
    effects = inverse @ scaled.T @ wanted
    rest = wanted - scaled @ effects
    variance = float(rest @ rest) / max(1, len(rest) - np.linalg.matrix_rank(scaled) - 1)
    level = float((ones[:, 0] @ (1 - design @ effects)) / (ones**2).sum())
    return (
        level - float(centre @ effects),
        effects,
        np.sqrt(variance * np.maximum(np.diag(inverse), 0.0)),
    )
