"""Problems from files: our own matrix files, and the plain ``.npz`` of published instances."""

from __future__ import annotations

import math
import re
import zipfile
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.budget import Budget
from bitquota.canonical import read_json, why_unreadable
from bitquota.errors import InvalidBudget, InvalidInput, InvalidMatrix
from bitquota.matrix import SensitivityMatrix
from bitquota.solver.build import build_problem
from bitquota.solver.matrix_budgets import budget_of
from bitquota.solver.posed_problem import posed
from bitquota.solver.problem import Problem
from bitquota.solver.problem_document import ProblemDocument

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject
    from bitquota.solver.posed_problem import Posed


def read_problem(
    path: Path,
    *,
    budget_index: int | None = None,
    budget: str | int | None = None,
    robust: float = 0.0,
) -> Problem:
    """Return the problem in ``path``.

    Two layouts are read. Our own matrix file (``bitquota measure``); ``budget`` is then one of its
    weights such as ``3 bits`` or ``12 MiB of weights``, or an integer limit in bits. Or a plain
    archive with ``G`` f64[n, n] and ``sizes`` [L, B]: minimise ``xᵀGx`` with ``x`` one-hot per row
    of ``sizes`` and ``Σ sizes·x`` at most the budget; ``budget_index`` picks from its ``budgets``,
    or ``budget`` is an average over its ``params`` or an integer in the unit of ``sizes``.
    ``robust`` standard errors are added to every term (``SensitivityMatrix.robust``).

    Raises:
        InvalidMatrix: Neither layout, or an invariant does not hold.
        InvalidBudget: No budget, two budgets, or one that cannot be read.
        BudgetTooSmall: The budget is below the smallest plan.
        InvalidInput: ``robust`` for numbers without standard errors.
    """
    if (budget_index is None) == (budget is None):
        msg = "a problem needs either a budget or a budget index; got " + (
            "neither" if budget is None else "both"
        )
        raise InvalidBudget(msg)
    plain = _plain_arrays(path)
    if plain is not None:
        refuse_robust(robust)
        return _plain(plain, budget_index, budget)
    if budget is None:
        msg = "a matrix file lists no budgets; give one with --budget, such as '3 bits'"
        raise InvalidBudget(msg, budget_index=budget_index)
    matrix = SensitivityMatrix.load(path).robust(robust)
    return build_problem(matrix, [budget_of(str(budget), matrix)])


def read_document(path: Path) -> Posed | None:
    """Return the problem of a JSON document, or ``None`` for other JSON.

    A matrix that it names is looked for beside it.

    Raises:
        InvalidInput: It is no JSON, or states no problem; see ``posed``.
    """
    data = document_of(path)
    if data is None:
        return None

    def find(name: str) -> tuple[SensitivityMatrix, None]:
        return SensitivityMatrix.load(path.parent / name), None

    return posed(ProblemDocument.from_json(data), find)


def document_of(path: Path) -> JsonObject | None:
    """Return the JSON of a file that is a problem document, unchecked, or ``None`` for other JSON.

    Raises:
        InvalidInput: It is no JSON.
    """
    advice = "name a problem, or a measurement of another tool"
    data = read_json(path, "a problem file", advice, InvalidInput)
    named = str(data.get("schema", "")) if isinstance(data, dict) else ""
    return data if named.startswith("bitquota/problem") else None


def refuse_robust(robust: float) -> None:
    """Raise ``InvalidInput`` where ``robust`` is asked of a file without standard errors."""
    if robust:
        msg = (
            "a robust choice needs standard errors, which only a matrix of 'bitquota measure' "
            "has; leave --robust out"
        )
        raise InvalidInput(msg, robust=robust)


def problem_within(
    path: Path, limits: Mapping[str, int], robust: float = 0.0
) -> tuple[Problem, SensitivityMatrix | None]:
    """Return the problem in ``path`` within the one limit of a solution, and its matrix if any.

    Args:
        path: What ``read_problem`` takes.
        limits: Resource and limit, as in the ``limits`` of ``bitquota solve --json``.
        robust: Its ``robust``, likewise.

    Raises:
        InvalidMatrix: As ``read_problem``.
        InvalidBudget: Not exactly one limit.
        BudgetTooSmall: The limit is below the smallest plan.
    """
    if len(limits) != 1:
        msg = f"a solution must state one budget; got {', '.join(limits) or 'none'}"
        raise InvalidBudget(msg)
    ((resource, limit),) = limits.items()
    plain = _plain_arrays(path)
    if plain is not None:
        refuse_robust(robust)
        return _plain(plain, None, int(limit)), None
    matrix = SensitivityMatrix.load(path).robust(robust)
    return build_problem(matrix, [Budget(resource=resource, limit=int(limit))]), matrix


def matrix_digest(path: Path, robust: float = 0.0) -> str | None:
    """Return the digest of the sensitivity matrix in ``path``, or ``None`` for a plain archive.

    With ``robust``, that of the matrix with so many standard errors added.

    Raises:
        InvalidMatrix: As ``read_problem``.
    """
    return (
        None
        if _plain_arrays(path) is not None
        else SensitivityMatrix.load(path).robust(robust).digest()
    )


