"""Problems as JSON: everything a problem can say, in one document for files and for REST.

A document states groups of candidates with their losses and costs, or names a sensitivity matrix
that has them; then budgets (several, with costs of pairs), how many groups may take a candidate,
and candidates that must, must not, must not together, or must together be chosen. Numbers of costs
and limits are integers of any size below 2^62, kept to the last unit; averages and sizes are texts
and read as the decimals that are written.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bitquota.candidates.budget import LARGEST_LIMIT
from bitquota.codec import Document, Form
from bitquota.errors import InvalidBudget, InvalidProblem

SCHEMA = "bitquota/problem/1"

Rule = tuple[str, str]
"""A group and a candidate, by name or shell pattern: ``["layer1.*", "W4"]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateEntry(Document):
    """What a group may become.

    Attributes:
        label: Its name, such as ``W4``.
        loss: Predicted loss increase when this group alone takes it.
        standard_error: Standard error of ``loss``, for ``robust``.
        costs: What it takes of each resource; 0 of those that are not named.
        factor: A vector: two candidates of different groups lose the product of their vectors
            beyond the sum of both, and what ``cross`` says besides. All have one of the same
            length.
    """

    FORM: ClassVar[Form] = Form(what="a candidate", left_out=("standard_error", "factor"))

    label: str
    loss: float
    standard_error: float = 0.0
    costs: dict[str, int] = field(default_factory=dict)
    factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEntry(Document):
    """Layers that take one candidate together.

    Attributes:
        name: Its name.
        candidates: At least one.
        weights: How many weights it has, for budgets such as ``3.5 bits``.
    """

    FORM: ClassVar[Form] = Form(what="a group", left_out=("weights",))

    name: str
    candidates: tuple[CandidateEntry, ...]
    weights: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTerm(Document):
    """What two candidates lose together beyond the sum of both.

    Attributes:
        first: Group and candidate.
        second: Group and candidate, of another group.
        loss: The extra loss, of any sign.
        standard_error: Standard error of ``loss``, for ``robust``.
    """

    FORM: ClassVar[Form] = Form(what="a cross-layer term", left_out=("standard_error",))

    first: Rule
    second: Rule
    loss: float
    standard_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEntry(Document):
    """What candidates cost, by rule.

    Attributes:
        of: Group and candidate; patterns match several.
        cost: A whole number, not negative.
    """

    FORM: ClassVar[Form] = Form(what="a cost")

    of: Rule
    cost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCost(Document):
    """What two candidates cost together beyond the sum of both, as where kernels are fused.

    Attributes:
        first: Group and candidate; patterns match several.
        second: Group and candidate, of another group.
        cost: A whole number, negative where both together are cheaper.
    """

    FORM: ClassVar[Form] = Form(what="a pair cost")

    first: Rule
    second: Rule
    cost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEntry(Document):
    """A limit on one resource.

    Attributes:
        limit: The largest amount, a whole number in the unit of the costs.
        text: Instead of a limit, what ``--budget`` takes: ``3.5 bits``, ``12 MiB of weights``.
        resource: Its name; a text of a matrix names it already, and the first is ``size_bits``.
        costs: A table of this resource, such as measured latencies; of several entries that match
            a candidate the last one counts, and every candidate must have one.
        pairs: What pairs of candidates cost beyond that.
    """

    FORM: ClassVar[Form] = Form(
        what="a budget", left_out=("limit", "text", "resource", "costs", "pairs")
    )

    limit: int | None = None
    text: str = ""
    resource: str = ""
    costs: tuple[CostEntry, ...] = ()
    pairs: tuple[PairCost, ...] = ()

    def __post_init__(self) -> None:
        """Check that it is one limit."""
        if (self.limit is None) == (not self.text):
            msg = "a budget must have either a 'limit' or a 'text', and not both"
            raise InvalidBudget(msg)
        if self.limit is not None and not -LARGEST_LIMIT < self.limit < LARGEST_LIMIT:
            msg = f"a limit must be below 2^62; got {shown_integer(self.limit)}: use a larger unit"
            raise InvalidBudget(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtMost(Document):
    """How many groups may take a candidate.

    Attributes:
        of: Group and candidate; ``["*", "W8*"]`` counts all groups at 8 bits.
        groups: At most so many.
    """

    FORM: ClassVar[Form] = Form(what="a limit on groups")

    of: Rule
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemDocument(Document):
    """An allocation problem: one candidate for each group, within budgets, at least loss.

    Attributes:
        matrix: A sensitivity matrix of ``bitquota measure`` that states groups and losses: in a
            file its path beside the document; in REST the digest of an upload, the id of a job, or
            base64 of the file.
        groups: Instead of a matrix, the groups.
        cross: With groups, their cross-layer terms; pairs that are not named have none.
        constant: With groups, the loss of the base point.
        budgets: Any number, all of which hold.
        at_most: Limits on how many groups may take a candidate.
        fixed: Groups that must take the candidate.
        forbidden: Groups that must not take the candidate.
        forbidden_pairs: Two candidates that must not be chosen together.
        required_pairs: The first candidate requires the second.
        robust: So many standard errors are added to every loss.
        top: List this many different choices, best first.
        distance: In how many groups these must differ at least.
    """

    FORM: ClassVar[Form] = Form(
        what="a problem",
        error=InvalidProblem,
        schema=SCHEMA,
        advice="see docs/reference/problem.schema.json, or 'bitquota solve --schema'",
        left_out=(
            "matrix", "groups", "cross", "constant", "budgets", "at_most", "fixed", "forbidden",
            "forbidden_pairs", "required_pairs", "robust", "top", "distance",
        ),
    )  # fmt: skip

    matrix: str | None = None
    groups: tuple[GroupEntry, ...] = ()
    cross: tuple[CrossTerm, ...] = ()
    constant: float = 0.0
    budgets: tuple[BudgetEntry, ...] = ()
    at_most: tuple[AtMost, ...] = ()
    fixed: tuple[Rule, ...] = ()
    forbidden: tuple[Rule, ...] = ()
    forbidden_pairs: tuple[tuple[Rule, Rule], ...] = ()
    required_pairs: tuple[tuple[Rule, Rule], ...] = ()
    robust: float = 0.0
    top: int = 1
    distance: int = 1

    def __post_init__(self) -> None:
        """Check that it is one problem."""
        if (self.matrix is None) == (not self.groups):
            msg = "a problem must have either a 'matrix' or 'groups', and not both"
            raise InvalidProblem(msg)
        if self.matrix is not None and (self.cross or self.constant):
            msg = "'cross' and 'constant' go with 'groups'; a 'matrix' has its own: leave them out"
            raise InvalidProblem(msg)
        if not 0.0 <= self.robust < float("inf"):
            msg = f"'robust' must be a number from 0 on; got {self.robust}"
            raise InvalidProblem(msg)
        if not 1 <= self.top <= 100 or self.distance < 1:
            msg = f"'top' must be 1 to 100 and 'distance' at least 1; got {self.top} and " + (
                shown_integer(self.distance)
            )
            raise InvalidProblem(msg)


def shown_integer(value: int) -> str:
    """Return an integer for a person; Python writes none of thousands of digits."""
    return f"about 2^{value.bit_length() - 1}" if abs(value) >= LARGEST_LIMIT else str(value)
