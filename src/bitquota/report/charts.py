"""What the charts show: one JSON document for the web pages and for the report file.

Arrays travel as base64 of little-endian float32 (NaN where there is no value): a model of 224
layers has 25,000 pairs, and JSON of those would be most of a page.

Design: docs/design/web-pages.md
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.budget import Budget
from bitquota.errors import NotFound
from bitquota.report.costs import cost_sentences
from bitquota.report.text import (
    CLEAR_DIFFERENCE,
    WORTHWHILE_RATIO,
    best_uniform,
    cache_sentences,
    caution_sentences,
    format_size,
    proof_sentence,
    quantizable_sentences,
    rounding_sentences,
    times_less,
    times_text,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject
    from bitquota.matrix import SensitivityMatrix
    from bitquota.plan import Baseline, MeasuredLoss, Plan

LARGEST = "largest"
"""The map of cross-layer terms that shows, for each pair, the candidates with the largest one."""

MAP_SIDE = 256
"""Rows of a map of cross-layer terms; models with more groups are shown in blocks of groups."""


def document(
    *,
    title: str,
    plans: Sequence[Plan] = (),
    plan_documents: Sequence[JsonObject] | None = None,
    matrix: SensitivityMatrix | None = None,
    frontier: Sequence[JsonObject] = (),
    comparison: JsonObject | None = None,
) -> JsonObject:
    """Return everything that the charts of one model show, without the cross-layer maps.

    Args:
        title: What a person calls the model.
        plans: One for each budget, of the same layers.
        plan_documents: What ``plan_json`` returns for them, if it is at hand.
        matrix: Sensitivities, if they are at hand.
        frontier: Points as ``frontier_point`` makes them, in rising order of size.
        comparison: What ``bitquota compare`` found, as its JSON.
    """
    unit = matrix.unit if matrix is not None else "nats/sample"
    loss = matrix.loss if matrix is not None else "kl"
    if plans:
        loss = plans[0].loss
        if plans[0].measured is not None:
            unit = plans[0].measured.unit
    if comparison is not None and not plans and matrix is None:
        loss, unit = str(comparison["loss"]), str(comparison["full_precision"]["unit"])
    return {
        "title": title,
        "loss": loss,
        "unit": unit,
        "layers": _layers(plans, matrix),
        "matrix": None if matrix is None else matrix_json(matrix),
        "plans": [plan_json(p) for p in plans] if plan_documents is None else list(plan_documents),
        "prices": _prices(plans),
        "frontier": list(frontier),
        "comparison": None if comparison is None else comparison_json(comparison),
    }


def _layers(plans: Sequence[Plan], matrix: SensitivityMatrix | None) -> JsonObject:
    """Return names, kinds, shapes and weights of the layers, each as one list."""
    if plans:
        layers = [a.layer for a in plans[0].assignments]
        return {
            "names": [la.name for la in layers],
            "kinds": [str(la.kind) for la in layers],
            "shapes": ["×".join(map(str, la.weight_shape)) for la in layers],
            "weights": [la.n_weights for la in layers],
        }
    weights: dict[str, int] = {}
    for row in () if matrix is None else matrix.table.rows:
        for c in row.candidates:
            weights.setdefault(c.layer, c.size.codes // c.stored_bits)
    return {"names": list(weights), "kinds": [], "shapes": [], "weights": list(weights.values())}


def _prices(plans: Sequence[Plan]) -> list[JsonObject]:
    """Return the cost tables of the plans' budgets, one for each resource."""
    priced = {b.resource: b for plan in reversed(plans) for b in plan.budgets if b.prices}
    return [
        {
            "resource": budget.resource,
            "constant": budget.constant,
            "layers": [[c.layer, c.candidate, c.cost] for c in budget.prices.layers],
            "pairs": [[*p.first, *p.second, p.cost] for p in budget.prices.pairs],
        }
        for budget in priced.values()
        if budget.prices is not None
    ]