def _plain_arrays(path: Path) -> dict[str, Any] | None:
    """Return the arrays of a plain archive, or ``None`` for a matrix file of ours."""
    try:
        # An open file of our own: np.load leaves its own one open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            plain: dict[str, Any] = {}
            if {"G", "sizes"} <= names:
                wanted = names & {"G", "sizes", "bits", "params", "budgets"}
                plain = {name: archive[name] for name in wanted}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as err:
        msg = (
            "a problem file must be a readable .npz archive without pickled parts; "
            f"'{path}' {why_unreadable(err)}"
        )
        raise InvalidMatrix(msg, path=str(path)) from err
    for name, array in plain.items():
        if array.dtype.kind not in "iufb":
            msg = f"the arrays of a problem file must be numbers; '{name}' is {array.dtype}"
            raise InvalidMatrix(msg, path=str(path), array=name)
    if plain:
        return plain
    if "meta" not in names:
        msg = (
            "a problem file must be a matrix that 'bitquota measure' wrote, or hold the arrays "
            f"'G' and 'sizes'; got {', '.join(sorted(names)) or 'an empty archive'}"
        )
        raise InvalidMatrix(msg, path=str(path))
    return None


def _plain(arrays: dict[str, Any], index: int | None, budget: str | int | None) -> Problem:
    G = np.asarray(arrays["G"], dtype=np.float64)
    sizes = np.asarray(arrays["sizes"])
    if sizes.ndim != 2 or G.shape != (sizes.size, sizes.size):
        msg = (
            "'sizes' must be L x B and 'G' LB x LB; got shapes "
            f"{list(sizes.shape)} and {list(G.shape)}"
        )
        raise InvalidMatrix(msg)
    if not np.isfinite(G).all():
        msg = f"'G' must be finite; {int((~np.isfinite(G)).sum())} of its entries are not"
        raise InvalidMatrix(msg)
    costs = _integers(sizes)
    n_groups, width = sizes.shape
    limit = _plain_limit(arrays, index, budget, n_groups)
    with np.errstate(over="ignore"):  # a problem refuses infinities
        cross = G + G.T
    for g in range(n_groups):
        block = slice(g * width, (g + 1) * width)
        cross[block, block] = 0.0
    labels = tuple(f"option{k % width}" for k in range(sizes.size))
    if "bits" in arrays and np.shape(arrays["bits"]) == sizes.shape:
        labels = tuple(f"W{value:g}" for value in np.ravel(arrays["bits"]))
    return Problem(
        diagonal=np.diag(G).copy(),
        cross=cross,
        offsets=np.arange(n_groups + 1, dtype=np.int64) * width,
        costs=costs.reshape(1, -1),
        limits=np.array([limit], dtype=np.int64),
        resources=("size_bits",),
        groups=tuple(f"layer{g}" for g in range(n_groups)),
        labels=labels,
    )


def _integers(sizes: NDArray[Any]) -> NDArray[np.int64]:
    if sizes.dtype.kind in "iu":  # a float would round those beyond 2**53
        if bool((sizes < 0).any()) or bool((sizes >= 2**62).any()):
            msg = "'sizes' must be from 0 to below 2**62"
            raise InvalidMatrix(msg)
        return sizes.astype(np.int64)
    rounded = np.round(np.asarray(sizes, dtype=np.float64))
    whole = np.array_equal(rounded, sizes) and bool((rounded >= 0).all())
    if not whole or bool((rounded >= 2.0**62).any()):
        msg = "'sizes' must be whole numbers from 0 to below 2^62; scale them to bits or bytes"
        raise InvalidMatrix(msg)
    return rounded.astype(np.int64)


def _plain_limit(
    arrays: dict[str, Any], index: int | None, budget: str | int | None, n_groups: int
) -> int:
    if index is not None:
        budgets = np.ravel(arrays.get("budgets", []))
        if not 0 <= index < len(budgets):
            msg = f"the budget index must be 0 to {len(budgets) - 1} for this file; got {index}"
            raise InvalidBudget(msg, budget_index=index)
        return _limit(budgets[index].item(), f"{budgets[index]}")
    text = str(budget).strip()
    number, _, unit = text.replace("bits", " bits").replace("bpw", " bpw").partition(" ")
    try:
        value = decimal(number)
    except ValueError:
        value = Fraction(-1)
    if not value > 0 or unit.strip() not in {"", "bit", "bits", "bpw"}:
        msg = f"a budget must be an integer limit or an average such as '3 bits'; got '{text:.80}'"
        raise InvalidBudget(msg, budget=text[:80])
    if not unit:
        return _limit(value, text)
    params = np.ravel(arrays.get("params", []))
    if len(params) != n_groups:
        msg = "an average needs the file's 'params' (weights per layer); it has none: use an index"
        raise InvalidBudget(msg, budget=text[:80])
    if not np.isfinite(params).all():
        msg = "the file's 'params' must be finite"
        raise InvalidBudget(msg, budget=text)
    return _limit(value * sum(map(Fraction, params.tolist()), Fraction()), text)


def decimal(text: str) -> Fraction:
    """Return the number that a text writes, to the last digit; ``1e400`` is a number, too.

    Raises:
        ValueError: It is none, or one of hundreds of digits.
    """
    found = re.fullmatch(r"[+-]?([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]{1,3}))?", text)
    if found is None or not 0 < len((found[1] or "") + (found[2] or "")) < 400:
        msg = f"a number must be a decimal such as 4.1; got '{text[:40]}'"
        raise ValueError(msg)
    return Fraction(text)


def _limit(value: float | Fraction, text: str) -> int:
    """Return ``value``, rounded down, if it is a limit at all."""
    if not -(2**62) < value < 2**62:  # NaN too
        msg = f"a budget must be a finite number below 2**62; got '{text:.80}'"
        raise InvalidBudget(msg, budget=text)
    return math.floor(value)
