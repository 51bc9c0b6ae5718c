"""Problems that other tools measured: exllamav2, exllamav3 and ModelOpt, solved here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import BudgetTooSmall, InvalidBudget, InvalidInput
from bitquota.sensitivity.importers import read_measurement

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.importers import ImportedMeasurement
    from bitquota.solver import Problem

_UNITS = {"B": 8, "KiB": 8 * 2**10, "MiB": 8 * 2**20, "GiB": 8 * 2**30}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|B|KiB|MiB|GiB)?\s*")


def read_any_problem(
    path: Path, *, budget_index: int | None, budget: str | None, robust: float = 0.0
) -> Problem:
    """Return the problem of a matrix, a plain ``.npz``, or another tool's measurement.

    Args:
        path: File.
        budget_index: Which of the file's own budgets.
        budget: Text; of another tool's measurement a number in the tool's own cost, bytes such as
            ``12 MiB`` where that cost is in bits, or ``0.6x`` of the dearest choice.
        robust: Standard errors that are added to every term.

    Raises:
        InvalidInput: Unreadable, or a budget index for a file that has no budgets.
        InvalidBudget: No budget, or one that cannot be read.
        BudgetTooSmall: Below the cheapest choice.
    """
    from bitquota.solver.files import read_problem, refuse_robust

    if path.suffix != ".json":
        return read_problem(path, budget_index=budget_index, budget=budget, robust=robust)
    refuse_robust(robust)
    if budget_index is not None:
        msg = (
            f"another tool's measurement has no budgets of its own; got --budget-index with "
            f"'{path}': give --budget"
        )
        raise InvalidInput(msg, path=str(path))
    return problem_of(read_measurement(path), budget)


def problem_within(
    path: Path, limits: Mapping[str, int], robust: float = 0.0
) -> tuple[Problem, SensitivityMatrix | None]:
    """Return the problem of a file within the one limit that an answer names, and its matrix.

    ``robust`` is the answer's, 0 where it names none.

    Raises:
        InvalidInput: As ``read_any_problem``, or not exactly one limit.
    """
    from bitquota.solver.files import problem_within as of_ours
    from bitquota.solver.files import refuse_robust

    if path.suffix != ".json":
        return of_ours(path, limits, robust)
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
    found = None if budget is None else _BUDGET.fullmatch(budget)
    in_bits = unit.startswith("bits")
    if found is None or (found[2] in _UNITS and not in_bits):
        bytes_too = ", bytes such as '12 MiB'," if in_bits else ""
        msg = (
            f"a budget for {measurement.source}'s measurement must be a number ({unit}){bytes_too} "
            f"or a share of the most expensive choice such as '0.6x'; got {budget or 'none'}: "
            "give it "
            "with --budget"
        )
        raise InvalidBudget(msg, budget=budget)
    number = float(found[1])
    if found[2] == "x":
        return int(number * largest)
    return int(number * _UNITS.get(found[2], 1))


def summary(imported: JsonObject) -> str:
    """Return one sentence on what ``chosen_options`` found."""
    return (
        f"As {imported['source']} measured: {imported['cost']:,} {imported['cost_unit']}, score "
        f"{imported['score']:.6g} ({imported['unit']}); --json lists its own options."
    )


def chosen_options(path: Path, document: JsonObject) -> JsonObject | None:
    """Return what an answer chose in the other tool's own terms; ``None`` for files of ours."""
    if path.suffix != ".json" or document["choice"] is None:
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
