"""The report: what a plan is, what it cost to accuracy, and what simpler choices would have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bitquota.evaluate.scores import SHARES
from bitquota.plan import SOLVER
from bitquota.report.costs import cost_sentences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.layers import Inventory, UnquantizedTensor
    from bitquota.canonical import JsonObject
    from bitquota.evaluate.scores import Estimate, Score
    from bitquota.plan import Baseline, MeasuredLoss, Plan

CLEAR_DIFFERENCE = 2.0
"""Paired standard errors from which on a difference is called one."""

WORTHWHILE_RATIO = 1.05
"""Of a uniform plan's loss to the plan's, from which on mixing bit-widths is said to help."""


USUAL_SHARE = 0.95
"""Share of quantizable bytes from which on nothing need be said of the rest."""

FEW_SAMPLES = 30
"""Hold-out samples below which a standard error is too uncertain to be read as one."""


def format_size(bits: int) -> str:
    """Return bits as a size for a person: ``97.6 KiB (99,926 B)``; bytes are rounded up."""
    n_bytes = -(-bits // 8)
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{n_bytes:,} B" if unit == "B" else f"{value:.1f} {unit} ({n_bytes:,} B)"


def format_loss(measured: MeasuredLoss) -> str:
    """Return mean and standard error with digits that fit the error; one sample has no error."""
    if measured.n_samples == 1:
        return f"{measured.mean:.4g} (1 sample)"
    return f"{measured.mean:.4g} ± {measured.standard_error:.2g}"


def quantizable_sentences(inventory: Inventory) -> list[str]:
    """Return what share of a model's bytes can be quantized, and what holds the rest.

    Empty from ``USUAL_SHARE`` on: then biases and norms are all that is left.
    """
    share = 1 - inventory.unquantized_bits / inventory.full_precision_bits
    if share >= USUAL_SHARE:
        return []
    by_reason: dict[str, list[UnquantizedTensor]] = {}
    for tensor in inventory.unquantized:
        by_reason.setdefault(tensor.reason or "no layer", []).append(tensor)
    sizes = {why: sum(t.size_bits for t in held) for why, held in by_reason.items()}
    parts = []
    for why in sorted(sizes, key=lambda why: -sizes[why])[:3]:
        largest = max(by_reason[why], key=lambda t: t.size_bits)
        more = len(by_reason[why]) - 1
        others = f" and {more} more" if more else ""
        parts.append(f"{format_size(sizes[why])} in {largest.name}{others}: {why}")
    left = len(sizes) - len(parts)
    tail = f"; and {left} other kinds of tensors" if left else ""
    return [f"Quantizable: {100 * share:.3g} % of the bytes. The rest: {'; '.join(parts)}{tail}."]


def best_uniform(plan: Plan) -> Baseline | None:
    """Return the best uniform baseline at the plan's bytes, if there is one.

    Mixes of two widths count as uniform. Only where none takes at most the plan's bytes is a
    larger one returned.
    """
    uniform = [b for b in plan.baselines if b.name.startswith("uniform")]
    fair = [b for b in uniform if b.total_bits <= plan.size_bits + plan.cache_size_bits]
    return min(fair or uniform, key=lambda b: b.measured.mean, default=None)


def times_less(plan: Plan, baseline: Baseline) -> tuple[float, float] | None:
    """Return how many times less the plan loses than ``baseline``, and the standard error of that.

    The error of a quotient ``r = u / p`` of means over the same samples is, to first order, that of
    the mean of ``u - r p``, over ``p``; covariance follows from the paired difference. ``None``
    where the plan loses nothing.
    """
    if plan.measured is None or plan.measured.mean <= 0:
        return None
    p, u = plan.measured, baseline.measured
    ratio = u.mean / p.mean
    squares = p.standard_error**2, u.standard_error**2, baseline.paired_error**2
    covariance = (squares[0] + squares[1] - squares[2]) / 2
    variance = squares[1] + ratio**2 * squares[0] - 2 * ratio * covariance
    return ratio, math.sqrt(max(0.0, variance)) / p.mean


def times_text(ratio: float, error: float) -> str:
    """Return ``3.3 ± 0.2`` of a ratio and its standard error, both to the digits that count.

    An error below a digit of the ratio as it is shown says nothing, and is left out.
    """
    rough = float(f"{error:.1g}")
    if rough < 0.05:
        return f"{ratio:.1f}"
    return f"{ratio:.0f} ± {rough:.0f}" if rough >= 1 else f"{ratio:.1f} ± {rough:g}"


def verdict(plan: Plan) -> str:
    """Return in a plain sentence or two: does mixing bit-widths help here?"""
    return " ".join([_verdict(plan), *_further_sentences(plan)])


def _verdict(plan: Plan) -> str:
    uniform = best_uniform(plan)
    if plan.selected.startswith("uniform"):
        return (
            f"Mixed precision does not help here: {plan.selected} measured best of all choices "
            "within this budget, and is what you get."
        )
    if uniform is None:
        return "No uniform plan fits this budget, so there is nothing uniform to compare with."
    gain, error = uniform.paired_difference, uniform.paired_error
    fewer = f"{uniform.name} ({format_size(uniform.total_bits).partition(' (')[0]})"
    if uniform.measured.n_samples == 1:
        return (
            "One hold-out sample cannot say whether mixed precision helps here; give more samples."
        )
    if gain == error == 0:
        return (
            f"Mixed precision does not help here: the plan measures the same as {fewer} on every "
            "sample."
        )
    if gain <= CLEAR_DIFFERENCE * error:
        return (
            f"Mixed precision is not clearly better than {fewer} here: the loss is "
            f"{'higher' if gain < 0 else 'lower'} by {abs(gain):.3g} ± {error:.2g}."
        )
    found = times_less(plan, uniform)
    if found is not None and 1 < found[0] < WORTHWHILE_RATIO:
        return (
            "Mixed precision makes little difference here: the loss increase is lower than that of "
            f"{fewer} by {100 * (1 - 1 / found[0]):.2g} % ({gain:.3g} ± {error:.2g})."
        )
    times = ""
    if found is not None and found[0] > 1:
        times = f", {times_text(*found)} times less"
    return (
        f"Mixed precision helps: the loss increase is lower than that of {fewer} by "
        f"{gain:.3g} ± {error:.2g}{times}."
    )


def _further_sentences(plan: Plan) -> list[str]:
    about = plan.provenance.get("uniform")
    if not about:
        return []
    (first, worse_by), (first_error, error) = about["worse_by"], about["standard_error"]
    n, together = about["samples"]
    chosen = about["beside"] if worse_by > 0 else "the mixed plan"
    sentence = (
        f"The {n:,} hold-out samples could not tell the mixed plan from {about['beside']} (its "
        f"loss is {first:+.3g} ± {first_error:.2g} beside it), so both were measured on "
        f"{together:,} samples in all ({worse_by:+.3g} ± {error:.2g}): {chosen} is what you get."
    )
    return [sentence]


def proof_sentence(plan: Plan) -> str:
    """Return one or two sentences on how far the choice can be from the best *predicted* one.

    A proof speaks of the matrix around full precision; the choice was found by measurements.
    """
    proof = plan.proof
    if proof is None or proof.bound is None:
        return "The solver gave no bound."
    how = "certified" if proof.certified else "reported by the solver, not certified"
    gap = f"{proof.absolute_gap:.3g} absolute, {100 * (proof.relative_gap or 0.0):.3g} %"
    # A metric scores in its own unit.
    what = "gives a score" if plan.predicted is None else "predicts a loss increase"
    found = (
        f"The matrix around full precision {what} of {proof.objective:.4g}; no choice within the "
        f"budget is predicted below {proof.bound:.4g} ({how}; gap {gap}; "
        f"{proof.solver}, {proof.status})."
    )
    if proof.status == "optimal":
        return found
    return (
        f"{found} The plan was chosen by measured losses, which that proof does not speak of: no "
        "proof says that no other choice measures better."
    )


def evidence_sentences(plan: Plan) -> list[str]:
    """Return what the plans measured as evidence say about predictions and about the plan."""
    evidence = plan.evidence
    if not evidence:
        return []
    points = evidence["points"]
    kinds = [point["kind"] for point in points]
    found = []
    own = points[0]
    correlations = [
        f"{value:.2f} over {name}"
        for name, value in (
            ("all of them", evidence["rank_correlation"]),
            ("the plan and its neighbours", evidence["near_correlation"]),
        )
        if value is not None
    ]
    # A matrix of another metric orders plans, in units of its own.
    predicted = "" if plan.predicted is None else f"Predicted {own['predicted']:.4g}, measured "
    single = plan.measured is not None and plan.measured.n_samples == 1
    error = "" if single else f" ± {own['error']:.2g}"
    # What predictions are compared with is not what ships, where that is rounded again.
    before = "" if plan.weights is None else " before the final rounding"
    found.append(
        f"{predicted or 'Measured '}{own['measured']:.4g}{error}{before}. "
        f"Rank correlation of prediction and measurement ({kinds.count('near')} neighbours and "
        f"{kinds.count('random')} random plans of the same budget): "
        + (", ".join(correlations) or "none, nothing varies")
        + "."
    )
    if "random" in kinds:
        low, middle, high = evidence["random_band"]
        worse = round(evidence["better_than_random"] * kinds.count("random"))
        found.append(
            f"Random plans of the same budget lose {low:.4g} to {high:.4g} (median {middle:.4g}); "
            f"{worse} of {kinds.count('random')} measured worse than the plan."
        )
    return found


def caution_sentences(plan: Plan) -> list[str]:
    """Return what a reader must know: what identifies the model, and if samples are few.

    The standard error of ``n`` samples of a normal distribution is itself uncertain by about
    ``1 / sqrt(2 (n - 1))`` of its value.
    """
    identity = plan.provenance.get("identity")
    first = [f"Caution: {identity}."] if identity else []
    n = 0 if plan.measured is None else plan.measured.n_samples
    if not 1 < n < FEW_SAMPLES:
        return first
    share = round(100 / math.sqrt(2 * (n - 1)))
    sentence = (
        f"Caution: only {n} hold-out samples stand behind these figures. Their standard errors are "
        f"themselves uncertain by about {share} %: read nothing into small differences, or give "
        f"more samples ({FEW_SAMPLES} to hold out at least)."
    )
    return [*first, sentence]


def output_sentences(plan: Plan) -> list[str]:
    """Return what each output was taken for, and how far the plan changes the answers."""
    several = len(plan.outputs or ()) > 1
    lines = []
    for output in plan.outputs or ():
        what = f"Output '{output.name}'" if several else "The output"
        text = f"{what} was taken for {output.kind}, measured in {output.loss}"
        if output.undone:
            text += f" before the {_ENDS[output.undone]}"
        if several:
            text += f" with weight {output.weight:g}"
        effects = []
        if output.changed is not None:
            effects.append(f"{100 * output.changed:.2f} % of answers changed")
        if output.relative_error is not None:
            effects.append(f"relative error {100 * output.relative_error:.2f} %")
        if output.correlation is not None:
            effects.append(f"correlation {output.correlation:.5f}")
        if effects:
            text += f"; under the plan {', '.join(effects)}"
        lines.append(f"{text}.")
    return lines


def cache_sentences(plan: Plan) -> list[str]:
    """Return what the KV cache takes, where it was planned, and for how many tokens."""
    if not plan.caches:
        return []
    caches = [a.cache for a in plan.caches]
    tokens, sequences = max(c.tokens for c in caches), caches[0].sequences
    full = sum(c.full_precision_bits for c in caches)
    size = plan.cache_size_bits
    many = f"{sequences:,} sequences of " if sequences > 1 else ""
    of_token = sum(a.candidate.size_bits / a.cache.rows for a in plan.caches) / 8
    sentence = (
        f"KV cache for {many}{tokens:,} tokens: {format_size(size)}, of {format_size(full)} in "
        f"half precision; {of_token:,.0f} B for a token. With the whole model "
        f"{format_size(plan.model_bits + size)}."
    )
    return [sentence]


_ENDS = {"softmax": "softmax", "sigmoid": "sigmoid", "argmax": "arg-max"}


def rounding_sentences(plan: Plan) -> list[str]:
    """Return how the model was changed before weights were rounded, how they are, and its worth."""
    return [*_changed_sentences(plan), *_rounded_sentences(plan)]


def _changed_sentences(plan: Plan) -> list[str]:
    rotation = plan.provenance.get("rotation")
    smoothing = plan.provenance.get("smoothing") or {}
    lines = []
    if rotation:
        n, stream = rotation["attention_layers"], rotation["residual_streams"]
        also = "The residual stream was turned, and" if stream else "Before rounding,"
        lines.append(f"{also} the values of {n} attention layers were turned.")
        if not stream:
            lines.append(f"The residual stream was not turned: {rotation['undone']}.")
    if "undone" in smoothing:
        lines.append(f"No channel was scaled: {smoothing['undone']}.")
    return lines


def _rounded_sentences(plan: Plan) -> list[str]:
    about = plan.provenance.get("rounding")
    to_nearest = plan.rounding == "nearest"
    if to_nearest and about is None:
        return []
    rounding = "to nearest" if to_nearest else f"by {plan.rounding}"
    if about and "blocks" in about:
        return [_learning_sentence(rounding, about)]
    if not about or "standard_error" not in about:
        return [f"Weights are rounded {rounding}."]
    apart = "apart_worse_by" in about
    worse_by = about["apart_worse_by" if apart else "nearest_worse_by"]
    difference = f"{abs(worse_by):.3g} ± {about['standard_error']:.2g}"
    if apart:
        beside = "layer by layer, without errors fed on,"
        return [f"Weights are rounded {rounding}: {beside} the plan measured {difference} worse."]
    if to_nearest:
        return [f"Weights are rounded to nearest: by qep the plan measured {difference} worse."]
    return [f"Weights are rounded {rounding}: to nearest the plan measured {difference} worse."]


def _learning_sentence(rounding: str, about: JsonObject) -> str:
    blocks = about["blocks"]
    if not blocks:
        return f"Weights are rounded {rounding}: the model has no repeated blocks to learn in."
    gain = about["unlearned_worse_by"]
    difference = f"{abs(gain):.3g} ± {about['standard_error']:.2g}"
    if gain > 0:
        return (
            f"Weights are rounded by qep and then learned in {blocks} blocks: before, the plan "
            f"measured {difference} worse."
        )
    return f"Weights are rounded {rounding}: learned in {blocks} blocks it measured no better."


def hint_sentences(plan: Plan) -> list[str]:
    """Return what would lose less at the same size, where the plan itself shows it."""
    trained = str(plan.selected).startswith(("trained:", "learned:"))
    has_statistics = any(t.name.endswith("running_var") for t in plan.unquantized)
    if plan.corrections or trained or not has_statistics:
        return []
    sentence = (
        "The model has batch norms, whose statistics do not fit quantized weights: the correction "
        "'batch_norm_statistics' moves them, at no byte, and the plan is then made for that."
    )
    return [sentence]


def comparison_rows(
    plan: Plan, accuracies: Mapping[str, float] | None = None
) -> list[dict[str, str]]:
    """Return the plan and its baselines, best first, as rows of text.

    Args:
        plan: The plan.
        accuracies: Test accuracy by name (``plan`` and the baselines' names), if measured.
    """
    entries: list[tuple[str, int, int, MeasuredLoss | None, str]] = [
        ("plan" if plan.selected == SOLVER else f"plan (= {plan.selected})", plan.size_bits,
         plan.cache_size_bits, plan.measured, "")
    ]  # fmt: skip
    for b in sorted(plan.baselines, key=lambda b: b.measured.mean):
        difference = f"{b.paired_difference:+.3g}"
        if b.measured.n_samples > 1:
            difference += f" ± {b.paired_error:.2g}"
        entries.append((b.name, b.size_bits, b.cache_size_bits, b.measured, difference))
    rows = []
    for name, size_bits, cache_bits, measured, difference in entries:
        cached = {"KV cache": format_size(cache_bits)} if plan.caches else {}
        row = {
            "choice": name,
            "stored weights": format_size(size_bits),
            **cached,
            f"loss increase ({plan.loss})": "" if measured is None else format_loss(measured),
            "worse than the plan by": difference,
        }
        if accuracies is not None:
            key = "plan" if name.startswith("plan") else name
            row["test accuracy"] = f"{100 * accuracies[key]:.2f} %" if key in accuracies else ""
        rows.append(row)
    return rows


def score_rows(scores: Sequence[Score]) -> list[dict[str, str]]:
    """Return one row of text for each metric, with one column for each model."""
    columns = {score.name: _score_column(score) for score in scores}
    names = dict.fromkeys(key for column in columns.values() for key in column)
    return [
        {"": name} | {model: column.get(name, "") for model, column in columns.items()}
        for name in names
    ]


def score_sentences(scores: Sequence[Score]) -> list[str]:
    """Return one line for each paired difference."""
    return [
        f"{score.name} minus {other}: "
        + ", ".join(
            f"{_title(name)} {_format_estimate(name, estimate, signed=True)}"
            for name, estimate in score.differences[other].items()
        )
        for score in scores
        for other in score.beside
    ]


_TITLES = {
    "kl": "KL",
    "same_top": "same top",
    "top1": "top-1",
    "cross_entropy": "cross entropy",
    "embedding_cosine": "cosine",
    "embedding_correlation": "correlation",
    "relative_error": "relative error",
}


def _title(metric: str) -> str:
    """Return what a metric is called; those of one of several outputs begin with its name."""
    of, colon, name = metric.rpartition(": ")
    return of + colon + _TITLES.get(name, name)


def _score_column(score: Score) -> dict[str, str]:
    column = {"run as": "exported file" if score.kind == "exported" else "torch"}
    if score.size_bits is not None:
        column["weights"] = format_size(score.size_bits)
    for name, estimate in score.metrics.items():
        column[_title(name)] = _format_estimate(name, estimate)
    if score.kl_tail is not None:
        column["KL, 99.9 %"] = f"{score.kl_tail:.4g}"
    if score.perplexity is not None:
        # exp is nearly straight over so small an error.
        error = score.perplexity * score.metrics["cross_entropy"].standard_error
        column["perplexity"] = f"{score.perplexity:.4f} ± {error:.2g}"
    return column


def _format_estimate(name: str, estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if name.rpartition(": ")[2] in SHARES:
        return f"{100 * estimate.mean:{sign}.2f} ± {100 * estimate.standard_error:.2f} %"
    return f"{estimate.mean:{sign}.4g} ± {estimate.standard_error:.2g}"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows with equal keys as a Markdown table."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_escape(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def layer_rows(plan: Plan) -> list[dict[str, str]]:
    """Return one row of text for each layer, and for each KV cache that was planned."""
    cached = [
        {
            "layer": a.cache.name,
            "kind": "keys" if a.cache.holds_keys else "values",
            "shape": f"{a.cache.rows}×{a.cache.columns}",
            "weights": "",
            "candidate": a.candidate.label,
            "stored": f"{-(-a.candidate.size_bits // 8):,} B",
        }
        for a in plan.caches
    ]
    return [
        {
            "layer": a.layer.name,
            "kind": str(a.layer.kind),
            "shape": "×".join(map(str, a.layer.weight_shape)),
            "weights": f"{a.layer.n_weights:,}",
            "candidate": a.candidate.label,
            "stored": f"{-(-a.candidate.size_bits // 8):,} B",
        }
        for a in plan.assignments
    ] + cached


def render_markdown(
    plans: Sequence[Plan],
    *,
    title: str = "Bit allocation",
    accuracies: Sequence[Mapping[str, float]] | None = None,
) -> str:
    """Return the whole report of one or several plans of one model as Markdown.

    Args:
        plans: One for each budget.
        title: First heading.
        accuracies: For each plan, test accuracy by name (see ``comparison_rows``);
            ``full precision`` is shown in the heading when given.
    """
    parts = [f"# {_escape(title)}\n"]
    for k, plan in enumerate(plans):
        known = accuracies[k] if accuracies else None
        asked = " + ".join(b.text or f"{b.limit} {b.unit}" for b in plan.budgets)
        parts.append(f"## Budget {_escape(asked)}\n")
        opening = quantizable_sentences(plan.inventory)
        parts.append(" ".join([*opening, verdict(plan)]) + "\n")

        # What every plan has to say, then what only some have.
        facts = [
            (
                f"Stored weights {format_size(plan.size_bits)}: {plan.average_bits:.3f} bits per "
                f"weight in codes, {plan.effective_bits:.3f} with scales, zero points and padding; "
                f"whole model {format_size(plan.model_bits)}, "
                f"{plan.model_bits / plan.inventory.n_numbers:.3f} bpw."
            ),
            *cost_sentences(plan),
            *cache_sentences(plan),
            *output_sentences(plan),
            *caution_sentences(plan),
            *rounding_sentences(plan),
            *hint_sentences(plan),
            proof_sentence(plan),
            *evidence_sentences(plan),
        ]
        if plan.measured is not None:
            facts.append(
                f"Measured on {plan.measured.n_samples} hold-out samples; unit "
                f"{plan.measured.unit}; ± is one standard error."
            )
        if plan.target is not None:
            facts.append(
                f"Made for the deployment target {plan.target.name}: its formats, sizes, ties and "
                "exclusions."
            )
        if plan.corrections:
            facts.append(
                "Everything here was measured with these corrections, which must ship with the "
                "plan: " + ", ".join(str(c) for c in plan.corrections) + "."
            )
        if known and "full precision" in known:
            facts.append(f"Full precision scores {100 * known['full precision']:.2f} % on test.")
        parts.append("\n".join(f"- {fact}" for fact in facts) + "\n")

        # Baselines beside it, and layer by layer.
        parts.append(markdown_table(comparison_rows(plan, known)))
        parts.append("<details><summary>Layers</summary>\n\n" + markdown_table(layer_rows(plan)))
        parts.append("</details>\n")
        parts.append(f"Plan `{plan.digest()}` for model `{plan.model_digest}`.\n")
    return "\n".join(parts)
