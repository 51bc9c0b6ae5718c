"""Plans: sums from first principles, byte-stable JSON, honest reports."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bitquota.candidates.budget import Budget
from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.table import Candidate
from bitquota.cli import output
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput, InvalidPlan, UnknownLayer
from bitquota.plan import Assignment, Baseline, MeasuredLoss, Plan, Proof
from bitquota.report import charts
from bitquota.report import text as report
from bitquota.request import PlanRequest
from refusals import refused


def layer(name: str, rows: int, columns: int) -> Layer:
    return Layer(
        name=name,
        kind=LayerKind.LINEAR,
        weight_name=f"{name}.weight",
        weight_shape=(rows, columns),
        rows=rows,
        columns=columns,
        n_weights=rows * columns,
    )


LAYERS = (layer("a", 4, 8), layer("b|<script>", 2, 16))
BIAS = UnquantizedTensor(name="a.bias", shape=(4,), format="fp32", size_bits=128)


def plan(bits=(2, 4), **members) -> Plan:
    assignments = tuple(
        Assignment(layer=la, candidate=Candidate.of(la, b, Scheme()))
        for la, b in zip(LAYERS, bits, strict=True)
    )
    return Plan(model_digest="sha256:0", assignments=assignments, unquantized=(BIAS,), **members)


def measured(mean: float) -> MeasuredLoss:
    return MeasuredLoss(mean=mean, standard_error=0.01, n_samples=64)


def baseline(name: str, mean: float, difference: float, error: float) -> Baseline:
    return Baseline(
        name=name,
        weight_bits=(3, 3),
        size_bits=384,
        measured=measured(mean),
        paired_difference=difference,
        paired_error=error,
    )


class TestPlan:
    def test_sizes(self):
        """Codes 2·32 + 4·32, scales 4·32 + 2·32, and the bias."""
        made = plan()

        assert made.size.codes == 192
        assert made.size_bits == 192 + 192
        assert made.model_bits == 384 + 128
        assert made.average_bits == 3.0
        assert made.effective_bits == 6.0

    def test_round_trip_is_byte_equal(self):
        """A plan survives its JSON, to the byte."""
        made = plan(
            measured=measured(0.5),
            proof=Proof(
                status="optimal", limit=None, objective=0.5, bound=0.4, solver="own",
                matrix_digest="sha256:1", certified=True,
            ),
            baselines=(baseline("uniform 3", 0.6, 0.1, 0.02),),
            predicted=0.5,
            provenance={"seed": 0},
        )  # fmt: skip

        again = Plan.from_json(json.loads(made.dumps()))

        assert again == made
        assert again.dumps() == made.dumps()

    def test_file_round_trip(self, tmp_path):
        """``save`` leaves the plan and no temporary file."""
        made = plan()
        made.save(tmp_path / "plan.json")

        assert Plan.load(tmp_path / "plan.json") == made
        assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]

    def test_budget_is_checked_in_integers(self):
        """One bit over the limit is over the limit."""
        exact = Budget(resource="code_bits", limit=192, text="3 bits")

        assert plan(budgets=(exact,)).spent(exact) == 192
        with refused(InvalidPlan, spent=192, limit=191):
            plan(budgets=(replace(exact, limit=191),))

    def test_forged_size_is_refused(self):
        """A size in the file that the layer's shape does not give is an error."""
        data = plan().to_json()
        del data["digest"]
        data["assignments"][0]["candidate"]["size"]["codes"] -= 8
        del data["assignments"][0]["candidate"]["size"]["total"]

        with pytest.raises(InvalidPlan, match="layer 'a' at W2 takes"):
            Plan.from_json(data)

    def test_edited_file_is_refused(self):
        """The digest notices an edit."""
        data = plan(provenance={"seed": 0}).to_json()
        data["provenance"]["seed"] = 1

        with pytest.raises(InvalidPlan, match="was edited"):
            Plan.from_json(data)

    @pytest.mark.parametrize("data", [[], {}, {"schema": "bitquota/plan/0"}, "x"])
    def test_other_schema_is_refused(self, data):
        """What is no plan says so."""
        with pytest.raises(InvalidPlan, match="schema"):
            Plan.from_json(data)


class TestProof:
    def test_gaps(self):
        """Both gaps follow from objective and bound; an equal bound is no gap."""
        proof = Proof(
            status="feasible", limit="time", objective=2.0, bound=1.5, solver="own",
            matrix_digest="",
        )  # fmt: skip

        assert proof.absolute_gap == 0.5
        assert proof.relative_gap == 0.25
        assert replace(proof, bound=2.0).relative_gap == 0.0
        assert replace(proof, bound=None).absolute_gap is None


