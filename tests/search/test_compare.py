import json
import sys

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Rounding, Scheme
from bitquota.cli import main
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import BudgetTooSmall, Cancelled, InvalidCalibration, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import LoadedModel
from bitquota.request import PlanRequest
from bitquota.search.compare import REFINE, SIZE_ONLY, THRESHOLD, compare
from bitquota.sensitivity.metrics import METRICS
from format_networks import tiny_net
from sensitivity_networks import Residual, build, samples

BUDGETS = ("3 bits", "4.5 bits")


def loaded(module):
    return LoadedModel(module=module, digest="sha256:test", source="test", architecture="Test")


def request(**fields):
    given = {"budgets": BUDGETS, "weight_bits": (2, 3, 4, 6), "samples": 24, "holdout_samples": 20}
    return PlanRequest(**given | fields)


def run(metrics=None, data=None, ledger=None, plans=6, **fields):
    return compare(
        loaded(build(Residual)),
        samples(Residual, n=44) if data is None else data,
        request(**fields),
        metrics,
        context=Context() if ledger is None else Context(ledger=ledger),
        plans=plans,
        cpu_clock=lambda: 0.0,
    )


@pytest.fixture(scope="module")
def comparison():
    return run()


class TestCompare:
    def test_everything_is_there(self, comparison):
        """Measures, metrics, the threshold rule, refinement, size-only and uniform plans."""
        names = [e.name for e in comparison.entries]

        assert {"gram", "pairs", "diagonal", "tangent", REFINE, THRESHOLD, SIZE_ONLY} < set(names)
        assert set(METRICS) < set(names)
        assert "uniform W2" in names
        assert {} == comparison.skipped
        assert all(len(e.plans) == 2 for e in comparison.entries)

    def test_every_plan_keeps_its_budget(self, comparison):
        """Code bits counted again from the labels."""
        n_weights = [162, 324, 36, 30]
        for entry in comparison.entries:
            for limit, plan in zip((3, 4.5), entry.plans, strict=True):
                if plan is not None:
                    bits = [int(label[1:]) for label in plan.labels]
                    spent = sum(b * n for b, n in zip(bits, n_weights, strict=True))
                    assert spent <= limit * sum(n_weights)

    def test_uniform_plans_beyond_a_budget_are_missing(self, comparison):
        """Four bits do not fit in three."""
        (uniform,) = [e for e in comparison.entries if e.name == "uniform W4"]

        assert uniform.plans[0] is None
        assert set(uniform.plans[1].labels) == {"W4"}

    def test_losses_are_paired_with_the_best(self, comparison):
        """The best is worse by nothing, all others by the difference of their means."""
        for k in range(2):
            ranked = comparison.ranked(k)
            best = ranked[0][1]
            assert (0.0, 0.0) == (best.worse_by, best.worse_error)
            for _, plan in ranked:
                difference = plan.loss.mean - best.loss.mean
                assert plan.worse_by == pytest.approx(difference, abs=1e-12)
                assert plan.loss.n_samples == 20
                assert plan.loss.accuracy is not None

    def test_predictions_are_those_of_the_matrix(self, comparison):
        """Weight error of a plan by hand; no prediction where nothing predicts."""
        (entry,) = [e for e in comparison.entries if e.name == "weight_mse"]
        from bitquota.quantizers.weights import fake_quantize
        from sensitivity_networks import inventory_of

        module = build(Residual)
        layers = inventory_of(module).layers
        total = 0.0
        for layer, label in zip(layers, entry.plans[0].labels, strict=True):
            weight = module.get_parameter(layer.weight_name).detach()
            quantized = fake_quantize(weight, layer, int(label[1:]), request().scheme)
            total += float((quantized - weight).double().square().sum())

        assert entry.plans[0].predicted == pytest.approx(total, rel=1e-6)
        assert all(p.predicted is None for e in comparison.entries if "uniform" in e.name
                   for p in e.plans if p is not None)  # fmt: skip

    def test_rank_correlations_are_correlations(self, comparison):
        """Between -1 and 1, on as many plans as stated; none for fixed choices."""
        assert all(0 < n <= 6 for n in comparison.n_ranked)
        for entry in comparison.entries:
            if entry.kind != "baseline":
                assert entry.rank_correlation is not None
                assert -1 <= entry.rank_correlation <= 1
            if entry.name.startswith("uniform"):
                assert entry.rank_correlation is None

    def test_passes_are_counted_and_declared(self, comparison):
        """No metric takes more than it declared."""
        for entry in comparison.entries:
            if entry.cost is not None:
                assert entry.passes <= entry.cost + 1e-9
        by_name = {e.name: e for e in comparison.entries}
        assert 0 == by_name["weight_mse"].passes
        assert by_name[REFINE].passes > 0

    def test_same_request_same_comparison(self, comparison):
        """Byte for byte, apart from CPU seconds (here a stopped clock)."""
        assert comparison.to_text() == run().to_text()

    def test_a_ledger_saves_passes_and_changes_nothing(self):
        """The second run only repeats reference outputs."""
        ledger = MemoryLedger()
        names = ["gram", "empirical_fisher", "hessian_trace", "gpfq"]
        first, second = run(names, ledger=ledger), run(names, ledger=ledger)

        for one, two in zip(first.entries, second.entries, strict=True):
            assert one.plans == two.plans
            assert two.passes <= 1 + 1e-9

    def test_only_what_was_asked_for(self):
        """In the order of the measures; baselines are always there."""
        found = run(["weight_mse", "gram"], plans=0)
        kinds = {e.name: e.kind for e in found.entries}

        assert ["gram", "weight_mse", SIZE_ONLY] == list(kinds)[:3]
        assert {"baseline"} == {kinds[name] for name in list(kinds)[2:]}
        assert (0, 0) == found.n_ranked
        assert all(e.rank_correlation is None for e in found.entries)

    def test_without_labels(self):
        """Metrics that need labels are missing, with the reason; asked for, they are an error."""
        bare = CalibrationSet(inputs=samples(Residual, n=44).inputs)
        found = run(data=bare, plans=0)

        labelled = {"empirical_fisher", "output_fisher", "kronecker", "class_separability", "limpq"}
        assert labelled == set(found.skipped)
        assert "labels" in found.skipped["kronecker"]
        assert found.full_precision.accuracy is None
        assert "accuracy" not in found.render_markdown()
        with pytest.raises(InvalidCalibration, match="label"):
            run(["kronecker"], data=bare)

    def test_dear_measures_are_left_out_unless_named(self):
        """With the declared cost in the reason."""
        arguments = [loaded(build(Residual)), samples(Residual, n=44), request()]
        found = compare(*arguments, plans=0, affordable_passes=5.0)
        named = compare(
            *arguments,
            ["pairs"],
            plans=0,
            affordable_passes=5.0,
        )

        assert {"pairs", "gram", "refine", "hessian_trace"} < set(found.skipped)
        assert "passes, more than 5" in found.skipped["pairs"]
        assert "pairs" == named.entries[0].name

    def test_with_corrections_and_quantized_inputs(self):
        """Plans are measured with what ships: statistics moved, inputs at 8 bits."""
        found = run(
            ["gram", "empirical_fisher", "weight_mse", REFINE],
            corrections=(Correction.BATCH_NORM_STATISTICS,),
            activation_bits=8,
        )
        plain = run(["gram", "empirical_fisher", "weight_mse", REFINE])

        assert all("A8" in label for label in found.entries[0].plans[0].labels)
        uniform = [
            next(e for e in c.entries if e.name == "uniform W2").plans[0].loss.mean
            for c in (found, plain)
        ]
        assert uniform[0] != uniform[1]

    def test_rounding_with_feedback_reaches_scores_and_plans(self):
        """Weights fitted to the inputs: larger weight errors, another loss."""
        fed = run(["weight_mse"], plans=0, scheme=Scheme(rounding=Rounding.ERROR_FEEDBACK))
        plain = run(["weight_mse"], plans=0)
        ends = [next(e for e in c.entries if e.name == "uniform W2").plans[0] for c in (fed, plain)]

        assert fed.entries[0].plans[0].predicted != plain.entries[0].plans[0].predicted
        assert ends[0].loss.mean != ends[1].loss.mean

    def test_several_budgets_at_once(self):
        """Joined by +: both hold, and the activation limit forbids nothing here."""
        found = run(["weight_mse", THRESHOLD], budgets=("4 bits + 300 B of weights + act 1 MiB",))
        plan = found.entries[0].plans[0]

        assert plan.size_bits <= 2400
        assert "4 bits + 300 B of weights + act 1 MiB" == found.budget_text(0)

    def test_ties_are_kept(self):
        """Layers of a group have one bit-width."""
        found = run(["gram", "gpfq"], ties=(("inner", "side"),), plans=0)

        for entry in found.entries:
            for plan in entry.plans:
                if plan is not None:
                    assert plan.labels[1] == plan.labels[2]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"metrics": ["magic"]}, "some of refine, diagonal, .*got magic"),
            ({"metrics": []}, "got none"),
            ({"metrics": ["gram", "gram"]}, "each once"),
            ({"plans": 2}, "at least 3 plans"),
            ({"budgets": ()}, "at least one budget"),
        ],
    )
    def test_refuses_what_makes_no_sense(self, fields, message):
        """Before anything runs."""
        with pytest.raises(InvalidInput, match=message):
            run(**fields)

    def test_a_budget_below_the_smallest_plan(self):
        """Nothing is measured."""
        ledger = MemoryLedger()
        with pytest.raises(BudgetTooSmall):
            run(budgets=("1 bits",), ledger=ledger)
        assert 0 == len(ledger)

    def test_can_be_cancelled(self):
        """Stops, and says so."""
        with pytest.raises(Cancelled):
            compare(
                loaded(build(Residual)),
                samples(Residual, n=44),
                request(),
                ["gram"],
                context=Context(cancelled=lambda: True),
            )


