"""A walk on sums of output differences: to a local optimum, and no further than time allows."""

import pytest

from bitquota.search import descent
from bitquota.search.descent import predicted_descent
from bitquota.search.neighborhood import Limits, neighbours
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.gram import OutputDifferences, measure_differences
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

START = (0, 0, 0, 0)


@pytest.fixture(scope="module")
def problem():
    """Four layers at 2, 3, 4 or 8 bits, 3 bits on average: table, limits, differences."""
    module = build(Residual, 0)
    inventory = inventory_of(module)
    table = table_of(inventory, (2, 3, 4, 8))
    runner = make_runner(module, inventory, samples(Residual, 24), engine="eager", chunk_size=24)
    limits = Limits(costs=table.costs("code_bits")[None], limits=[3 * inventory.n_weights])
    return table, limits, measure_differences(runner, table, loss_by_name("kl"))[1]


class TestPredictedDescent:
    def test_ends_where_no_move_is_predicted_to_help(self, problem):
        """A local optimum of the prediction, within the limits."""
        table, limits, differences = problem
        end = predicted_descent(differences, limits, START)
        value = differences.predict([end])[0]

        assert limits.allow(table, end)
        assert value < differences.predict([START])[0]
        for g in range(4):
            for k in range(4):
                other = (*end[:g], k, *end[g + 1 :])
                if limits.allow(table, other):
                    assert differences.predict([other])[0] >= value - 1e-6

    def test_predicts_only_the_most_promising_where_outputs_are_large(self, problem, monkeypatch):
        """The best neighbours by the sum of what each move does alone, and it still improves."""
        table, limits, differences = problem
        asked = []
        whole = OutputDifferences.predict_near

        def predict_near(self, centre, choices):
            asked.append(list(choices))
            return whole(self, centre, choices)

        monkeypatch.setattr(OutputDifferences, "predict_near", predict_near)
        monkeypatch.setattr(descent, "STEP_ELEMENTS", 5 * differences.base_output.numel())
        end = predicted_descent(differences, limits, START)

        near = neighbours(table, limits, START)
        assert len(near) > 5
        now = differences.predict([START])[0]

        def sum_of_moves(choice):
            moved = [(g, k) for g, k in enumerate(choice) if k != START[g]]
            alone = [(*START[:g], k, *START[g + 1 :]) for g, k in moved]
            return (differences.predict(alone) - now).sum()

        best = sorted(near, key=sum_of_moves)[:5]
        first = asked[2]  # after single moves, and the start itself
        assert set(first) == set(best)
        assert limits.allow(table, end)
        assert differences.predict([end])[0] < now
