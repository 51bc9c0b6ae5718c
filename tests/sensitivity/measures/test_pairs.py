import itertools

import numpy as np
import pytest
import torch

from bitquota.candidates.table import enumerate_candidates
from bitquota.context import Context, MemoryLedger
from bitquota.errors import Cancelled, InvalidCalibration, MeasurementFailed
from bitquota.models.calibration import CalibrationSet
from bitquota.quantizers.apply import as_change
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.pairs import (
    DiagonalMeasure,
    PairsMeasure,
    measure_pairs,
    measure_singles,
)
from bitquota.sensitivity.runners.eager import EagerRunner
from bitquota.sensitivity.runners.make import make_runner
from refusals import refused
from sensitivity_networks import (
    Attention,
    Branches,
    Residual,
    build,
    inventory_of,
    samples,
    table_of,
)

KL = loss_by_name("kl")


def prepare(kind, *, widths=(2, 4), ties=(), chunk_size=5, engine="eager", **kwargs):
    module = build(kind)
    inventory = inventory_of(module, ties)
    runner = make_runner(
        module, inventory, samples(kind), chunk_size=chunk_size, engine=engine, **kwargs
    )
    return runner, table_of(inventory, widths)


def naive(module, inventory, data, table, loss, rows_of_groups):
    """Per-sample loss of one choice of rows by one full pass over all samples."""
    change = {}
    for row in rows_of_groups:
        change.update(as_change(table.rows[row].candidates))
    # Chunks as in the measurement: a matrix product may round differently for another batch.
    runner = EagerRunner(module=module, inventory=inventory, calibration=data, chunk_size=5)
    losses = [
        loss.per_sample(runner.start(k, change).output, runner.reference(k), runner.labels(k))
        for k in range(len(runner.chunks))
    ]
    return torch.cat(losses).numpy()