class TestCommand:
    @pytest.fixture
    def bitquota(self, monkeypatch, tmp_path, capsys):
        """Return a function that runs the command line in an empty folder."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 3, 8, 8)).astype(np.float32)
        with torch.no_grad():
            y = tiny_net()(torch.from_numpy(x)).argmax(dim=1).numpy()
        np.savez(tmp_path / "data.npz", x=x, y=y)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("COLUMNS", "160")

        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["bitquota", "compare", *map(str, arguments)])
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return run

    FAST = (
        *("format_networks:tiny_net", "data.npz", "--bits", "2,4,8", "--samples", "20"),
        *("--holdout", "20", "--metric", "gram", "--metric", "weight_mse", "--plans", "4"),
    )

    def test_writes_what_it_is_told_to(self, bitquota, tmp_path):
        """JSON, Markdown, plot; tables on the screen."""
        code, out, err = bitquota(
            *self.FAST, "-b", "3 bits", "-b", "4 bits", "--out", "deep/c.json",
            "--report", "deep/c.md", "--plot", "deep/c.svg",
        )  # fmt: skip

        assert 0 == code, err
        assert "Budget 3 bits" in out
        assert " best (" in out
        stored = json.loads((tmp_path / "deep" / "c.json").read_text())
        assert "bitquota/comparison/1" == stored["schema_version"]
        assert ["3 bits", "4 bits"] == [b[0]["text"] for b in stored["budgets"]]
        assert "## Budget 4 bits" in (tmp_path / "deep" / "c.md").read_text()
        assert (tmp_path / "deep" / "c.svg").read_text().startswith("<?xml")

    def test_json_on_standard_output(self, bitquota):
        """For a program to read."""
        code, out, _ = bitquota(*self.FAST, "-b", "3 bits", "--json")

        assert 0 == code
        assert "gram" == json.loads(out)["entries"][0]["name"]

    def test_a_wrong_plot_is_refused_before_the_work(self, bitquota):
        """The ending is seen before a model is loaded: nothing is said of any work."""
        code, out, err = bitquota(*self.FAST, "-b", "3 bits", "--plot", "c.bmp")

        assert 2 == code
        assert out == ""
        assert err.count("\n") == 1
        assert "must end in one of .png, .svg, .pdf; got 'c.bmp'" in err

    def test_an_unknown_metric_is_one_sentence(self, bitquota):
        """And exit code 2."""
        code, _, err = bitquota(*self.FAST, "--metric", "magic", "-b", "3 bits")

        assert 2 == code
        assert "error: metrics must be some of refine" in err
