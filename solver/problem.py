"""The optimisation problem: one candidate per group, within integer budgets, at least loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from bitquota.errors import BudgetTooSmall, Infeasible, InvalidProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_NO_PAIRS = np.zeros((0, 2), dtype=np.int64)
_SYMMETRY_TOLERANCE = 1e-12
_PIECE = 1 << 14
"""Rows of a factor that are looked at at a time."""
_ENTRIES = 1 << 20
"""Entries of a matrix that are copied at a time."""
_LARGEST_SUM = 1e300
"""Sizes of all terms of the objective together stay below this, so that no sum overflows."""
_LEAST_TERM = float(np.finfo(np.float64).tiny)
"""Smaller numbers other than 0 (denormal ones) have lost digits that a bound would rest on."""
_LARGEST_TOTAL = 2**62
"""Sums of costs stay below this, so that they never overflow int64."""


class Numbered(Sequence[str]):
    """The names ``stem0``, ``stem1``, … of what has no others, made when they are asked for."""

    __slots__ = ("size", "stem")

    def __init__(self, stem: str, size: int) -> None:
        """Name ``size`` things."""
        self.stem, self.size = stem, size

    def __repr__(self) -> str:
        """Return what names them."""
        return f"Numbered({self.stem!r}, {self.size})"

    def __len__(self) -> int:
        """How many there are."""
        return self.size

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        """One name, or several."""
        found = range(self.size)[at]
        if isinstance(found, int):
            return f"{self.stem}{found}"
        return tuple(f"{self.stem}{k}" for k in found)

    def __eq__(self, other: object) -> bool:
        """Whether ``other`` holds the same names in the same order."""
        if not isinstance(other, (Numbered, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # tuples hash by their names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Minimise ``constant + diagonal·x + ½ xᵀ cross x`` over one candidate per group.

    Instead of ``cross`` there may be a ``factor`` U with ``cross = U Uᵀ`` outside the groups: with
    ``l_p = diagonal_p - ½ ‖U_p‖²`` the objective is ``constant + l·x + ½ ‖Uᵀx‖²``, and ``U Uᵀ`` is
    never formed as a whole. Where few rows have terms, these may be a list of pairs (``terms`` and
    ``term_values``) instead, alone or beside a factor, to whose terms they are added.

    ``x`` is one-hot in every group. A *choice* is ``i64[G]``: for each group the index of the
    chosen row **within** the group; the row itself is ``offsets[g] + choice[g]``.

    Attributes:
        diagonal: f64[n], loss increase of each row alone.
        cross: f64[n, n], symmetric, zero inside a group, or ``None`` for a separable problem,
            which one of zeros becomes.
        factor: f64[n, r], in place of ``cross``. A read-only array is taken as it is.
        terms: i64[k, 2], pairs of rows of different groups that have a term together, in place of
            ``cross``; each pair once. They are kept sorted, the lower row first, without zeros.
        term_values: f64[k], those terms.
        offsets: i64[G+1], group ``g`` owns the rows ``offsets[g]:offsets[g+1]``.
        costs: i64[m, n], what each row takes of each resource; never negative. "At most k groups
            at 8 bits" is one more row of zeros and ones with limit k.
        limits: i64[m], ``costs @ x <= limits``.
        resources: Names of the ``m`` resources.
        groups: Names of the ``G`` groups.
        labels: Names of the ``n`` rows, such as ``W4``.
        constant: Loss increase of the base point.
        allowed: bool[n], rows that may be chosen (a fixed group has one, a forbidden row none).
        forbidden_pairs: i64[p, 2], rows of different groups that must not go together.
        required_pairs: i64[q, 2], choosing the first row requires the second (of another group).
            "Must go together" is the pair both ways.
    """

    diagonal: NDArray[np.float64]
    cross: NDArray[np.float64] | None = None
    factor: NDArray[np.float64] | None = None
    terms: NDArray[np.int64] = field(default_factory=lambda: _NO_PAIRS)
    term_values: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    offsets: NDArray[np.int64]
    costs: NDArray[np.int64]
    limits: NDArray[np.int64]
    resources: Sequence[str] = ()
    groups: Sequence[str] = ()
    labels: Sequence[str] = ()
    constant: float = 0.0
    allowed: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    forbidden_pairs: NDArray[np.int64] = field(default_factory=lambda: _NO_PAIRS)
    required_pairs: NDArray[np.int64] = field(default_factory=lambda: _NO_PAIRS)

    def __post_init__(self) -> None:
        """Check shapes, finiteness, symmetry, integer ranges; make arrays read-only."""
        offsets = self._integers("offsets", self.offsets, 1)
        if len(offsets) < 2 or offsets[0] != 0 or bool((np.diff(offsets) < 1).any()):
            _fail("'offsets' must start at 0 and grow by at least 1 per group", offsets.tolist())
        n, n_groups = int(offsets[-1]), len(offsets) - 1
        self._floats("diagonal", (n,))
        if self.cross is not None:
            self._check_cross(n)
        if self.factor is not None:
            self._check_factor(n)
        self._check_terms(n)
        costs = self._integers("costs", self.costs, 2)
        limits = self._integers("limits", self.limits, 1)
        if costs.shape != (len(limits), n):
            _fail(f"'costs' must have shape [{len(limits)}, {n}]", list(costs.shape))
        if costs.size and int(costs.min()) < 0:
            _fail("'costs' must not be negative", int(costs.min()))
        if costs.size and int(costs.max()) > _LARGEST_TOTAL // n_groups:
            _fail(f"'costs' must sum to less than 2**62 over {n_groups} groups", int(costs.max()))
        for name, count, stem in (
            ("resources", len(limits), "resource"),
            ("groups", n_groups, "group"),
            ("labels", n, "row"),
        ):
            names = getattr(self, name) or Numbered(stem, count)
            if not isinstance(names, Numbered):
                names = tuple(names)
            if len(names) != count:
                _fail(f"'{name}' must hold {count} names", len(names))
            object.__setattr__(self, name, names)
        if not np.isfinite(self.constant):
            _fail("'constant' must be finite", self.constant)
        object.__setattr__(self, "constant", float(self.constant))
        summed = [self.diagonal, self.term_values, self.term_values]
        summed += [] if self.cross is None else [self.cross]
        with np.errstate(over="ignore"):
            total = abs(self.constant) + sum(float(np.abs(array).sum()) for array in summed)
            if self.factor is not None:
                columns = sum(np.abs(part).sum(axis=0) for part in _pieces(self.factor))
                total += float(columns @ columns)
        if not total < _LARGEST_SUM:
            _fail(f"the terms of the objective must sum to less than {_LARGEST_SUM:g}", total)
        allowed = np.array(self.allowed, dtype=np.bool_)
        if allowed.size == 0:
            allowed = np.ones(n, dtype=np.bool_)
        if allowed.shape != (n,):
            _fail(f"'allowed' must have shape [{n}]", list(allowed.shape))
        self._freeze("allowed", allowed)
        for name in ("forbidden_pairs", "required_pairs"):
            self._check_pairs(name, n)

    def _freeze(self, name: str, array: NDArray[Any]) -> None:
        array.flags.writeable = False
        object.__setattr__(self, name, array)

    def _floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        array = _own(getattr(self, name), np.float64)
        if array.shape != shape:
            _fail(f"'{name}' must have shape {list(shape)}", list(array.shape))
        bad = sum(int((~np.isfinite(part)).sum()) for part in _pieces(array))
        if bad:
            _fail(f"'{name}' must be finite", f"{bad} entries that are not")
        for part in _pieces(array):
            small = np.abs(part) < _LEAST_TERM
            if small.any() and part[small].any():
                got = float(part[small & (part != 0.0)].flat[0])
                msg = f"'{name}' must hold 0 or sizes of at least {_LEAST_TERM:.3g}"
                _fail(msg, f"{got:g}: round it to 0, or state losses in a smaller unit")
        self._freeze(name, array)
        return array

    def _integers(self, name: str, value: Any, ndim: int) -> NDArray[np.int64]:  # noqa: ANN401
        given = np.asarray(value)
        if given.dtype.kind not in "iu" and given.size:
            _fail(f"'{name}' must hold integers", str(given.dtype))
        if given.ndim != ndim:
            _fail(f"'{name}' must have {ndim} dimension(s)", given.ndim)
        array = _own(given, np.int64)
        self._freeze(name, array)
        return array

    def _check_cross(self, n: int) -> None:
        cross = self._floats("cross", (n, n))
        if not cross.any():
            object.__setattr__(self, "cross", None)
            return
        scale = float(np.abs(cross).max(initial=0.0))
        if float(np.abs(cross - cross.T).max(initial=0.0)) > _SYMMETRY_TOLERANCE * scale:
            _fail("'cross' must be symmetric", "an asymmetric matrix")
        for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            if np.any(cross[a:b, a:b]):
                _fail("'cross' must be zero inside a group", f"non-zero terms in rows {a}:{b}")
        if not np.array_equal(cross, cross.T):
            self._freeze("cross", (cross + cross.T) / 2)

    def _check_factor(self, n: int) -> None:
        if self.cross is not None:
            _fail("a problem must have 'cross' or 'factor', not both", "both")
        shape = np.asarray(self.factor).shape
        if len(shape) != 2 or shape[0] != n:
            _fail(f"'factor' must have shape [{n}, r]", list(shape))
        self._floats("factor", shape)
        if not shape[1]:
            object.__setattr__(self, "factor", None)

    def _check_terms(self, n: int) -> None:
        given = np.asarray(self.terms).reshape(-1, 2)
        self._floats("term_values", (len(given),))
        if not len(given):
            return
        if self.cross is not None:
            _fail("a problem must have 'cross' or 'terms', not both", "both")
        self._check_pairs("terms", n)
        pairs, values = np.sort(self.terms, axis=1), self.term_values
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        pairs, values = pairs[order], values[order]
        if bool((np.diff(pairs, axis=0) == 0).all(axis=1).any()):
            _fail("'terms' must name each pair of rows once", "a pair that stands twice")
        some = values != 0.0
        self._freeze("terms", np.ascontiguousarray(pairs[some]))
        self._freeze("term_values", values[some])

    def _check_pairs(self, name: str, n: int) -> None:
        pairs = self._integers(name, np.asarray(getattr(self, name)).reshape(-1, 2), 2)
        if not pairs.size:
            return
        if int(pairs.min()) < 0 or int(pairs.max()) >= n:
            _fail(f"'{name}' must name rows 0 to {n - 1}", [int(pairs.min()), int(pairs.max())])
        group = self.group_of_row
        if bool((group[pairs[:, 0]] == group[pairs[:, 1]]).any()):
            _fail(f"'{name}' must join rows of different groups", "two rows of one group")

    @property
    def n_rows(self) -> int:
        """Number of rows ``n``."""
        return int(self.offsets[-1])

    @property
    def separable(self) -> bool:
        """Whether no two rows have a term together."""
        return self.cross is None and self.factor is None and not len(self.terms)

    @property
    def n_groups(self) -> int:
        """Number of groups ``G``."""
        return len(self.offsets) - 1

    @property
    def group_of_row(self) -> NDArray[np.int64]:
        """``i64[n]``: the group that each row belongs to."""
        return np.repeat(np.arange(self.n_groups), np.diff(self.offsets))

    def dense(self) -> Problem:
        """Return the same problem with ``cross`` in place of ``terms``, where it has no factor."""
        cross = np.zeros((self.n_rows, self.n_rows))
        first, second = self.terms.T
        cross[first, second] = cross[second, first] = self.term_values
        return replace(self, cross=cross, terms=_NO_PAIRS, term_values=np.zeros(0))

    def listed(self) -> Problem:
        """Return the same problem with ``terms`` in place of ``cross``, where it has one."""
        if self.cross is None:
            return self
        a, b = np.nonzero(np.triu(self.cross))
        return replace(
            self, cross=None, terms=np.stack([a, b], axis=1), term_values=self.cross[a, b]
        )

    def within(self, k: int, limit: int) -> Problem:
        """Return the same problem with another limit of resource ``k``."""
        limits = self.limits.copy()
        limits[k] = limit
        return replace(self, limits=limits)

    def all_forbidden_pairs(self) -> NDArray[np.int64]:
        """Return ``i64[k, 2]``: all pairs that cannot both be chosen, first below second.

        A required pair (a, b) forbids ``a`` with every other row of ``b``'s group. Sorted, each
        pair once.
        """
        group = self.group_of_row
        pairs = [tuple(sorted(pair)) for pair in self.forbidden_pairs.tolist()]
        for a, b in self.required_pairs.tolist():
            start, stop = int(self.offsets[group[b]]), int(self.offsets[group[b] + 1])
            pairs += [(min(a, q), max(a, q)) for q in range(start, stop) if q != b]
        return np.array(sorted(set(pairs)), dtype=np.int64).reshape(-1, 2)

    def rows(self, choice: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``i64[G]``: the chosen row of every group.

        Raises:
            InvalidProblem: Wrong length, or an index outside its group.
        """
        local = np.asarray(choice, dtype=np.int64)
        counts = np.diff(self.offsets)
        if local.shape != (self.n_groups,) or bool(((local < 0) | (local >= counts)).any()):
            _fail(f"a choice must hold one row index for each of {self.n_groups} groups", choice)
        return self.offsets[:-1] + local

    def evaluate(self, choice: Sequence[int] | NDArray[np.int64]) -> float:
        """Return the objective of ``choice``, feasible or not."""
        rows = self.rows(choice)
        value = self.constant + float(self.diagonal[rows].sum())
        if self.cross is not None:
            value += 0.5 * float(self.cross[np.ix_(rows, rows)].sum())
        if self.factor is not None:
            y, squares = self.factor_sum(rows)
            value += 0.5 * (float(y @ y) - squares)
        return value + float(self.terms_between(rows).sum())

    def terms_between(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return f64[k], the values of those ``terms`` whose rows are both among ``rows``."""
        if not len(self.terms):
            return self.term_values
        inside = np.zeros(self.n_rows, dtype=np.bool_)
        inside[rows] = True
        both = inside[self.terms[:, 0]] & inside[self.terms[:, 1]]
        return self.term_values[both]

    def factor_sum(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
        """Return f64[r], the sum of the factor's ``rows``, and the sum of their squared norms."""
        y, squares = np.zeros(self.factor.shape[1]), 0.0  # type: ignore[union-attr]
        for at in range(0, len(rows), _PIECE):
            part = self.factor[rows[at : at + _PIECE]]  # type: ignore[index]
            y += part.sum(axis=0)
            squares += float(np.einsum("ij,ij->", part, part))
        return y, squares

    def pair_terms(
        self, rows: NDArray[np.int64], check: Callable[[], None] = lambda: None
    ) -> NDArray[np.float64]:
        """Return f64[k, k], the terms of ``rows`` with each other; f64[0, 0] for none.

        Rows of one group stand together. ``check`` is called between pieces of a large matrix,
        and may raise.
        """
        if self.cross is not None:
            taken = np.empty((len(rows), len(rows)))
            step = max(1, _ENTRIES // max(1, self.n_rows))
            for at in range(0, len(rows), step):
                if len(rows) > step:
                    check()
                taken[at : at + step] = self.cross[rows[at : at + step]][:, rows]
            return taken
        if self.separable:
            return np.zeros((0, 0))
        found = np.zeros((len(rows), len(rows)))
        if self.factor is not None:
            part, group = self.factor[rows], self.group_of_row[rows]
            np.matmul(part, part.T, out=found)
            for mine in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(group)) + 1):
                found[mine[:, None], mine] = 0.0
        if len(self.terms):
            place = np.full(self.n_rows, -1, dtype=np.int64)
            place[rows] = np.arange(len(rows))
            here = place[self.terms]
            inside = (here >= 0).all(axis=1)
            first, second = here[inside].T
            found[first, second] += self.term_values[inside]
            found[second, first] += self.term_values[inside]
        return found

    def spent(self, choice: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``i64[m]``: what ``choice`` takes of each resource, in integers."""
        total: NDArray[np.int64] = self.costs[:, self.rows(choice)].sum(axis=1)
        return total

    def is_feasible(self, choice: Sequence[int] | NDArray[np.int64]) -> bool:
        """Return whether ``choice`` meets every constraint, checked in integers."""
        rows = self.rows(choice)
        if not self.allowed[rows].all() or bool((self.spent(choice) > self.limits).any()):
            return False
        chosen = np.zeros(self.n_rows, dtype=np.bool_)
        chosen[rows] = True
        forbidden, required = self.forbidden_pairs, self.required_pairs
        together = chosen[forbidden[:, 0]] & chosen[forbidden[:, 1]]
        missing = chosen[required[:, 0]] & ~chosen[required[:, 1]]
        return not (bool(together.any()) or bool(missing.any()))

    def check_budgets(self) -> None:
        """Raise unless every group has an allowed row and each budget alone can be met.

        Raises:
            Infeasible: A group has no allowed row.
            BudgetTooSmall: The cheapest allowed rows exceed a budget.
        """
        starts = self.offsets[:-1]
        empty = ~np.logical_or.reduceat(self.allowed, starts)
        if empty.any():
            name = self.groups[int(np.argmax(empty))]
            msg = (
                f"group '{name}' must keep at least one allowed candidate; all are forbidden: "
                "allow one, or raise the limit that excludes them"
            )
            raise Infeasible(msg, group=name)
        for k, resource in enumerate(self.resources):
            costs = np.where(self.allowed, self.costs[k], np.iinfo(np.int64).max)
            least = int(np.minimum.reduceat(costs, starts).sum())
            if least > int(self.limits[k]):
                msg = (
                    f"the budget of '{resource}' must be at least {least:,}, what the cheapest "
                    f"candidate of every group takes; got {int(self.limits[k]):,}: raise it or "
                    "offer cheaper candidates"
                )
                raise BudgetTooSmall(
                    msg, resource=resource, limit=int(self.limits[k]), smallest=least
                )


def _own(given: Any, kind: type[np.generic]) -> NDArray[Any]:  # noqa: ANN401
    """Return ``given`` as a contiguous array of a type: itself if nobody can write to it."""
    if isinstance(given, np.ndarray) and given.base is None and not given.flags.writeable:
        return np.ascontiguousarray(given, dtype=kind)
    return np.array(given, dtype=kind, order="C")


def _pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield parts of a large array, so that what is computed of them is small."""
    for at in range(0, len(array), _PIECE):
        yield array[at : at + _PIECE]


def _fail(must: str, got: object) -> None:
    text = str(got)
    msg = f"{must}; got {text[:120]}{'…' if len(text) > 120 else ''}"
    raise InvalidProblem(msg)
