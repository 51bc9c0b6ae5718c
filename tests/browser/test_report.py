"""The report file, opened from disk without a network."""

from __future__ import annotations

import json

import pytest

from bitquota.plan import MeasuredLoss
from bitquota.report import charts
from bitquota.report.comparison import Comparison, Entry, Measured
from bitquota.report.page import render_html
from seeded_jobs import inventory_of, matrix_of, plan_of, with_latency

MOST_BYTES = 3_000_000


def drawn(page) -> list[int]:
    """Return how many different colours each canvas shows: one means that nothing was drawn."""
    return page.evaluate(
        """[...document.querySelectorAll("canvas:not(.scale)")].map((canvas) => {
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          return new Set(new Uint32Array(data.buffer)).size;
        })"""
    )


@pytest.fixture
def show(open_window, tmp_path):
    """Return a function that writes a report, opens it offline and returns the window."""

    def open_report(text, **options):
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        window = open_window(offline=True, viewport={"width": 1280, "height": 900}, **options)
        asked = []
        window.page.on("request", lambda request: asked.append(request.url))
        window.page.goto(path.as_uri())
        window.page.wait_for_selector("#charts[data-ready]")
        window.page.evaluate("new Promise((d) => requestAnimationFrame(d))")
        assert asked == [path.as_uri()]
        return window

    return open_report


class TestReportFile:
    def test_224_layers(self, show, screenshots):
        """Everything is there, below three megabytes, and the slider moves along the points."""
        inventory = inventory_of(224)
        alone = matrix_of(inventory, cross=False)
        matrix = matrix_of(inventory)
        plan = plan_of(inventory, alone, "3 bits")
        text = render_html(
            charts.document(
                title="224 layers",
                plans=[plan],
                matrix=matrix,
                frontier=charts.frontier_of(alone, points=17),
            ),
            charts.maps_of(matrix, plan),
        )
        assert len(text.encode()) < MOST_BYTES
        window = show(text)
        page = window.page
        colours = drawn(page)
        assert len(colours) == 5  # frontier, bars, two plans, sensitivities, pairs
        assert min(colours) > 3
        told = page.inner_text(".slider output")
        page.focus("input.budget")
        page.keyboard.press("ArrowRight")
        assert page.inner_text(".slider output") != told
        page.select_option("label:has-text('Show') select", "plan")
        assert window.violations() == []
        page.screenshot(path=screenshots / "report-224-light.png", full_page=True)

    def test_time_of_a_run_as_the_axis(self, show, screenshots):
        inventory = inventory_of(6)
        matrix = matrix_of(inventory)
        plan = with_latency(plan_of(inventory, matrix, "3 bits"), inventory, matrix)
        window = show(
            render_html(
                charts.document(
                    title="timed",
                    plans=[plan],
                    matrix=matrix,
                    frontier=charts.frontier_of(matrix, points=5),
                ),
                charts.maps_of(matrix, plan),
            )
        )
        page = window.page
        assert "Larger dots take longer" in page.inner_text("#charts")
        page.select_option("label:has-text('Against') select", label="Time of one run")
        assert "Larger dots take more room" in page.inner_text("#charts")
        assert min(drawn(page)) > 3
        assert " µs, predicted loss" in page.inner_text(".slider output")
        page.click("text=All points as a table")
        row = page.locator("tr", has_text="plan, measured").first
        assert f"{plan.spent(plan.budgets[0]) / 1000:.3g} µs" in row.inner_text()
        assert window.violations() == []
        page.screenshot(path=screenshots / "report-timed-light.png", full_page=True)

    def test_comparison(self, show, screenshots):
        measured = MeasuredLoss(mean=0.1, standard_error=0.01, n_samples=64, accuracy=0.8)
        entries = tuple(
            Entry(
                name=name, known_as="", kind="measure", cost=1.0 + k, passes=1.0, cpu_seconds=1.0,
                rank_correlation=0.9 - k / 10,
                plans=(
                    Measured(
                        choice=(0,), labels=("W2",), size_bits=800, predicted=None,
                        loss=MeasuredLoss(mean=0.1 * (k + 1), standard_error=0.01, n_samples=64),
                        worse_by=0.1 * k, worse_error=0.01, rank_correlation=None,
                    ),
                ),
            )
            for k, name in enumerate(("gram", "<b>fisher</b>", "uniform 2-bit"))
        )  # fmt: skip
        found = Comparison(
            model_digest="", budgets=((plan_budget(),),), full_precision=measured, loss="kl",
            entries=entries,
        )  # fmt: skip
        data = json.loads(found.to_text())
        window = show(render_html(charts.document(title="metrics", comparison=data)))
        assert "gram measures best" in window.page.inner_text("#charts")
        assert min(drawn(window.page)) > 3
        window.page.click("summary")
        assert "<b>fisher</b>" in window.page.inner_text("tbody")
        window.page.screenshot(path=screenshots / "report-comparison-light.png", full_page=True)

    def test_frontier_without_its_matrix(self, show):
        rows = [
            {"labels": ["W2", "W2"], "spent": {"code_bits": 64}, "objective": 1.0, "bound": 0.9},
            {"labels": ["W2", "W4"], "spent": {"code_bits": 96}, "objective": 0.2, "bound": 0.2},
            {"labels": ["W4", "W4"], "spent": {"code_bits": 128}, "objective": 0.1, "bound": 0.1},
        ]
        window = show(render_html(charts.frontier_rows(rows)), color_scheme="dark")
        assert min(drawn(window.page)) > 3
        window.page.click("text=All points as a table")
        window.page.locator("tbody tr").nth(2).wait_for()


def plan_budget():
    """Return a budget of three bits."""
    from bitquota.candidates.budget import Budget

    return Budget(resource="code_bits", limit=24, text="3 bits")