def matrix_json(matrix: SensitivityMatrix) -> JsonObject:
    """Return the groups, the candidates on offer, and what each candidate alone costs.

    ``values`` and ``errors`` have one row per group and one column per candidate.
    """
    bits = _columns(matrix)
    columns = list(bits)
    index = {label: k for k, label in enumerate(columns)}
    groups = {name: g for g, name in enumerate(matrix.table.groups)}
    values = np.full((len(groups), len(columns)), np.nan)
    errors = np.full_like(values, np.nan)
    members: dict[str, list[str]] = {}
    for k, row in enumerate(matrix.table.rows):
        at = groups[row.group], index[row.label]
        values[at] = matrix.diagonal[k]
        if matrix.diagonal_error is not None:
            errors[at] = matrix.diagonal_error[k]
        members.setdefault(row.group, [c.layer for c in row.candidates])
    tied = any(layers != [name] for name, layers in members.items())
    return {
        "groups": list(groups),
        "members": list(members.values()) if tied else None,
        "columns": columns,
        "bits": list(bits.values()),
        "values": floats(values),
        "errors": None if matrix.diagonal_error is None else floats(errors),
        "constant": matrix.constant,
        "around": "full precision" if matrix.base_point is None else "a plan",
        "maps": [] if matrix.cross is None else [LARGEST, *columns],
    }


def _columns(matrix: SensitivityMatrix) -> dict[str, float]:
    """Return the labels of all candidates and their mean bits, fewest bits first."""
    bits: dict[str, float] = {}
    for row in matrix.table.rows:
        mean = sum(c.mean_bits for c in row.candidates) / len(row.candidates)
        bits.setdefault(row.label, mean)
    return {label: bits[label] for label in sorted(bits, key=lambda name: (bits[name], name))}


