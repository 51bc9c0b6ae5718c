import numpy as np
import pytest
import torch

from bitquota.context import Context, MemoryLedger
from bitquota.sensitivity.losses import LOSSES, loss_by_name
from bitquota.sensitivity.measures.gram import GramMeasure, measure_differences, measure_gram
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles
from bitquota.sensitivity.runners.make import make_runner
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


def prepare(kind, widths=(2, 4), chunk_size=5, engine="eager"):
    module = build(kind)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(kind), chunk_size=chunk_size, engine=engine)
    return runner, table_of(inventory, widths)


class TestMeasureGram:
    @pytest.mark.parametrize("base_point", [None, (0, 1), (1, 1)])
    def test_is_exact_where_outputs_add_and_the_loss_is_quadratic(self, base_point):
        """Parallel layers, squared error: Gram equals pairs, standard errors too."""
        mse = loss_by_name("mse")
        gram = measure_gram(*prepare(Branches), mse, base_point=base_point)
        pairs = measure_pairs(*prepare(Branches), mse, base_point=base_point)

        np.testing.assert_allclose(gram.cross, pairs.cross, atol=1e-6)
        np.testing.assert_allclose(gram.cross_error, pairs.cross_error, atol=1e-6)
        np.testing.assert_array_equal(gram.diagonal, pairs.diagonal)
        assert gram.constant == pairs.constant

    def test_approaches_pairs_for_small_changes(self):
        """At 4 to 6 bits the second-order picture holds for KL in a nonlinear network."""
        gram = measure_gram(*prepare(Branches, (4, 6)), KL)
        pairs = measure_pairs(*prepare(Branches, (4, 6)), KL)

        np.testing.assert_allclose(gram.cross, pairs.cross, rtol=0.05, atol=1e-7)
        assert np.abs(pairs.cross).max() > 1e-6

    @pytest.mark.parametrize("name", list(LOSSES))
    @pytest.mark.parametrize("kind", [Residual, Attention])
    def test_diagonal_is_that_of_singles(self, kind, name):
        """The same numbers, found in the same ledger entries."""
        ledger = MemoryLedger()
        loss = loss_by_name(name)
        gram = measure_gram(*prepare(kind), loss, context=Context(ledger=ledger))
        runner, table = prepare(kind)
        before = runner.passes.passes
        singles = measure_singles(runner, table, loss, context=Context(ledger=ledger))

        np.testing.assert_array_equal(gram.diagonal, singles.diagonal)
        assert runner.passes.passes == before

    def test_resumes_to_the_same_bits(self):
        """From the ledger, without a pass apart from the reference outputs."""
        ledger = MemoryLedger()
        one, first = measure_differences(*prepare(Residual), KL, context=Context(ledger=ledger))
        runner, table = prepare(Residual)
        two, second = measure_differences(runner, table, KL, context=Context(ledger=ledger))

        assert one.to_bytes() == two.to_bytes()
        assert torch.equal(first.differences, second.differences)
        assert runner.passes.passes <= 1

    @pytest.mark.parametrize("name", ["kl", "mse", "cosine"])
    @pytest.mark.parametrize("memory_bytes", [1, 5_000])
    def test_little_memory_gives_the_same_numbers(self, name, memory_bytes):
        """Outputs in a file, a sample at a time or a few."""
        loss = loss_by_name(name)
        plenty, first = measure_differences(*prepare(Attention), loss)
        little, second = measure_differences(
            *prepare(Attention), loss, context=Context(memory_bytes=memory_bytes)
        )

        np.testing.assert_array_equal(little.diagonal, plenty.diagonal)
        np.testing.assert_allclose(little.cross, plenty.cross, rtol=1e-12)
        assert torch.equal(first.differences, second.differences)

    def test_cost_is_declared(self):
        """One suffix per row."""
        runner, table = prepare(Residual, engine="graph")
        before = runner.passes.passes
        declared = GramMeasure().cost(runner, table)
        measure_gram(runner, table, KL)

        assert runner.passes.passes - before <= declared + 1e-9


class TestOutputDifferences:
    def test_predicts_measured_rows_exactly(self):
        """The base point and every single row are reproduced, not approximated."""
        runner, table = prepare(Residual)
        base_point = (1, 0, 1, 1)
        matrix, differences = measure_differences(runner, table, KL, base_point=base_point)
        assert differences.predict([base_point])[0] == pytest.approx(matrix.constant, abs=1e-7)
        for g in range(4):
            choice = list(base_point)
            choice[g] = 1 - choice[g]
            row = 2 * g + choice[g]
            expected = matrix.constant + matrix.diagonal[row]
            assert differences.predict([choice])[0] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("name", list(LOSSES))
    def test_near_prediction_is_the_same_number(self, name):
        """The fast float32 route agrees with the float64 one."""
        runner, table = prepare(Residual)
        _, differences = measure_differences(runner, table, loss_by_name(name))
        choices = [(0, 0, 1, 1), (1, 0, 0, 1), (1, 1, 1, 1)]

        near = differences.predict_near((0, 1, 1, 1), choices)

        np.testing.assert_allclose(near, differences.predict(choices), rtol=1e-4, atol=1e-6)


class TestParts:
    def test_chunks_and_rows_of_choice(self):
        """A part of the samples gives what a runner on that part gives; other rows nothing."""
        module, data = build(Residual), samples(Residual)
        inventory = inventory_of(module)
        table = table_of(inventory, (2, 3, 8))
        whole = make_runner(module, inventory, data, chunk_size=4)
        part = make_runner(module, inventory, data.take(range(4, 8)), chunk_size=4)
        point, only = (0, 1, 2, 1), [0, 1, 4, 8, 10]

        matrix, differences = measure_differences(
            whole, table, KL, base_point=point, only=only, chunks=[1]
        )
        expected, theirs = measure_differences(part, table, KL, base_point=point)

        np.testing.assert_allclose(matrix.diagonal[only], expected.diagonal[only], atol=1e-12)
        among = np.ix_(only, only)
        np.testing.assert_allclose(matrix.cross[among], expected.cross[among], atol=1e-12)
        others = [r for r in range(len(table.rows)) if r not in only]
        assert not matrix.diagonal[others].any()
        assert not matrix.cross[others].any()
        choices = [(0, 1, 2, 1), (1, 1, 2, 1), (1, 1, 2, 1)]
        np.testing.assert_allclose(
            differences.predict(choices), theirs.predict(choices), atol=1e-12
        )
        assert whole.passes.passes < part.passes.passes