class TestVerdict:
    def test_helps(self):
        """A difference of many standard errors is called one."""
        made = plan(measured=measured(0.2), baselines=(baseline("uniform 3", 0.6, 0.4, 0.02),))

        assert report.verdict(made).startswith("Mixed precision helps")
        assert "3.0 ± 0.2 times less" in report.verdict(made)

    def test_clear_but_small(self):
        """Two per cent are no reason to mix, however sure they are."""
        made = plan(measured=measured(0.2), baselines=(baseline("uniform 3", 0.204, 0.004, 1e-5),))
        assert "little difference" in report.verdict(made)
        assert "by 2 % (0.004 ± 1e-05)" in report.verdict(made)

    def test_a_plan_that_loses_nothing(self):
        """Nothing is divided by it."""
        made = plan(measured=measured(0.0), baselines=(baseline("uniform 3", 0.6, 0.6, 0.02),))
        assert report.verdict(made).startswith("Mixed precision helps")
        assert "times" not in report.verdict(made)
        assert "loses nothing" in charts.headline(made)

    def test_compares_at_equal_bytes(self):
        """Not with a larger uniform plan, where one of no more bytes was measured."""
        near = baseline("uniform W3/W4 mix, first wider", 0.4, 0.2, 0.02)
        size = plan().size_bits
        larger = replace(baseline("uniform 4", 0.3, 0.1, 0.02), size_bits=size + 8)
        made = plan(measured=measured(0.2), baselines=(larger, replace(near, size_bits=size)))
        assert "uniform W3/W4 mix" in report.verdict(made)
        assert "at no more bytes" in charts.headline(made)
        only = replace(made, baselines=(larger,))
        assert "uniform 4" in report.verdict(only)
        assert "which takes" in charts.headline(only)

    def test_error_of_the_factor(self):
        """That of a quotient of paired means, against the jackknife of the samples."""
        rng = np.random.default_rng(0)
        ours = rng.gamma(2, 0.1, 500)
        theirs = 3 * ours + rng.normal(0, 0.1, 500)
        error = lambda x: float(x.std(ddof=1)) / 500**0.5  # noqa: E731
        made = plan(measured=replace(
            measured(0.2), mean=float(ours.mean()), standard_error=error(ours), n_samples=500
        ))  # fmt: skip
        other = replace(
            baseline("uniform 3", 0.0, 0.0, error(theirs - ours)),
            measured=replace(
                measured(0.2), mean=float(theirs.mean()), standard_error=error(theirs)
            ),
        )
        ratio, found = report.times_less(made, other)
        left_out = (theirs.sum() - theirs) / (ours.sum() - ours)
        jackknife = (499 / 500 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
        assert ratio == pytest.approx(theirs.mean() / ours.mean())
        assert found == pytest.approx(jackknife, rel=0.02)

    def test_not_clear(self):
        """A difference within two standard errors is not."""
        made = plan(measured=measured(0.2), baselines=(baseline("uniform 3", 0.21, 0.01, 0.02),))

        assert "not clearly better" in report.verdict(made)

    def test_equal_on_every_sample(self):
        """A plan that is uniform itself is not called better by nothing."""
        made = plan(measured=measured(0.2), baselines=(baseline("uniform 3", 0.2, 0.0, 0.0),))

        assert "measures the same as uniform 3" in report.verdict(made)
        assert "lower by" not in report.verdict(made)

    def test_one_sample_tells_nothing(self):
        """A single hold-out sample has no standard error, so nothing is claimed or called exact."""
        one = replace(measured(0.2), standard_error=0.0, n_samples=1)
        other = replace(
            baseline("uniform 3", 0.6, 0.4, 0.0), measured=replace(one, mean=0.6, n_samples=1)
        )
        made = plan(measured=one, baselines=(other,))

        assert report.verdict(made).startswith("One hold-out sample cannot say")
        assert charts.headline(made).startswith("One hold-out sample cannot say")
        assert "0.2 (1 sample)" == report.format_loss(one)
        assert not any("±" in cell for row in report.comparison_rows(made) for cell in row.values())

    def test_uniform_was_best(self):
        """When uniform is returned, the report says that mixing does not help."""
        made = plan(
            selected="uniform 3",
            measured=measured(0.2),
            baselines=(baseline("uniform 3", 0.2, 0.0, 0.0),),
        )

        assert report.verdict(made).startswith("Mixed precision does not help here")


class TestHintSentences:
    def test_batch_norms_without_their_correction(self, capsys):
        """Said in the report and by the command; not where the correction or training is in."""
        variance = replace(BIAS, name="norm.running_var")
        made = replace(plan(measured=measured(0.2)), unquantized=(BIAS, variance))
        (sentence,) = report.hint_sentences(made)
        assert "'batch_norm_statistics'" in sentence
        assert sentence in report.render_markdown([made])
        output.print_plan(made)
        assert sentence in " ".join(capsys.readouterr().out.split())
        corrected = replace(made, corrections=(Correction.BATCH_NORM_STATISTICS,))
        for other in (corrected, replace(made, selected="trained:lsq"), plan()):
            assert report.hint_sentences(other) == []


class TestCautionSentences:
    @pytest.mark.parametrize(("n", "percent"), [(2, 71), (9, 25), (29, 13)])
    def test_few_samples(self, n, percent):
        """How uncertain a standard error of so few is, wherever the figures are shown."""
        made = plan(measured=replace(measured(0.2), n_samples=n))
        (sentence,) = report.caution_sentences(made)

        assert f"only {n} hold-out samples" in sentence
        assert f"about {percent} %" in sentence
        assert sentence in report.render_markdown([made])
        assert sentence in charts.plan_json(made)["verdict"]

    def test_enough_samples(self):
        """From 30 on there is nothing to say; one sample is spoken of by the verdict."""
        for n in (1, 30, 512):
            made = plan(measured=replace(measured(0.2), n_samples=n))
            assert report.caution_sentences(made) == []

    def test_printed(self, capsys):
        """The command line says it too, below its verdict."""
        output.print_plan(plan(measured=replace(measured(0.2), n_samples=12)))
        assert "only 12 hold-out samples" in " ".join(capsys.readouterr().out.split())


class TestRenderMarkdown:
    def test_names_cannot_break_the_table(self):
        """Layer names are data: no markup and no extra column comes from them."""
        text = report.render_markdown([plan()])

        assert "<script>" not in text
        assert "b\\|&lt;script>" in text

    def test_accuracies_are_shown_per_choice(self):
        """Test accuracies stand beside the loss of the same choice."""
        made = plan(measured=measured(0.2), baselines=(baseline("uniform 3", 0.6, 0.4, 0.02),))
        known = {"plan": 0.9, "uniform 3": 0.8, "full precision": 0.95}

        text = report.render_markdown([made], accuracies=[known])

        row = next(line for line in text.splitlines() if line.startswith("| uniform 3"))
        assert "80.00 %" in row
        assert "Full precision scores 95.00 %" in text


class TestFormatSize:
    @pytest.mark.parametrize(
        ("bits", "text"),
        [(0, "0 B"), (1, "1 B"), (8 * 1023, "1,023 B"), (8 * 1536, "1.5 KiB (1,536 B)")],
    )
    def test_examples(self, bits, text):
        """Bits are rounded up to bytes."""
        assert report.format_size(bits) == text


class TestPlanRequest:
    def test_round_trip(self):
        """A request survives its JSON."""
        made = PlanRequest(
            budgets=("3 bits", "2 MiB + 1 GBitOps"),
            ties=(("q", "k"),),
            fixed={"head": 8},
            scheme=Scheme(granularity=Granularity.GROUP, group_size=32),
        )

        assert PlanRequest.from_json(json.loads(json.dumps(made.to_json()))) == made

    def test_partial_json_takes_defaults(self):
        """A body with only a budget is a whole request."""
        assert PlanRequest.from_json({"budgets": ["3 bits"]}) == PlanRequest(budgets=("3 bits",))

    @pytest.mark.parametrize(
        "data",
        [
            {"budgets": ["3 bits"], "colour": "red"},
            {"budgets": ["3 bits"], "weight_bits": [9]},
            {"budgets": ["3 bits"], "measure": "magic"},
            {"budgets": ["3 bits"], "samples": 0},
            {"budgets": ["3 bits"], "scheme": {"grid": "round"}},
            {"budgets": 3},
            {"budgets": ["3 bits"], "corrections": ["prayer"]},
            {"budgets": ["3 bits"], "measure": "tangent", "corrections": ["bias_correction"]},
        ],
    )
    def test_bad_members_are_refused(self, data):
        """Each wrong member is an ``InvalidInput``, never a bare Python error."""
        with pytest.raises(InvalidInput):
            PlanRequest.from_json(data)


class TestInventory:
    def test_unknown_layer_names_the_nearest(self):
        """A misspelt layer gets a suggestion."""
        inventory = Inventory(model_digest="x", layers=(layer("encoder.query", 2, 2),))

        with refused(UnknownLayer, pattern="encoder.qery", nearest=["encoder.query"]):
            inventory.exclude(["encoder.qery"])

    def test_half_precision_checkpoint(self):
        """Tensors of a 16-bit checkpoint count 16 bits; integer ones stay as they are."""
        position = UnquantizedTensor(name="p", shape=(3,), format="int64", size_bits=192)
        inventory = Inventory(model_digest="x", layers=LAYERS, unquantized=(BIAS, position))

        half = inventory.stored_in(16)

        assert 64 * 16 + 64 + 192 == half.full_precision_bits
        assert half.stored_in(32).full_precision_bits == inventory.full_precision_bits
