"""Problems that other tools measured: exllamav2, exllamav3 and ModelOpt, solved here."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.budget import LARGEST_LIMIT, LONGEST_TEXT
from bitquota.errors import BudgetTooSmall, InvalidBudget, InvalidInput
from bitquota.sensitivity.importers import read_measurement

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.importers import ImportedMeasurement
    from bitquota.solver import Problem
    from bitquota.solver.posed_problem import Posed

_UNITS = {"B": 8, "KiB": 8 * 2**10, "MiB": 8 * 2**20, "GiB": 8 * 2**30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|B|KiB|MiB|GiB)?\s*")


def read_any_problem(
    path: Path, *, budget_index: int | None, budget: str | None, robust: float = 0.0
) -> Posed:
    """Return the problem of a document, a matrix, a plain ``.npz``, or another tool's measurement.

    Args:
        path: File.
        budget_index: Which of the file's own budgets.
        budget: Text; of another tool's measurement a number in the tool's own cost, bytes such as
            ``12 MiB`` where that cost is in bits, or ``0.6x`` of the dearest choice.
        robust: Standard errors that are added to every term.

    Raises:
        InvalidInput: Unreadable, a budget index for a file that has no budgets, or a budget for a
            document, which states its own.
        InvalidBudget: No budget, or one that cannot be read.
        BudgetTooSmall: Below the cheapest choice.
    """
    from bitquota.solver.files import read_document, read_problem, refuse_robust
    from bitquota.solver.posed_problem import Posed

    if path.suffix != ".json":
        return Posed.plain(
            read_problem(path, budget_index=budget_index, budget=budget, robust=robust)
        )
    if (stated := read_document(path)) is not None:
        given = {"--budget": budget, "--budget-index": budget_index, "--robust": robust or None}
        if names := [name for name, value in given.items() if value is not None]:
            msg = f"'{path}' states its problem in full; leave {', '.join(names)} out, or edit it"
            raise InvalidInput(msg, path=str(path))
        return stated
    refuse_robust(robust)
    if budget_index is not None:
        msg = (
            f"another tool's measurement has no budgets of its own; got --budget-index with "
            f"'{path}': give --budget"
        )
        raise InvalidInput(msg, path=str(path))
    return Posed.plain(problem_of(read_measurement(path), budget))


def default_budget(path: Path) -> str | None:
    """Return a budget that permits everything; ``None`` for a document, which states its own."""
    from bitquota.solver.files import document_of

    if path.suffix != ".json":
        return "32 bits"
    return "1x" if document_of(path) is None else None


def problem_within(
    path: Path, limits: Mapping[str, int], robust: float = 0.0
) -> tuple[Problem, SensitivityMatrix | None]:
    """Return the problem of a file within the limits that an answer names, and its matrix.

    ``robust`` is the answer's, 0 where it names none.

    Raises:
        InvalidInput: As ``read_any_problem``, or limits that the file does not have.
    """
    from bitquota.solver.files import problem_within as of_ours
    from bitquota.solver.files import read_document, refuse_robust

    if path.suffix != ".json":
        return of_ours(path, limits, robust)
    if (stated := read_document(path)) is not None:
        named = dict(zip(stated.problem.resources, stated.problem.limits.tolist(), strict=True))
        if named != dict(limits):
            msg = f"the answer must be to the problem of '{path}', whose limits are others: {named}"
            raise InvalidInput(msg[:500], path=str(path))
        return stated.problem, stated.matrix
    refuse_robust(robust)
    values = np.array(list(limits.values()), dtype=np.int64)
    return replace(problem_of(read_measurement(path), "1x"), limits=values), None


def problem_of(measurement: ImportedMeasurement, budget: str | None) -> Problem:
    """Return another tool's measurement as a problem with one budget; errors as above."""
    from bitquota.solver import Problem

    costs, offsets = measurement.costs, measurement.offsets
    smallest, largest = (
        int(edge.reduceat(costs[0], offsets[:-1]).sum()) for edge in (np.minimum, np.maximum)
    )
    shift, unit = measurement.shift_bits, measurement.cost_unit
    limit = _limit(measurement, budget, largest - shift) + shift
    if limit < smallest:
        msg = (
            f"a budget must be at least {smallest - shift:,} {unit}, the cheapest choice of "
            f"{measurement.source}'s measurement; got {limit - shift:,}: raise it"
        )
        raise BudgetTooSmall(msg, smallest=smallest - shift, limit=limit - shift)
    return Problem(
        diagonal=measurement.diagonal,
        offsets=offsets,
        costs=costs,
        limits=np.array([limit], dtype=np.int64),
        resources=(unit if not shift else f"{unit}, plus {shift:,}",),
        groups=measurement.groups,
        labels=tuple(option.label for option in measurement.options),
    )


def _limit(measurement: ImportedMeasurement, budget: str | None, largest: int) -> int:
    unit = measurement.cost_unit
    found = None if budget is None or len(budget) > LONGEST_TEXT else _BUDGET.fullmatch(budget)
    in_bits = unit.startswith("bits")
    if found is None or (found[2] in _UNITS and not in_bits):
        bytes_too = ", bytes such as '12 MiB'," if in_bits else ""
        msg = (
            f"a budget for {measurement.source}'s measurement must be a number ({unit}){bytes_too} "
            "or a share of the most expensive choice such as '0.6x'; got "
            f"{(budget or 'none')[:80]}: give it with --budget"
        )
        raise InvalidBudget(msg)
    number = Fraction(found[1])  # the decimal that is written
    limit = int(number * (largest if found[2] == "x" else _UNITS.get(found[2], 1)))
    if limit >= LARGEST_LIMIT:
        msg = f"a budget must be below 2^62 {unit}; got '{budget:.40}': give a smaller one"
        raise InvalidBudget(msg)
    return limit


def summary(imported: JsonObject) -> str:
    """Return one sentence on what ``chosen_options`` found."""
    return (
        f"As {imported['source']} measured: {imported['cost']:,} {imported['cost_unit']}, score "
        f"{imported['score']:.6g} ({imported['unit']}); --json lists its own options."
    )


def chosen_options(path: Path, document: JsonObject) -> JsonObject | None:
    """Return what an answer chose in the other tool's own terms; ``None`` for files of ours."""
    from bitquota.solver.files import document_of

    if path.suffix != ".json" or document["choice"] is None or document_of(path):
        return None
    measurement = read_measurement(path)
    options = measurement.chosen(tuple(document["choice"]))
    return {
        "source": measurement.source,
        "unit": measurement.unit,
        "cost_unit": measurement.cost_unit,
        "score": sum(option.score for option in options),
        "cost": sum(option.cost_bits for option in options),
        "options": [
            {
                "group": option.group,
                "label": option.label,
                "score": option.score,
                "cost": option.cost_bits,
                "detail": option.detail,
            }
            for option in options
        ],
    }
