"""What every measure must hold to; a new one's test is one fixture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.layers import Inventory
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.candidates.table import enumerate_candidates
from bitquota.context import Context, MemoryLedger
from bitquota.errors import Cancelled, InvalidCalibration
from bitquota.models.calibration import CalibrationSet
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import FlagKind, find_flags
from bitquota.sensitivity.registry import measure_by_name
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples

KL = loss_by_name("kl")
WIDTHS = (2, 3, 4, 8, FULL_PRECISION_BITS)


class MeasureContract:
    """Inherit, and give a fixture ``measure``; ``engine`` where it needs another runner."""

    engine = "eager"

    @classmethod
    def prepare(cls, inventory=None, data=None, seed=0):
        """Return a fresh runner and a table."""
        module = build(Residual, seed)
        found = inventory_of(module) if inventory is None else inventory
        calibration = samples(Residual, n=13) if data is None else data
        runner = make_runner(module, found, calibration, chunk_size=5, engine=cls.engine)
        return runner, enumerate_candidates(found, WIDTHS)

    def test_is_found_by_its_name(self, measure):
        """What users write gives this measure."""
        assert type(measure_by_name(measure.name)) is type(measure)

    def test_numbers_are_finite_and_zero_at_full_precision(self, measure):
        """One score per row; a candidate that changes nothing costs nothing, and surely so."""
        runner, table = self.prepare()
        matrix = measure.measure(runner, table, KL)

        assert matrix.diagonal.shape == (len(table.rows),)
        assert np.isfinite(matrix.diagonal).all()
        untouched = [r.candidates[0].weight_bits == FULL_PRECISION_BITS for r in table.rows]
        np.testing.assert_allclose(matrix.diagonal[untouched], 0.0, atol=1e-12)
        assert (matrix.diagonal[[not u for u in untouched]] > 0).all()
        if matrix.diagonal_error is not None:
            np.testing.assert_allclose(matrix.diagonal_error[untouched], 0.0, atol=1e-12)
            assert (matrix.diagonal_error >= 0).all()
            assert matrix.diagonal_error.max() > 0
        assert (matrix.cross is not None) == measure.has_cross_terms

    def test_growing_scores_are_flagged_and_kept(self, measure):
        """Every row that exceeds one with fewer bits is flagged, and no other."""
        runner, table = self.prepare()
        matrix = measure.measure(runner, table, KL)
        expected = set()
        for r, row in enumerate(table.rows):
            bits = row.candidates[0].weight_bits
            for q, other in enumerate(table.rows):
                fewer = other.group == row.group and other.candidates[0].weight_bits < bits
                if fewer and matrix.diagonal[q] < matrix.diagonal[r]:
                    expected.add((row.group, row.label))

        flags = [f for f in find_flags(matrix) if f.kind is FlagKind.INCREASING]

        assert expected == {(f.group, f.label) for f in flags}

    def test_without_a_budget_the_widest_rows_win(self, measure):
        """The smallest score of every group is full precision."""
        runner, table = self.prepare()
        matrix = measure.measure(runner, table, KL)
        grouped = matrix.diagonal.reshape(-1, len(WIDTHS))

        np.testing.assert_array_equal(len(WIDTHS) - 1, grouped.argmin(axis=1))

    def test_order_of_layers_does_not_matter(self, measure):
        """Reversing the inventory reverses the scores."""
        runner, table = self.prepare()
        plain = measure.measure(runner, table, KL)
        inventory = runner.inventory
        turned = Inventory(model_digest=inventory.model_digest, layers=inventory.layers[::-1])
        other = measure.measure(*self.prepare(inventory=turned), KL)

        def by_row(matrix):
            return {
                (r.group, r.label): v
                for r, v in zip(matrix.table.rows, matrix.diagonal, strict=True)
            }

        expected, found = by_row(plain), by_row(other)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-12)

    def test_same_seed_gives_the_same_bits(self, measure):
        """Two fresh runs agree to the last bit, errors and provenance included."""
        one = measure.measure(*self.prepare(), KL)
        two = measure.measure(*self.prepare(), KL)

        assert one.to_bytes() == two.to_bytes()

    def test_resumes_from_the_ledger(self, measure):
        """A second run measures nothing (but reference outputs) and gives the same bits."""
        ledger = MemoryLedger()
        one = measure.measure(*self.prepare(), KL, context=Context(ledger=ledger))
        entries = len(ledger)
        runner, table = self.prepare()
        two = measure.measure(runner, table, KL, context=Context(ledger=ledger))

        assert one.to_bytes() == two.to_bytes()
        assert entries == len(ledger)
        assert runner.passes.passes <= 1 + 1e-9

    def test_costs_no_more_than_declared(self, measure):
        """The counter stays within ``cost``."""
        runner, table = self.prepare()
        declared, before = measure.cost(runner, table), runner.passes.passes
        measure.measure(runner, table, KL)

        assert runner.passes.passes - before <= declared + 1e-9

    def test_tied_layers_have_one_row(self, measure):
        """A group is scored as a whole, and not as less than nothing."""
        runner, _ = self.prepare()
        inventory = runner.inventory.tie([["inner", "side"]])
        matrix = measure.measure(*self.prepare(inventory=inventory), KL)

        assert (3 * len(WIDTHS),) == matrix.diagonal.shape
        assert (matrix.diagonal >= -1e-12).all()

    def test_leaves_the_model_alone(self, measure):
        """Weights, gradients' settings and mode are as before."""
        runner, table = self.prepare()
        before = {k: v.clone() for k, v in runner.module.state_dict().items()}
        wanted = [p.requires_grad for p in runner.module.parameters()]
        measure.measure(runner, table, KL)

        after = runner.module.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert wanted == [p.requires_grad for p in runner.module.parameters()]
        assert all(p.grad is None for p in runner.module.parameters())
        assert not runner.module.training

    def test_labels_are_demanded_exactly_when_needed(self, measure):
        """Without labels a measure works, or says that it needs them."""
        data = samples(Residual, n=13)
        bare = CalibrationSet(inputs=data.inputs)
        runner, table = self.prepare(data=bare)
        if measure.needs_labels:
            with pytest.raises(InvalidCalibration, match="label"):
                measure.measure(runner, table, KL)
        else:
            assert np.isfinite(measure.measure(runner, table, KL).diagonal).all()

    def test_can_be_cancelled(self, measure):
        """A measure that runs the model stops when asked to."""
        runner, table = self.prepare()
        if measure.cost(runner, table) == 0:
            pytest.skip("never runs the model")
        with pytest.raises(Cancelled):
            measure.measure(runner, table, KL, context=Context(cancelled=lambda: True))

    def test_says_where_it_comes_from(self, measure):
        """Measure, model and samples are in the provenance."""
        runner, table = self.prepare()
        matrix = measure.measure(runner, table, KL)

        assert measure.name == matrix.provenance["measure"]
        assert runner.inventory.model_digest == matrix.provenance["model_digest"]
        assert runner.calibration.to_json() == matrix.provenance["calibration"]
        assert replace(matrix).unit
