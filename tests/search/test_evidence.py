import numpy as np
import pytest

from bitquota.errors import InvalidInput
from bitquota.search.evidence import gather_evidence, random_choices
from bitquota.search.neighborhood import Limits, distance
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.pairs import measure_pairs
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


def setting(bits=3.0):
    module = build(Residual)
    inventory = inventory_of(module)
    table = table_of(inventory, (2, 3, 4, 8))
    runner = make_runner(module, inventory, samples(Residual), engine="eager")
    limits = Limits(costs=table.costs("code_bits")[None], limits=[int(bits * inventory.n_weights)])
    return runner, table, limits


class TestRandomChoices:
    def test_use_up_the_limits(self):
        """Feasible, and no group can be raised any further; a seed gives one answer."""
        _, table, limits = setting()
        found = random_choices(table, limits, 20, seed=1)

        assert found == random_choices(table, limits, 20, seed=1)
        assert len(set(found)) > 3
        for choice in found:
            assert limits.allow(table, choice)
            for g in range(4):
                for k in range(choice[g] + 1, 4):
                    assert not limits.allow(table, (*choice[:g], k, *choice[g + 1 :]))

    def test_impossible_limits(self):
        """Nothing to draw."""
        _, table, _ = setting()
        with pytest.raises(InvalidInput, match="cheapest"):
            random_choices(table, Limits(costs=table.costs("code_bits")[None], limits=[5]), 1, 0)


class TestGatherEvidence:
    def test_points_are_measured_and_compared(self):
        """The plan first, then neighbours, then random plans, each with both numbers."""
        runner, table, limits = setting()
        matrix = measure_pairs(runner, table, KL)
        plan = (1, 1, 1, 1)
        found = gather_evidence(
            runner, table, KL, limits=limits, choice=plan, predict=matrix.predict,
            n_random=5, n_near=4,
        )  # fmt: skip

        assert [p.kind for p in found.points] == ["plan"] + ["near"] * 4 + ["random"] * 5
        assert all(distance(p.choice, plan) in (1, 2) for p in found.points[1:5])
        truth = measure_choices(runner, table, KL, [p.choice for p in found.points]).mean(axis=1)
        np.testing.assert_allclose([p.measured for p in found.points], truth, atol=1e-9)
        assert found.points[3].predicted == matrix.predict(found.points[3].choice)
        assert found.random_band == (
            min(truth[5:]), float(np.median(truth[5:])), max(truth[5:]),
        )  # fmt: skip
        assert found.better_than_random == (truth[5:] > truth[0]).mean()
        assert found.rank_correlation > 0.5