class CountingLedger(MemoryLedger):
    """Notes what was put, and can stop after some transactions as a crash would."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.transactions, self.put_keys, self.stop_after = 0, [], stop_after

    def put_many(self, entries):
        if self.stop_after is not None and self.transactions >= self.stop_after:
            raise KeyboardInterrupt
        self.transactions += 1
        self.put_keys += list(entries)
        super().put_many(entries)


class TestMeasurePairs:
    @pytest.mark.parametrize(
        ("kind", "name", "based"),
        [
            (Residual, "kl", False),
            (Residual, "cross_entropy", True),
            (Branches, "mse", True),
            (Branches, "cosine", False),
            (Attention, "kl", True),
            (Attention, "cross_entropy", False),
        ],
    )
    def test_every_entry_equals_naive_passes(self, kind, name, based):
        """Singles, pairs, errors and constant, from one full pass per combination."""
        loss = loss_by_name(name)
        runner, table = prepare(kind, engine="graph")
        module, inventory, data = build(kind), runner.inventory, samples(kind)
        offsets, groups = table.offsets, len(table.groups)
        base_point = tuple(g % 2 for g in range(groups)) if based else None
        base = [] if base_point is None else [int(offsets[g] + r) for g, r in enumerate(base_point)]

        matrix = measure_pairs(runner, table, loss, base_point=base_point)

        def losses(*rows):
            return naive(module, inventory, data, table, loss, [*base, *rows])

        plain = losses()
        full = naive(module, inventory, data, table, loss, [])
        assert matrix.constant == pytest.approx((plain - full).mean(), abs=1e-12)
        increases = [losses(r) - plain for r in range(len(table.rows))]
        for r, increase in enumerate(increases):
            assert matrix.diagonal[r] == pytest.approx(increase.mean(), abs=1e-9)
            error = increase.std(ddof=1) / np.sqrt(len(increase))
            assert matrix.diagonal_error[r] == pytest.approx(error, abs=1e-9)
        of = table.group_of_row
        for i, j in itertools.combinations(range(len(table.rows)), 2):
            if of[i] == of[j]:
                assert matrix.cross[i, j] == 0
                continue
            terms = losses(i, j) - plain - increases[i] - increases[j]
            if i in base or j in base:
                terms = np.zeros(1)
            assert matrix.cross[i, j] == pytest.approx(terms.mean(), abs=1e-9)

    def test_a_quadratic_loss_has_closed_form_cross_terms(self):
        """Parallel layers and squared error: cross = 2/E · mean of <ΔW_i x, ΔW_j x>."""
        module = build(Branches)
        inventory, data = inventory_of(module), samples(Branches)
        table = table_of(inventory)
        runner = make_runner(module, inventory, data)
        matrix = measure_pairs(runner, table, loss_by_name("mse"))
        x = data.inputs[0].double()
        moved = []
        for row in table.rows:
            (candidate,) = row.candidates
            error = runner.weights(candidate) - runner.weights.original(candidate.layer)
            moved.append((x @ error.detach().double().T).numpy())
        for i, j in itertools.product((0, 1), (2, 3)):
            expected = 2 * (moved[i] * moved[j]).mean()
            assert matrix.cross[i, j] == pytest.approx(expected, abs=1e-6)
            assert matrix.predict((i, j - 2)) == pytest.approx(
                ((moved[i] + moved[j]) ** 2).mean(), abs=1e-6
            )

    def test_tied_layers_are_changed_together(self):
        """A group is one row; its layers never meet alone."""
        runner, table = prepare(Attention, ties=[["q", "k", "v"]])
        assert [len(row.candidates) for row in table.rows] == [1, 1, 3, 3, 1, 1]
        matrix = measure_pairs(runner, table, KL)
        module, data = build(Attention), samples(Attention)

        expected = naive(module, runner.inventory, data, table, KL, [2]).mean()

        assert matrix.diagonal[2] == pytest.approx(expected, abs=1e-9)

    def test_result_does_not_depend_on_the_engine(self):
        """The graph runner and full passes give the same bits."""
        matrices = [
            measure_pairs(*prepare(Residual, engine=engine), KL) for engine in ("graph", "eager")
        ]

        np.testing.assert_array_equal(matrices[0].cross, matrices[1].cross)
        np.testing.assert_array_equal(matrices[0].diagonal, matrices[1].diagonal)

    @pytest.mark.parametrize("stop_after", [0, 1, 4, 9])
    def test_continues_after_a_crash_to_the_same_bits(self, stop_after):
        """What was committed is not measured again, and the matrix is the same."""
        whole = measure_pairs(*prepare(Residual), KL)
        ledger = CountingLedger(stop_after)
        with pytest.raises(KeyboardInterrupt):
            measure_pairs(*prepare(Residual), KL, context=Context(ledger=ledger))
        before, ledger.stop_after = list(ledger.put_keys), None

        again = measure_pairs(*prepare(Residual), KL, context=Context(ledger=ledger))

        assert again.digest() == whole.digest()
        assert again.to_bytes() == whole.to_bytes()
        assert len(set(ledger.put_keys)) == len(ledger.put_keys)
        assert ledger.put_keys[: len(before)] == before

    def test_a_full_ledger_needs_no_passes(self, tmp_path):
        """The second measurement runs nothing at all."""
        with SqliteLedger(tmp_path / "l.db") as ledger:
            one = measure_pairs(*prepare(Residual), KL, context=Context(ledger=ledger))
            runner, table = prepare(Residual)
            two = measure_pairs(runner, table, KL, context=Context(ledger=ledger))

        assert runner.passes.passes == 0
        assert one.to_bytes() == two.to_bytes()

    def test_other_candidates_reuse_what_is_known(self):
        """Measured pairs of {2, 4} are found again when {2, 4, 8} is asked for."""
        ledger = CountingLedger()
        measure_singles(*prepare(Residual), KL, context=Context(ledger=ledger))
        known = set(ledger.put_keys)
        runner, table = prepare(Residual, widths=(2, 4, 8))
        measure_singles(runner, table, KL, context=Context(ledger=ledger))

        # One new row for each of four layers on each of three chunks.
        assert len(ledger) == len(known) + 4 * 3

    @pytest.mark.parametrize(
        "other",
        [
            {"loss": loss_by_name("mse")},
            {"kind": Residual, "batch_norm": "moved"},
            {"base_point": (1, 1, 1, 1)},
        ],
    )
    def test_different_measurements_share_no_entry(self, other):
        """Loss, batch-norm mode and base point are part of every key."""
        ledger = CountingLedger()
        measure_singles(*prepare(Residual), KL, context=Context(ledger=ledger))
        known = len(ledger)
        modes = {k: v for k, v in other.items() if k == "batch_norm"}
        runner, table = prepare(Residual, **modes)
        measure_singles(
            runner,
            table,
            other.get("loss", KL),
            base_point=other.get("base_point"),
            context=Context(ledger=ledger),
        )

        reused = 2 * known - len(ledger) if "base_point" not in other else 0
        assert reused == 0

    def test_reports_progress_and_stops_when_asked(self):
        """Progress counts shards; cancelling keeps what was measured."""
        seen, ledger = [], MemoryLedger()
        with refused(Cancelled, stage="pairs"):
            measure_pairs(
                *prepare(Residual),
                KL,
                context=Context(
                    ledger=ledger, on_progress=seen.append, cancelled=lambda: len(seen) >= 5
                ),
            )
        assert [p.done for p in seen] == [1, 2, 3, 4, 5]
        kept = len(ledger)
        assert kept > 5

        measure_pairs(
            *prepare(Residual),
            KL,
            context=Context(ledger=ledger, on_progress=seen.append),
        )

        assert seen[-1].done == seen[-1].total == seen[5].total
        assert seen[-1].reused == 5

    def test_nan_weights(self):
        """A loss that is not finite is no measurement."""
        module = build(Residual)
        with torch.no_grad():
            module.head.bias[0] = float("nan")
        runner = make_runner(module, inventory_of(module), samples(Residual))
        ledger = MemoryLedger()
        with refused(MeasurementFailed, loss="kl", samples=12):
            measure_pairs(runner, table_of(runner.inventory), KL, context=Context(ledger=ledger))
        assert len(ledger) == 0

    def test_a_labelled_loss_needs_labels(self):
        """Said before anything is run."""
        module = build(Residual)
        data = CalibrationSet(inputs=samples(Residual).inputs)
        runner = make_runner(module, inventory_of(module), data)
        with refused(InvalidCalibration, loss="cross_entropy"):
            measure_pairs(runner, table_of(runner.inventory), loss_by_name("cross_entropy"))

    def test_full_precision_rows_change_nothing(self):
        """A 32-bit candidate has zero sensitivity and no cross terms."""
        runner, _ = prepare(Branches)
        table = enumerate_candidates(runner.inventory, (2, 32))
        matrix = measure_pairs(runner, table, KL)

        assert matrix.diagonal[[1, 3]].tolist() == [0, 0]
        assert matrix.cross[1].tolist() == [0] * 4
        assert matrix.cross[0, 2] != 0


class TestCost:
    @pytest.mark.parametrize("measure", [PairsMeasure(), DiagonalMeasure()])
    def test_is_what_is_run(self, measure):
        """The declared cost covers the executed passes and is not far above them."""
        runner, table = prepare(Residual, engine="graph")
        declared = measure.cost(runner, table)
        before = runner.passes.passes
        measure.measure(runner, table, KL)
        spent = runner.passes.passes - before

        assert spent == pytest.approx(declared, rel=1e-9)
