import builtins
import json
from dataclasses import replace

import pytest

from bitquota.candidates.budget import Budget
from bitquota.errors import InvalidInput, MissingDependency
from bitquota.plan import MeasuredLoss
from bitquota.report.comparison import Comparison, Entry, Measured
from bitquota.report.comparison_plot import plot_comparison
from refusals import refused


def loss(mean, error=0.1, accuracy=0.9):
    return MeasuredLoss(mean=mean, standard_error=error, n_samples=50, accuracy=accuracy)


def plan(mean, choice, worse_by=0.0, worse_error=0.0):
    return Measured(
        choice=choice,
        labels=("W2", "W4"),
        size_bits=100_000,
        predicted=1.0,
        loss=loss(mean),
        worse_by=worse_by,
        worse_error=worse_error,
        rank_correlation=0.5,
    )


def entry(name, *plans, kind="measure", **fields):
    given = {"known_as": "x | y", "cost": 3.0, "passes": 2.0, "cpu_seconds": 0.1}
    return Entry(name=name, kind=kind, plans=plans, rank_correlation=0.25, **given | fields)


@pytest.fixture
def comparison():
    budgets = tuple(
        (Budget(resource="code_bits", limit=limit, text=text),)
        for limit, text in ((300, "3 bits"), (400, ""))
    )
    return Comparison(
        model_digest="sha256:m",
        budgets=budgets,
        full_precision=loss(0.0, 0.0, 0.95),
        loss="kl",
        entries=(
            entry("one", plan(2.0, (0, 1), 1.0, 0.2), plan(1.0, (1, 1))),
            entry("two", plan(1.0, (1, 0)), plan(1.0, (1, 1))),
            entry("three", plan(1.1, (1, 1), 0.1, 0.2), None, flags=({"kind": "negative"},)),
            entry("uniform W2", plan(3.0, (0, 0), 2.0, 0.2), None, kind="baseline", cost=None),
        ),
        skipped={"four": "it needs labels"},
        n_ranked=(6, 5),
    )


class TestComparison:
    def test_ranked_by_measured_loss(self, comparison):
        """Entries without a plan are left out."""
        assert ["two", "three", "one", "uniform W2"] == [e.name for e, _ in comparison.ranked(0)]
        assert ["one", "two"] == [e.name for e, _ in comparison.ranked(1)]

    def test_verdict_names_ties_and_equal_plans(self, comparison):
        """Within two paired standard errors nobody is called worse."""
        assert comparison.verdict(0) == "two measures best (1 ± 0.1); not clearly worse: three."
        assert comparison.verdict(1) == "one, two measure best (1 ± 0.1), with one plan."

    def test_equal_plans_are_one_row(self, comparison):
        """Everybody who chose a plan stands beside it, best plan first."""
        rows = comparison.budget_rows(0)
        assert ["two", "three", "one", "uniform W2"] == [row["chosen by"] for row in rows]
        (row,) = comparison.budget_rows(1)
        assert row["chosen by"] == "one, two"
        assert row["stored weights"] != comparison.budget_rows(1, wide=False)[0]["stored weights"]

    def test_budget_text(self, comparison):
        """What was written, or the limit in its unit."""
        assert ["3 bits", "400 bits"] == [comparison.budget_text(k) for k in range(2)]

    def test_markdown_says_it_all(self, comparison):
        """Costs, what is missing and why, a table for each budget; cells are escaped."""
        text = comparison.render_markdown("Title")

        assert text.startswith("# Title\n")
        assert "Full precision scores 95.00 %" in text
        assert "- four is missing: it needs labels" in text
        assert "x \\| y" in text
        assert "(6, 5 for each budget)" in text
        assert "| +1 ± 0.2 |" in text
        assert "## Budget 3 bits" in text
        assert "## Budget 400 bits" in text

    def test_equal_reasons_are_one_sentence(self, comparison):
        """Who is missing for the same reason is listed together."""
        many = replace(comparison, skipped={"a": "no torch", "b": "labels", "c": "no torch"})
        assert many.missing() == ["a, c are missing: no torch", "b is missing: labels"]

    def test_overview_leaves_baselines_out(self, comparison):
        """They cost nothing and predict nothing."""
        rows = comparison.overview_rows()

        assert ["one", "two", "three"] == [row["method"] for row in rows]
        assert ["", "", "1"] == [row["oddities"] for row in rows]
        assert ["0.50", "0.50", ""] == [row["ranks at 400 bits"] for row in rows]
        narrow = comparison.overview_rows(wide=False)
        assert rows == [{"method": r["method"], "known as": "x | y"} | r for r in narrow]

    def test_json_is_stable(self, comparison):
        """Sorted keys, everything in it, readable."""
        data = json.loads(comparison.to_text())

        assert comparison.to_text() == comparison.to_text()
        assert data["entries"][3]["plans"][1] is None
        assert data["entries"][2]["plans"][0]["ties_with_best"] is True
        assert data["entries"][0]["plans"][0]["ties_with_best"] is False


class TestPlotComparison:
    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_same_comparison_same_file(self, comparison, tmp_path, suffix):
        """No clock and no random identifier inside."""
        paths = [tmp_path / f"{k}.{suffix}" for k in range(2)]
        for path in paths:
            plot_comparison(comparison, path)

        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert paths[0].stat().st_size > 5000

    def test_names_everybody(self, comparison, tmp_path):
        """All entries in the legend, budgets on the axis."""
        import xml.etree.ElementTree as ET  # our own file

        plot_comparison(comparison, tmp_path / "c.svg")
        text = (tmp_path / "c.svg").read_text()

        ET.fromstring(text)  # noqa: S314  # our own file
        for name in ("one", "two", "three", "uniform W2", "3 bits", "400 bits"):
            assert f"<!-- {name} -->" in text

    def test_negative_losses_do_not_break_the_axis(self, comparison, tmp_path):
        """A logarithm of nothing is clipped."""
        odd = replace(comparison, entries=(entry("odd", plan(-0.1, (0, 0)), None),))
        plot_comparison(odd, tmp_path / "c.png")

        assert (tmp_path / "c.png").stat().st_size > 5000

    def test_wrong_ending(self, comparison, tmp_path):
        """Said before anything is drawn."""
        with pytest.raises(InvalidInput, match="must end in one of"):
            plot_comparison(comparison, tmp_path / "c.bmp")

    def test_missing_matplotlib(self, comparison, tmp_path, monkeypatch):
        """The error names the extra."""
        real = builtins.__import__

        def without(name, *args, **kwargs):
            if name.partition(".")[0] == "matplotlib":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with refused(MissingDependency, extra="plot"):
            plot_comparison(comparison, tmp_path / "c.png")