def cross_map(matrix: SensitivityMatrix, at: str = LARGEST, plan: Plan | None = None) -> JsonObject:
    """Return one map of cross-layer terms by pair of groups.

    Args:
        matrix: Must have cross terms.
        at: ``largest``, the label of a candidate that both groups get, or ``plan``.
        plan: Whose candidates ``plan`` means.

    Raises:
        NotFound: The matrix has no cross terms, or no such map.

    ``values`` and ``errors`` are the strict lower triangle, row by row. Beyond ``MAP_SIDE`` groups
    a cell stands for a block of pairs and shows the one of largest magnitude; ``names`` then
    names the first group of each block and ``block`` counts its groups.
    """
    if matrix.cross is None:
        msg = "a map needs cross-layer terms; this matrix has none: measure with 'gram' or 'pairs'"
        raise NotFound(msg)
    offsets = matrix.table.offsets
    n_groups = len(offsets) - 1
    if at == LARGEST:
        values, errors = _largest(matrix.cross, matrix.cross_error, offsets)
    else:
        rows = _rows_at(matrix, at, plan)
        there = np.flatnonzero(rows >= 0)
        values = np.full((n_groups, n_groups), np.nan)
        errors = None if matrix.cross_error is None else np.full_like(values, np.nan)
        where = np.ix_(there, there)
        inside = np.ix_(rows[there], rows[there])
        values[where] = matrix.cross[inside]
        if errors is not None and matrix.cross_error is not None:
            errors[where] = matrix.cross_error[inside]
    block = -(-n_groups // MAP_SIDE)
    if block > 1:
        edges = np.arange(0, n_groups + block, block).clip(max=n_groups)
        edges = np.unique(edges).astype(np.int64)
        values, errors = _largest(values, errors, edges)
    names = list(matrix.table.groups)[::block]
    lower = np.tril_indices(len(names), -1)
    return {
        "at": at,
        "names": names,
        "block": block,
        "values": floats(values[lower]),
        "errors": None if errors is None else floats(errors[lower]),
    }


def _rows_at(matrix: SensitivityMatrix, at: str, plan: Plan | None) -> NDArray[np.int64]:
    """Return i64[G]: the row of each group that a map shows, -1 where the group has none."""
    groups = {name: g for g, name in enumerate(matrix.table.groups)}
    rows = np.full(len(groups), -1, dtype=np.int64)
    chosen = None if plan is None else {c.layer: c for c in plan.candidates}
    for k, row in enumerate(matrix.table.rows):
        if at == "plan" and chosen is not None:
            if all(chosen.get(c.layer) == c for c in row.candidates):
                rows[groups[row.group]] = k
        elif row.label == at:
            rows[groups[row.group]] = k
    if (rows < 0).all():
        msg = f"a map must be '{LARGEST}', 'plan' or a candidate's label; got '{at}'"
        raise NotFound(msg, at=at)
    return rows


def _largest(
    values: NDArray[np.float64], errors: NDArray[np.float64] | None, edges: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return the entry of largest magnitude of every block, with its sign and its error."""
    n = len(edges) - 1
    width = np.diff(edges)
    if (width == 1).all():
        return values, errors
    # Padded to equal blocks the maximum is one reduction; padding is zero and never wins alone.
    side = int(width.max())
    place = np.full((n, side), -1, dtype=np.int64)
    for k in range(n):
        place[k, : width[k]] = np.arange(edges[k], edges[k + 1])
    result = np.zeros((n, n))
    result_errors = None if errors is None else np.zeros((n, n))
    known = np.nan_to_num(values)
    for k in range(n):
        rows = np.arange(edges[k], edges[k + 1])
        part = known[rows][:, place]  # [rows, n, side]
        part[:, place < 0] = 0.0
        flat = part.transpose(1, 0, 2).reshape(n, -1)
        best = np.abs(flat).argmax(axis=1)
        result[k] = flat[np.arange(n), best]
        if errors is not None and result_errors is not None:
            other = errors[rows][:, place].transpose(1, 0, 2).reshape(n, -1)
            result_errors[k] = other[np.arange(n), best]
    return result, result_errors


def plan_json(plan: Plan, *, digest: str | None = None) -> JsonObject:
    """Return what the charts show of one plan and its baselines.

    Args:
        plan: The plan.
        digest: Its digest where that is known: computing it takes most of the time.
    """
    return {
        "budget": " + ".join(b.text or f"{b.limit:,} {b.unit}" for b in plan.budgets),
        "selected": plan.selected,
        "bits": [a.candidate.mean_bits for a in plan.assignments],
        "labels": [a.candidate.label for a in plan.assignments],
        "sizes": [a.candidate.size_bits for a in plan.assignments],
        "size_bits": plan.size_bits + plan.cache_size_bits,
        "model_bits": plan.model_bits,
        "average_bits": plan.average_bits,
        "effective_bits": plan.effective_bits,
        "predicted": plan.predicted,
        "bound": None if plan.proof is None else plan.proof.bound,
        "measured": _measured(plan.measured),
        "baselines": [
            {
                "name": b.name,
                "bits": list(b.mean_bits),
                "labels": _baseline_labels(plan, b),
                "size_bits": b.total_bits,
                "measured": _measured(b.measured),
                "worse_by": b.paired_difference,
                "worse_error": b.paired_error,
            }
            for b in plan.baselines
        ],
        "headline": headline(plan),
        "verdict": " ".join(
            [
                *quantizable_sentences(plan.inventory),
                verdict(plan),
                *cost_sentences(plan),
                *cache_sentences(plan),
                *caution_sentences(plan),
                *rounding_sentences(plan),
            ]
        ),
        "proof": proof_sentence(plan),
        "digest": plan.digest() if digest is None else digest,
    }


def _baseline_labels(plan: Plan, baseline: Baseline) -> list[str] | None:
    """Return the candidates of a baseline, inputs as the plan has them.

    ``None`` where bit-widths of inputs were on offer: a baseline does not say which it has.
    """
    request = plan.provenance.get("request") or {}
    if isinstance(request.get("activation_bits"), list):
        return None
    inputs = [a.candidate.activation_bits for a in plan.assignments]
    return [
        f"W{bits:.4g}" + ("" if width is None else f"A{width}")
        for bits, width in zip(baseline.mean_bits, inputs, strict=True)
    ]


def _measured(measured: MeasuredLoss | None) -> JsonObject | None:
    if measured is None:
        return None
    return {
        "mean": measured.mean,
        "error": measured.standard_error,
        "samples": measured.n_samples,
        "accuracy": measured.accuracy,
    }


def headline(plan: Plan) -> str:
    """Return one short sentence: does mixing bit-widths help here?

    It speaks of points of accuracy where the samples were labelled, else of the loss. Whether a
    difference is one is decided by the loss, which is paired and finer.
    """
    uniform = best_uniform(plan)
    if plan.selected.startswith("uniform"):
        return f"Mixed precision does not help here: {plan.selected} is best within this budget."
    if uniform is None or plan.measured is None:
        return f"Nothing uniform fits this budget; the plan takes {format_size(plan.size_bits)}."
    name = uniform.name
    if uniform.measured.n_samples == 1:
        return "One hold-out sample cannot say whether mixed precision helps here."
    if uniform.paired_difference <= CLEAR_DIFFERENCE * uniform.paired_error:
        return f"Mixed precision does not clearly help here: {name} does as well."
    same = uniform.size_bits <= plan.size_bits
    where = " at no more bytes" if same else f", which takes {format_size(uniform.size_bits)}"
    ours, theirs = plan.measured.accuracy, uniform.measured.accuracy
    if ours is not None and theirs is not None and round(100 * (ours - theirs), 1) > 0:
        gain = 100 * (ours - theirs)
        return f"Mixed precision gains {gain:.1f} points over {name}{where}."
    found = times_less(plan, uniform)
    if found is None:
        return f"Mixed precision loses nothing; {name} loses {uniform.measured.mean:.3g}."
    ratio, error = found
    if ratio < WORTHWHILE_RATIO:
        return f"Mixed precision makes little difference here: {name} does nearly as well."
    return f"Mixed precision loses {times_text(ratio, error)} times less than {name}{where}."


def frontier_point(
    matrix: SensitivityMatrix, choice: Sequence[int], objective: float, bound: float
) -> JsonObject:
    """Return one point of the frontier.

    Args:
        matrix: Whose table ``choice`` speaks of.
        choice: Row within each group.
        objective: Predicted loss increase.
        bound: No choice within this budget is predicted below it; ``-inf`` where unknown.
    """
    chosen = {c.layer: c for c in matrix.table.decode(choice)}
    layers = [c for c in chosen.values() if not c.cached]
    weights = sum(matrix.table.n_weights[c.layer] for c in layers)
    return {
        "bits": [c.mean_bits for c in layers],
        "labels": [c.label for c in layers],
        "size_bits": sum(c.size_bits for c in chosen.values()),
        "average_bits": sum(c.size.codes for c in layers) / weights,
        "predicted": objective,
        "bound": bound if np.isfinite(bound) else None,
    }


def frontier_of(
    matrix: SensitivityMatrix, *, points: int = 17, time_limit_s: float | None = None, seed: int = 0
) -> list[JsonObject]:
    """Return the frontier of average bits: points as ``frontier_point`` makes them.

    Args:
        matrix: What to solve.
        points: Budgets, evenly spaced from the cheapest choice to the dearest.
        time_limit_s: Seconds for all points together; those not proved in it keep the bound that
            was reached.
        seed: Of the solver's search.
    """
    from bitquota.solver import build_problem, even_limits, frontier

    everything = int(matrix.table.costs("code_bits").sum())
    problem = build_problem(matrix, [Budget(resource="code_bits", limit=everything)])
    found = frontier(
        problem,
        even_limits(problem, points),
        gap=1e-3,
        time_limit_s=time_limit_s,
        node_limit=2000,
        seed=seed,
    )
    return [
        frontier_point(
            matrix, [int(c) for c in p.solution.choice], p.solution.objective, p.solution.bound
        )
        for p in found
        if p.solution.choice is not None
    ]


def frontier_rows(rows: Sequence[JsonObject]) -> JsonObject:
    """Return a document of what ``bitquota frontier --json`` printed, without its matrix.

    The rows name no layers; groups are numbered.
    """
    solved = [row for row in rows if row.get("labels")]
    n_groups = max((len(row["labels"]) for row in solved), default=0)
    points = []
    for row in solved:
        bits = [
            _number(label.partition("/")[0].lstrip("W").partition("A")[0])
            for label in row["labels"]
        ]
        points.append(
            {
                "bits": bits,
                "size_bits": int(row["spent"].get("size_bits", next(iter(row["spent"].values())))),
                "average_bits": sum(bits) / len(bits),
                "predicted": row["objective"],
                "bound": row["bound"],
            }
        )
    return document(title="frontier", frontier=points) | {
        "layers": {
            "names": [f"group {k + 1}" for k in range(n_groups)],
            "kinds": [],
            "shapes": [],
            "weights": [1] * n_groups,
        }
    }


def comparison_json(comparison: JsonObject) -> JsonObject:
    """Return what the charts show of a comparison of metrics, from its own JSON."""
    budgets = [
        " + ".join(b["text"].strip() or f"{b['limit']} bits" for b in together)
        for together in comparison["budgets"]
    ]
    entries = comparison["entries"]

    # Which entry measured best at each budget, in words.
    verdicts = []
    for k in range(len(budgets)):
        ranked = sorted(
            (e for e in entries if e["plans"][k] is not None),
            key=lambda e: float(e["plans"][k]["loss"]["mean"]),
        )
        if not ranked:
            verdicts.append("Nothing fits this budget.")
            continue
        ties = [e["name"] for e in ranked[1:] if e["plans"][k]["ties_with_best"]]
        same = f"; not clearly worse: {', '.join(ties)}" if ties else ""
        verdicts.append(f"{ranked[0]['name']} measures best{same}.")
    return {
        "budgets": budgets,
        "verdicts": verdicts,
        "accuracy": comparison["full_precision"]["accuracy"],
        "samples": comparison["full_precision"]["n_samples"],
        "entries": [
            {
                "name": e["name"],
                "known_as": e["known_as"],
                "kind": e["kind"],
                "cost": e["cost"],
                "rank_correlation": e["rank_correlation"],
                "plans": [
                    None
                    if p is None
                    else {
                        "size_bits": p["size_bits"],
                        "ties": p["ties_with_best"],
                        "mean": p["loss"]["mean"],
                        "error": p["loss"]["standard_error"],
                        "samples": p["loss"]["n_samples"],
                        "accuracy": p["loss"]["accuracy"],
                    }
                    for p in e["plans"]
                ],
            }
            for e in entries
        ],
        "skipped": comparison["skipped"],
    }


def maps_of(matrix: SensitivityMatrix, plan: Plan | None = None) -> dict[str, JsonObject]:
    """Return the maps that a file without a server holds: strongest, fewest bits, of the plan."""
    if matrix.cross is None:
        return {}
    wanted = [LARGEST, next(iter(_columns(matrix)))]
    found = {at: cross_map(matrix, at) for at in wanted}
    if plan is not None:
        try:
            found["plan"] = cross_map(matrix, "plan", plan)
        except NotFound:
            return found  # a plan of other candidates than the matrix has
    return found


def floats(array: NDArray[Any]) -> str:
    """Return base64 of the array as little-endian float32, row by row."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def _number(text: str) -> float:
    """Return the bits of a label, an integer where they are one."""
    value = float(text)
    return int(value) if value.is_integer() else value
