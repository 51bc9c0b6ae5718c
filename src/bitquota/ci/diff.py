"""What changed between two plans, for a pull request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.codec import Document
from bitquota.exports.export_report import describe_candidate

if TYPE_CHECKING:
    from bitquota.candidates.budget import Budget
    from bitquota.candidates.table import Candidate
    from bitquota.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """One layer that differs; ``None`` where a plan does not have it."""

    layer: str
    old: str | None
    new: str | None
    old_bits: int
    new_bits: int


@dataclass(frozen=True, slots=True)
class Fact:
    """Something else that differs, in words."""

    name: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff(Document):
    """Two plans compared.

    Attributes:
        changes: Layers that differ, in the new plan's order; layers that went last.
        facts: Everything else that differs.
    """

    changes: tuple[LayerChange, ...]
    facts: tuple[Fact, ...]

    @property
    def empty(self) -> bool:
        """Whether nothing differs."""
        return not self.changes and not self.facts

    def to_markdown(self) -> str:
        """Return tables for a pull request; empty text if nothing differs."""
        parts = []
        if self.facts:
            parts.append("| | old | new |\n|---|---|---|")
            parts += [f"| {f.name} | {f.old} | {f.new} |" for f in self.facts]
        if self.changes:
            if parts:
                parts.append("")
            parts.append("| layer | old | new | bytes |\n|---|---|---|---|")
            for c in self.changes:
                change = (c.new_bits - c.old_bits) / 8
                parts.append(f"| `{c.layer}` | {c.old or '—'} | {c.new or '—'} | {change:+,.0f} |")
        return "\n".join(parts) + ("\n" if parts else "")


def diff_plans(old: Plan, new: Plan) -> PlanDiff:
    """Return what differs between two plans: layers, sizes, losses, model, corrections."""
    before = {c.layer: c for c in old.candidates}
    after = {c.layer: c for c in new.candidates}
    changes = []
    for name in (*after, *(n for n in before if n not in after)):
        a, b = before.get(name), after.get(name)
        if a != b:
            changes.append(
                LayerChange(
                    layer=name,
                    old=_text(a),
                    new=_text(b),
                    old_bits=0 if a is None else a.size_bits,
                    new_bits=0 if b is None else b.size_bits,
                )
            )
    facts = [
        Fact(name, x, y)
        for (name, x), (_, y) in zip(_facts(old), _facts(new), strict=True)
        if x != y
    ]
    return PlanDiff(changes=tuple(changes), facts=tuple(facts))


def _text(candidate: Candidate | None) -> str | None:
    return None if candidate is None else describe_candidate(candidate)


def _target(plan: Plan) -> str:
    if plan.target is None:
        return "none"
    return f"{plan.target.name}, rules {plan.target.version.removeprefix('sha256:')[:12]}"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    measured = plan.measured
    loss = accuracy = "not measured"
    if measured is not None:
        loss = f"{measured.mean:.6g} ± {measured.standard_error:.2g} {measured.unit}"
        if measured.accuracy is not None:
            accuracy = f"{100 * measured.accuracy:.2f} %"
    proof = plan.proof
    gap = "none"
    if proof is not None:
        relative = proof.relative_gap
        gap = proof.status + ("" if relative is None else f", gap {relative:.2%}")
    return [
        ("model", plan.model_digest[:23]),
        ("target", _target(plan)),
        ("size of the model", f"{plan.model_bits / 8:,.0f} bytes"),
        ("average bits", f"{plan.average_bits:.4f}"),
        ("stored bits per weight", f"{plan.effective_bits:.4f}"),
        ("measured loss increase", loss),
        ("accuracy on the hold-out", accuracy),
        ("proof", gap),
        ("chosen by", plan.selected),
        ("corrections", ", ".join(map(str, plan.corrections)) or "none"),
        ("budgets", ", ".join(map(_budget, plan.budgets)) or "none"),
    ]


def _budget(budget: Budget) -> str:
    """Return a budget as it was written, and which cost table prices it."""
    text = budget.text or f"{budget.limit} {budget.unit}"
    return text if budget.prices is None else f"{text} by table {budget.prices.digest()[:19]}…"
