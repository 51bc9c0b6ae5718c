from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest

from bitquota.errors import NotFound
from bitquota.report import charts
from seeded_jobs import inventory_of, matrix_of, plan_of, with_latency


@pytest.fixture(scope="module")
def inventory():
    return inventory_of(5)


@pytest.fixture(scope="module")
def matrix(inventory):
    return matrix_of(inventory, widths=(2, 4, 8))


@pytest.fixture(scope="module")
def plan(inventory, matrix):
    return plan_of(inventory, matrix, "3.5 bits")


def numbers(text):
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def square(found):
    """Rebuild the map from its lower triangle."""
    n = len(found["names"])
    whole = np.zeros((n, n), dtype=np.float32)
    whole[np.tril_indices(n, -1)] = numbers(found["values"])
    return whole + whole.T


class TestMatrixJson:
    def test_one_row_per_group_and_one_column_per_candidate(self, matrix):
        found = charts.matrix_json(matrix)
        assert ["W2", "W4", "W8"] == found["columns"]
        assert [2, 4, 8] == found["bits"]
        expected = matrix.diagonal.reshape(5, 3).astype(np.float32)
        assert np.array_equal(expected, numbers(found["values"]).reshape(5, 3))
        assert matrix.diagonal_error.astype(np.float32).tolist() == list(numbers(found["errors"]))

    def test_a_candidate_that_a_group_lacks_has_no_value(self, inventory):
        from bitquota.candidates.table import enumerate_candidates
        from bitquota.matrix import SensitivityMatrix

        first = inventory.layers[0].name
        table = enumerate_candidates(inventory, (2, 4), fixed={first: 8})
        made = SensitivityMatrix(table=table, diagonal=np.ones(len(table.rows)))
        values = numbers(charts.matrix_json(made)["values"]).reshape(5, 3)
        assert np.isnan(values[0, :2]).all()
        assert np.isnan(values[1:, 2]).all()
        assert 9 == np.isfinite(values).sum()


class TestCrossMap:
    def test_at_one_candidate_it_is_the_matrix(self, matrix):
        rows = np.arange(5) * 3
        expected = matrix.cross[np.ix_(rows, rows)].astype(np.float32)
        assert np.array_equal(expected, square(charts.cross_map(matrix, "W2")))

    def test_largest_is_found_by_trying_all(self, matrix):
        expected = np.zeros((5, 5), dtype=np.float32)
        for i in range(5):
            for j in range(5):
                part = matrix.cross[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
                if i != j:
                    expected[i, j] = part.flat[np.abs(part).argmax()]
        assert np.array_equal(expected, square(charts.cross_map(matrix)))

    def test_at_the_plan_it_adds_up_to_the_prediction(self, matrix, plan):
        chosen = {a.layer.name: a.candidate for a in plan.assignments}
        alone = sum(
            matrix.diagonal[k]
            for k, row in enumerate(matrix.table.rows)
            if chosen[row.candidates[0].layer] == row.candidates[0]
        )
        pairs = numbers(charts.cross_map(matrix, "plan", plan)["values"]).sum()
        assert plan.predicted == pytest.approx(alone + pairs, rel=1e-5)

    def test_many_groups_become_blocks(self, monkeypatch, matrix):
        monkeypatch.setattr(charts, "MAP_SIDE", 3)
        found = charts.cross_map(matrix, "W2")
        assert 2 == found["block"]
        assert 3 == len(found["names"])
        rows = np.arange(5) * 3
        full = matrix.cross[np.ix_(rows, rows)]
        corner = full[2:4, 0:2]
        assert square(found)[1, 0] == pytest.approx(corner.flat[np.abs(corner).argmax()])

    def test_unknown_map_is_refused(self, matrix):
        with pytest.raises(NotFound, match="W7"):
            charts.cross_map(matrix, "W7")

    def test_without_cross_terms_there_is_no_map(self, matrix):
        plain = replace(matrix, cross=None, cross_error=None)
        assert [] == charts.matrix_json(plain)["maps"]
        with pytest.raises(NotFound, match="gram"):
            charts.cross_map(plain)


class TestFrontierOf:
    def test_sizes_rise_losses_fall_and_bounds_stay_below(self, matrix, inventory):
        points = charts.frontier_of(matrix, points=6)
        sizes = [p["size_bits"] for p in points]
        losses = [p["predicted"] for p in points]
        assert sorted(sizes) == sizes
        assert losses == sorted(losses, reverse=True)
        assert all(p["bound"] <= p["predicted"] for p in points)
        assert [2] * 5 == points[0]["bits"]
        assert points[0]["average_bits"] == 2.0


class TestHeadline:
    def test_points_of_accuracy_where_labels_are_known(self, plan):
        uniform = max(
            (b for b in plan.baselines if b.name.startswith("uniform")),
            key=lambda b: -b.measured.mean,
        )
        gain = 100 * (plan.measured.accuracy - uniform.measured.accuracy)
        said = charts.headline(plan)
        assert "Mixed precision" in said
        if round(gain, 1) > 0:
            assert f"{gain:.1f} points over {uniform.name}" in said

    def test_a_uniform_plan_says_so(self, plan):
        assert "does not help here" in charts.headline(replace(plan, selected="uniform 4-bit"))

    def test_a_difference_within_its_error_is_none(self, plan):
        unclear = tuple(replace(b, paired_error=1e9) for b in plan.baselines)
        assert "does not clearly help" in charts.headline(replace(plan, baselines=unclear))


class TestFrontierRows:
    def test_rows_of_the_command_are_drawn_without_names(self):
        rows = [
            {"labels": ["W2A8", "W4"], "spent": {"size_bits": 10}, "objective": 1.0, "bound": 0.5},
            {"labels": None, "spent": None, "objective": None, "bound": None},
        ]
        found = charts.frontier_rows(rows)
        assert [[2, 4]] == [p["bits"] for p in found["frontier"]]
        assert ["group 1", "group 2"] == found["layers"]["names"]


class TestPrices:
    def test_points_plans_and_baselines_can_be_priced(self, inventory, matrix, plan):
        """What the page adds up is what Python does, pairs and constant included."""
        timed = with_latency(plan, inventory, matrix)
        found = charts.document(
            title="", plans=[timed], matrix=matrix, frontier=charts.frontier_of(matrix, points=3)
        )
        (prices,) = found["prices"]
        assert prices["resource"] == "latency_ns"
        costs = {(layer, label): cost for layer, label, cost in prices["layers"]}

        def spent(labels):
            chosen = list(zip(found["layers"]["names"], labels, strict=True))
            pairs = sum(
                cost
                for *names, cost in prices["pairs"]
                if {tuple(names[:2]), tuple(names[2:])} <= set(chosen)
            )
            return prices["constant"] + sum(costs[c] for c in chosen) + pairs

        shown = found["plans"][0]
        assert spent(shown["labels"]) == timed.spent(timed.budgets[0])
        cheapest = found["frontier"][0]
        assert cheapest["labels"] == ["W2"] * 5
        assert spent(cheapest["labels"]) == 1000 + 5 * 20 + 7
        assert all(spent(b["labels"]) > 1000 for b in shown["baselines"])

    def test_without_a_table_there_are_none(self, plan):
        assert charts.document(title="", plans=[plan])["prices"] == []
