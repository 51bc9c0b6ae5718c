"""What every measure must hold to; a new one's test is one fixture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.table import CandidateTable
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.runners.base import Runner

KL = loss_by_name("kl")
WIDTHS = (2, 3, 4, 8, FULL_PRECISION_BITS)


def prepare(engine, inventory=None, data=None):
    """Return a fresh runner and a table."""
    module = build(Residual)
    found = inventory_of(module) if inventory is None else inventory
    calibration = samples(Residual, n=13) if data is None else data
    runner = make_runner(module, found, calibration, chunk_size=5, engine=engine)
    return runner, enumerate_candidates(found, WIDTHS)


@dataclass(frozen=True)
class Measured:
    """One measurement, and what the runner and its model were before it.

    Attributes:
        declared: What the measure said that it would cost, in passes.
        needed: What it took.
        state: The model's tensors before.
        wanted: Which parameters wanted gradients before.
    """

    runner: Runner
    table: CandidateTable
    matrix: SensitivityMatrix
    ledger: MemoryLedger
    declared: float
    needed: float
    state: dict[str, Tensor]
    wanted: list[bool]


@cache
def measured(name: str, engine: str) -> Measured:
    """Return the measurement that most tests look at; tests leave it as it is."""
    runner, table = prepare(engine)
    measure, ledger = measure_by_name(name), MemoryLedger()
    state = {key: value.clone() for key, value in runner.module.state_dict().items()}
    wanted = [p.requires_grad for p in runner.module.parameters()]
    declared, before = measure.cost(runner, table), runner.passes.passes
    # Told of every step: a measure that counts its steps wrongly fails there.
    context = Context(ledger=ledger, on_progress=lambda _: None)
    matrix = measure.measure(runner, table, KL, context=context)
    needed = runner.passes.passes - before
    return Measured(runner, table, matrix, ledger, declared, needed, state, wanted)


class MeasureContract:
    """Inherit, and give a fixture ``measure``; ``engine`` where it needs another runner."""

    engine = "eager"

    @pytest.fixture
    def known(self, measure):
        """A measurement that these tests share."""
        return measured(measure.name, self.engine)

    def test_is_found_by_its_name(self, measure):
        """What users write gives this measure."""
        assert type(measure_by_name(measure.name)) is type(measure)

    def test_numbers_are_finite_and_zero_at_full_precision(self, measure, known):
        """One score per row; a candidate that changes nothing costs nothing, and surely so."""
        table, matrix = known.table, known.matrix

        assert matrix.diagonal.shape == (len(table.rows),)
        assert np.isfinite(matrix.diagonal).all()
        untouched = [r.candidates[0].weight_bits == FULL_PRECISION_BITS for r in table.rows]
        np.testing.assert_allclose(matrix.diagonal[untouched], 0.0, atol=1e-12)
        if not getattr(measure, "may_be_negative", False):
            assert (matrix.diagonal[[not u for u in untouched]] > 0).all()
        if matrix.diagonal_error is not None:
            np.testing.assert_allclose(matrix.diagonal_error[untouched], 0.0, atol=1e-12)
            assert (matrix.diagonal_error >= 0).all()
            assert matrix.diagonal_error.max() > 0
        assert (matrix.cross is not None) == measure.has_cross_terms

    def test_growing_scores_are_flagged_and_kept(self, known):
        """Every row that exceeds one with fewer bits is flagged, and no other."""
        table, matrix = known.table, known.matrix
        expected = set()
        for r, row in enumerate(table.rows):
            bits = row.candidates[0].weight_bits
            for q, other in enumerate(table.rows):
                fewer = other.group == row.group and other.candidates[0].weight_bits < bits
                if fewer and matrix.diagonal[q] < matrix.diagonal[r]:
                    expected.add((row.group, row.label))

        flags = [f for f in find_flags(matrix) if f.kind is FlagKind.INCREASING]

        assert expected == {(f.group, f.label) for f in flags}

    def test_without_a_budget_the_widest_rows_win(self, measure, known):
        """The smallest score of every group is full precision."""
        grouped = known.matrix.diagonal.reshape(-1, len(WIDTHS))
        if getattr(measure, "may_be_negative", False):
            grouped = np.abs(grouped)

        np.testing.assert_array_equal(len(WIDTHS) - 1, grouped.argmin(axis=1))

    def test_order_of_layers_does_not_matter(self, measure, known):
        """Reversing the inventory reverses the scores."""
        inventory = known.runner.inventory
        turned = Inventory(model_digest=inventory.model_digest, layers=inventory.layers[::-1])
        other = measure.measure(*prepare(self.engine, inventory=turned), KL)

        def by_row(matrix):
            return {
                (r.group, r.label): v
                for r, v in zip(matrix.table.rows, matrix.diagonal, strict=True)
            }

        expected, found = by_row(known.matrix), by_row(other)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-12)

    def test_same_seed_gives_the_same_bits(self, measure, known):
        """Two fresh runs agree to the last bit, errors and provenance included; also unrecorded."""
        again = measure.measure(*prepare(self.engine), KL)

        assert known.matrix.to_bytes() == again.to_bytes()

    def test_resumes_from_the_ledger(self, measure, known):
        """A second run measures nothing (but reference outputs) and gives the same bits."""
        entries = len(known.ledger)
        runner, table = prepare(self.engine)
        two = measure.measure(runner, table, KL, context=Context(ledger=known.ledger))

        assert known.matrix.to_bytes() == two.to_bytes()
        assert entries == len(known.ledger)
        assert runner.passes.passes <= 1 + 1e-9

    def test_costs_no_more_than_declared(self, known):
        """The counter stays within ``cost``."""
        assert known.needed <= known.declared + 1e-9

    def test_tied_layers_have_one_row(self, measure, known):
        """A group is scored as a whole, and not as less than nothing."""
        inventory = known.runner.inventory.tie([["inner", "side"]])
        matrix = measure.measure(*prepare(self.engine, inventory=inventory), KL)

        assert (3 * len(WIDTHS),) == matrix.diagonal.shape
        assert (matrix.diagonal >= -1e-12).all()

    def test_leaves_the_model_alone(self, known):
        """Weights, gradients' settings and mode are as before."""
        module = known.runner.module
        after = module.state_dict()
        assert all(torch.equal(known.state[key], after[key]) for key in after)
        assert known.wanted == [p.requires_grad for p in module.parameters()]
        assert all(p.grad is None for p in module.parameters())
        assert not module.training

    def test_labels_are_demanded_exactly_when_needed(self, measure):
        """Without labels a measure works, or says that it needs them."""
        data = samples(Residual, n=13)
        runner, table = prepare(self.engine, data=CalibrationSet(inputs=data.inputs))
        if measure.needs_labels:
            with pytest.raises(InvalidCalibration, match="label"):
                measure.measure(runner, table, KL)
        else:
            assert np.isfinite(measure.measure(runner, table, KL).diagonal).all()

    def test_can_be_cancelled(self, measure):
        """A measure that runs the model stops when asked to."""
        runner, table = prepare(self.engine)
        if measure.cost(runner, table) == 0:
            pytest.skip("never runs the model")
        with pytest.raises(Cancelled):
            measure.measure(runner, table, KL, context=Context(cancelled=lambda: True))

    def test_says_where_it_comes_from(self, measure, known):
        """Measure, model and samples are in the provenance."""
        runner, provenance = known.runner, known.matrix.provenance

        assert measure.name == provenance["measure"]
        assert runner.inventory.model_digest == provenance["model_digest"]
        assert runner.calibration.to_json() == provenance["calibration"]
        assert known.matrix.unit
