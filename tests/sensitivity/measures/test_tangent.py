import numpy as np
import pytest

from bitquota.errors import InvalidInput
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.gram import measure_gram
from bitquota.sensitivity.measures.pairs import measure_pairs
from bitquota.sensitivity.measures.tangent import TangentMeasure
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


def prepare(kind, widths=(2, 4), engine="graph", n=12):
    module = build(kind)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(kind, n), chunk_size=5, engine=engine)
    return runner, table_of(inventory, widths)


class TestTangentMeasure:
    @pytest.mark.parametrize("base_point", [None, (0, 1)])
    def test_is_exact_for_linear_networks_and_squared_error(self, base_point):
        """First order is everything there: diagonal and cross terms equal exact pairs."""
        mse = loss_by_name("mse")
        found = TangentMeasure().measure(*prepare(Branches), mse, base_point=base_point)
        pairs = measure_pairs(*prepare(Branches), mse, base_point=base_point)

        np.testing.assert_allclose(found.diagonal, pairs.diagonal, atol=1e-5)
        np.testing.assert_allclose(found.cross, pairs.cross, atol=1e-5)
        np.testing.assert_allclose(found.diagonal_error, pairs.diagonal_error, atol=1e-5)
        assert found.constant == pytest.approx(pairs.constant, abs=1e-6)

    @pytest.mark.parametrize("kind", [Residual, Attention])
    def test_approaches_measured_differences_for_small_changes(self, kind):
        """At 6 and 8 bits the network is linear enough, tied and attention weights included."""
        found = TangentMeasure(directions=400).measure(*prepare(kind, (6, 8)), KL)
        gram = measure_gram(*prepare(kind, (6, 8)), KL)

        scale = np.abs(gram.cross).max()
        assert np.corrcoef(found.cross.ravel(), gram.cross.ravel())[0, 1] > 0.95
        np.testing.assert_allclose(found.cross, gram.cross, atol=0.25 * scale)
        np.testing.assert_allclose(
            found.diagonal, gram.diagonal, atol=0.35 * np.abs(gram.diagonal).max()
        )

    def test_random_directions_are_seeded(self):
        """The same seed gives the same bits, another seed other ones."""
        args = (*prepare(Attention), KL)
        one, two = (TangentMeasure(seed=3).measure(*args) for _ in range(2))

        assert one.digest() == two.digest()
        assert one.digest() != TangentMeasure(seed=4).measure(*args).digest()

    def test_cost_does_not_grow_with_layers(self):
        """Declared passes cover executed ones; six layers or four are the same."""
        for kind in (Residual, Attention):
            runner, table = prepare(kind)
            before = runner.passes.passes
            declared = TangentMeasure().cost(runner, table)
            TangentMeasure().measure(runner, table, KL)
            assert runner.passes.passes - before <= declared

    def test_needs_a_graph(self):
        """Eager models are pointed to the measures that work for them."""
        with pytest.raises(InvalidInput, match="'gram'"):
            TangentMeasure().measure(*prepare(Branches, engine="eager"), KL)

    def test_large_outputs_need_a_known_hessian(self):
        """Cosine on a large output has no factor."""
        with pytest.raises(InvalidInput, match="no known factor"):
            TangentMeasure().measure(*prepare(Attention), loss_by_name("cosine"))
