"""Shapley shares: they add up, and are exact where all orders agree."""

import numpy as np
import pytest

from bitquota.candidates.table import enumerate_candidates
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics.shapley import ShapleyShare
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Branches, Residual, build, inventory_of, samples

WIDTHS = (2, 4, 32)


def measured(network, metric, loss):
    """Return the table, its runner and the matrix."""
    module = build(network)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(network), chunk_size=99, engine="eager")
    table = enumerate_candidates(inventory, WIDTHS)
    return table, runner, metric.measure(runner, table, loss_by_name(loss))


class TestShapleyShare:
    @pytest.mark.parametrize("network", [Branches, Residual])
    def test_shares_add_up_to_the_loss_at_the_fewest_bits(self, network):
        """Whatever the orders: every walk ends where all layers have two bits."""
        table, runner, matrix = measured(network, ShapleyShare(permutations=3), "kl")
        low = [r for r, row in enumerate(table.rows) if row.candidates[0].weight_bits == 2]
        change = {c.layer: c for r in low for c in table.rows[r].candidates}
        whole = ShapleyShare._walk  # one step: everything at once
        work = ShapleyShare().work_on(runner, table, loss_by_name("kl"), None)
        before, after = whole(work, 0, [tuple(change.values())])
        assert matrix.diagonal[low].sum() == pytest.approx(float(after - before), rel=1e-6)
        assert float(after) > 0

    def test_two_layers_by_hand(self):
        """Both orders of two layers: alone, and after the other, in equal parts."""
        table, runner, matrix = measured(Branches, ShapleyShare(permutations=2), "mse")
        work = ShapleyShare().work_on(runner, table, loss_by_name("mse"), None)
        left, right = (
            next(r.candidates for r in table.rows
                 if r.candidates[0].layer == name and r.candidates[0].weight_bits == 2)
            for name in ("left", "right")
        )  # fmt: skip
        _, l_first, both = (float(v) for v in ShapleyShare._walk(work, 0, [left, right]))
        _, r_first, _ = (float(v) for v in ShapleyShare._walk(work, 0, [right, left]))
        expected = [(l_first + both - r_first) / 2, (r_first + both - l_first) / 2]
        rows = [r for r, row in enumerate(table.rows) if row.candidates[0].weight_bits == 2]
        np.testing.assert_allclose(matrix.diagonal[rows], expected, rtol=1e-6)

    def test_full_precision_scores_nothing_and_more_bits_less(self):
        """In between by the error of the weights."""
        table, _, matrix = measured(Residual, ShapleyShare(), "kl")
        for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True):
            two, four, full = matrix.diagonal[a:b]
            assert full == 0
            assert abs(four) < abs(two)
