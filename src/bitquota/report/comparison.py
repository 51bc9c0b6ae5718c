"""The result of comparing metrics on one model: numbers, JSON, Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from bitquota.candidates.budget import Budget
from bitquota.canonical import JsonObject
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput
from bitquota.plan import MeasuredLoss
from bitquota.report.text import CLEAR_DIFFERENCE, format_loss, format_size, markdown_table

SCHEMA = "bitquota/comparison/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Document):
    """One way to choose, under one budget.

    Attributes:
        choice: Row within each group.
        labels: Candidate of every layer, such as ``W4``, in the model's order.
        size_bits: Exact storage of the quantizable weights.
        predicted: What the metric predicts for this choice, in its own unit, or ``None``.
        loss: Measured on the hold-out samples.
        worse_by: Mean over samples of (this loss minus that of the budget's best).
        worse_error: Standard error of ``worse_by``.
        rank_correlation: Spearman's, predicted against measured over the ranked plans of this
            budget; ``None`` where there is no prediction.
    """

    FORM: ClassVar[Form] = Form(derived=("ties_with_best",))

    choice: tuple[int, ...]
    labels: tuple[str, ...]
    size_bits: int
    predicted: float | None
    loss: MeasuredLoss
    worse_by: float
    worse_error: float
    rank_correlation: float | None

    @property
    def ties_with_best(self) -> bool:
        """Whether it is within the clear difference (two paired standard errors) of the best."""
        return self.worse_by <= CLEAR_DIFFERENCE * self.worse_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Document):
    """One way to choose, over all budgets.

    Attributes:
        name: As users write it.
        known_as: Under which name users may know it.
        kind: ``measure``, ``search`` (measures plans on the way), ``rule`` or ``baseline``.
        cost: Declared forward-equivalents over the calibration samples, if it declares them.
        passes: Those that this run executed; what the ledger held is not counted.
        cpu_seconds: CPU seconds of this process for them, solving included.
        flags: Rows that are negative or grow with the bit-width.
        rank_correlation: Spearman's over the ranked plans of all budgets together.
        plans: One for each budget; ``None`` where it has none within it.
    """

    name: str
    known_as: str
    kind: str
    cost: float | None
    passes: float
    cpu_seconds: float
    flags: tuple[JsonObject, ...] = ()
    rank_correlation: float | None = None
    plans: tuple[Measured | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Document):
    """What ``bitquota.search.compare.compare`` returns.

    Attributes:
        model_digest: Whose.
        budgets: The budgets of each plan.
        full_precision: Accuracy of the unquantized model; its loss increase is zero.
        loss: Name of the loss.
        entries: Every way to choose, in the order of the measures.
        skipped: Measure to the reason why it is missing.
        n_ranked: For each budget, random and near-good plans that rank correlations stand on.
        provenance: Request, samples, versions.
    """

    FORM: ClassVar[Form] = Form(
        what="a comparison",
        schema=SCHEMA,
        schema_key="schema_version",
    )

    model_digest: str
    budgets: tuple[tuple[Budget, ...], ...]
    full_precision: MeasuredLoss
    loss: str
    entries: tuple[Entry, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    n_ranked: tuple[int, ...] = ()
    provenance: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every way to choose has a place for each budget."""
        if not all(len(entry.plans) == len(self.budgets) for entry in self.entries):
            msg = "every way to choose must have a plan or none for each budget"
            raise InvalidInput(msg)

    def budget_text(self, k: int) -> str:
        """Return what the user wrote for budget ``k``."""
        return " + ".join(b.text.strip() or f"{b.limit} {b.unit}" for b in self.budgets[k])

    def ranked(self, k: int) -> list[tuple[Entry, Measured]]:
        """Return the entries that have a plan for budget ``k``, smallest measured loss first."""
        pairs = [(e, p) for e in self.entries if (p := e.plans[k]) is not None]
        return sorted(pairs, key=lambda pair: pair[1].loss.mean)

    def to_text(self) -> str:
        """Return ``to_json`` as indented text with sorted keys, ending in a newline."""
        return json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def distinct(self, k: int) -> list[tuple[tuple[Entry, ...], Measured]]:
        """Return each distinct plan of budget ``k`` with everybody who chose it, best first."""
        groups: dict[tuple[int, ...], list[tuple[Entry, Measured]]] = {}
        for entry, plan in self.ranked(k):
            groups.setdefault(plan.choice, []).append((entry, plan))
        return [(tuple(e for e, _ in group), group[0][1]) for group in groups.values()]

    def verdict(self, k: int) -> str:
        """Return one sentence on budget ``k``: who is best, and who cannot be told from it."""
        (best, plan), *others = self.distinct(k)
        verb = "measure" if len(best) > 1 else "measures"
        ties = [_names(entries) for entries, p in others if p.ties_with_best]
        text = f"{_names(best)} {verb} best ({format_loss(plan.loss)})"
        if len(best) > 1:
            text += ", with one plan"
        if ties:
            text += f"; not clearly worse: {'; '.join(ties)}"
        return text + "."

    def overview_rows(self, *, wide: bool = True) -> list[dict[str, str]]:
        """Return one row of text for each entry: what it costs and how well it ranks.

        Args:
            wide: Whether there is room to say under which name users may know it.
        """
        rows = []
        for e in self.entries:
            if e.kind == "baseline":
                continue
            row = {"method": e.name} | ({"known as": e.known_as} if wide else {})
            row |= {
                "declared passes": "" if e.cost is None else f"{e.cost:.1f}",
                "passes run": f"{e.passes:.1f}",
                "CPU s": f"{e.cpu_seconds:.1f}",
                "ranks": _correlation(e.rank_correlation),
            }
            for k in range(len(self.budgets)) if len(self.budgets) > 1 else ():
                plan = e.plans[k]
                value = None if plan is None else plan.rank_correlation
                row[f"ranks at {self.budget_text(k)}"] = _correlation(value)
            rows.append(row | {"oddities": str(len(e.flags)) if e.flags else ""})
        return rows

    def budget_rows(self, k: int, *, wide: bool = True) -> list[dict[str, str]]:
        """Return one row of text for each distinct plan of budget ``k``, best first.

        Args:
            k: Which budget.
            wide: Whether there is room for exact bytes.
        """
        labelled = self.full_precision.accuracy is not None
        rows = []
        for entries, plan in self.distinct(k):
            behind = "" if plan.worse_by == 0 else f"+{plan.worse_by:.3g} ± {plan.worse_error:.2g}"
            size = format_size(plan.size_bits)
            row = {
                "chosen by": _names(entries),
                "stored weights": size if wide else size.partition(" (")[0],
                f"loss increase ({self.loss})": format_loss(plan.loss),
                "worse than the best by": behind.replace("+-", "-"),
            }
            if labelled:
                accuracy = plan.loss.accuracy
                row["accuracy"] = "" if accuracy is None else f"{100 * accuracy:.2f} %"
            rows.append(row)
        return rows

    def missing(self) -> list[str]:
        """Return who is missing and why, one sentence for each reason."""
        names: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names.setdefault(reason, []).append(name)
        return [
            f"{', '.join(who)} {'is' if len(who) == 1 else 'are'} missing: {reason}"
            for reason, who in names.items()
        ]

    def explanations(self) -> list[str]:
        """Return what a reader of the tables must know, one sentence or two for each point."""
        accuracy = self.full_precision.accuracy
        facts = [] if accuracy is None else [f"Full precision scores {100 * accuracy:.2f} %."]
        return [
            *facts,
            (
                "Losses are increases over full precision on "
                f"{self.full_precision.n_samples} hold-out samples that no metric saw, in "
                f"{self.full_precision.unit}; ± is one standard error (of the paired difference, "
                "for 'worse than the best by')."
            ),
            (
                "Passes are full forward passes over the calibration samples; 'passes run' "
                "leaves out what the ledger held. CPU seconds are those of this run."
            ),
            (
                "'Ranks' is Spearman's correlation of predicted with measured losses, over random "
                f"and near-good plans ({', '.join(map(str, self.n_ranked))} for each budget)."
            ),
            (
                "'Oddities' counts candidates with a negative score, or a larger one than a "
                "candidate with fewer bits; nothing was clamped."
            ),
        ]

    def render_markdown(self, title: str = "Comparison of metrics") -> str:
        """Return everything for a person, as Markdown."""
        parts = [f"# {title}\n"]
        parts.append("\n".join(f"- {fact}" for fact in self.explanations()) + "\n")
        parts.append("## What each costs\n")
        parts.append(markdown_table(self.overview_rows()))
        parts += [f"- {sentence}" for sentence in self.missing()]
        if self.skipped:
            parts.append("")
        for k in range(len(self.budgets)):
            parts.append(f"## Budget {self.budget_text(k)}\n")
            parts.append(self.verdict(k) + "\n")
            parts.append(markdown_table(self.budget_rows(k)))
        return "\n".join(parts)


def _correlation(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _names(entries: tuple[Entry, ...]) -> str:
    return ", ".join(entry.name for entry in entries)
