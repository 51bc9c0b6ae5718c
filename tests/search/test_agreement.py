import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from bitquota.candidates.table import enumerate_candidates
from bitquota.search.agreement import near_choices, random_choices, spearman
from bitquota.search.neighborhood import Limits, distance
from sensitivity_networks import Residual, build, inventory_of


@pytest.fixture(scope="module")
def table():
    return enumerate_candidates(inventory_of(build(Residual)), (2, 3, 4, 6, 8))


def limits_of(table, share):
    costs = table.costs("code_bits")
    grouped = costs.reshape(4, -1)
    low, high = int(grouped.min(axis=1).sum()), int(grouped.max(axis=1).sum())
    return Limits(costs=costs[None], limits=np.array([int(low + share * (high - low))]))


class TestSpearman:
    def test_against_scipy_with_ties(self):
        """The same number."""
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 6, 40), rng.normal(size=40)

        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
    def test_two_will_do_where_asked(self, pairs):
        """Ties share ranks; a constant side has no correlation."""
        a, b = zip(*pairs, strict=True)
        found = spearman(a, b, least=2)
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert found is None
        else:
            assert found == pytest.approx(spearmanr(a, b).statistic)

    def test_only_order_counts(self):
        """Any growing function of a prediction ranks alike."""
        a = [3.0, 1.0, 2.0, 9.0]

        assert 1.0 == pytest.approx(spearman(a, np.exp(a)))
        assert -1.0 == pytest.approx(spearman(a, np.negative(a)))

    @pytest.mark.parametrize(("a", "b"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])])
    def test_says_nothing_where_there_is_nothing(self, a, b):
        """Too few plans, or no differences."""
        assert spearman(a, b) is None


class TestRandomChoices:
    @pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
    def test_use_up_the_limit(self, table, share):
        """Distinct, within the limit, and no group can be raised."""
        limits = limits_of(table, share)
        found = random_choices(table, limits, 8, seed=3)

        assert len(set(found)) == len(found) >= 4
        for choice in found:
            assert limits.allow(table, choice)
            for g in range(4):
                if choice[g] < 4:
                    raised = (*choice[:g], choice[g] + 1, *choice[g + 1 :])
                    assert not limits.allow(table, raised)

    def test_depend_on_the_seed_alone(self, table):
        """Same seed, same plans."""
        limits = limits_of(table, 0.5)

        assert random_choices(table, limits, 6, 1) == random_choices(table, limits, 6, 1)
        assert random_choices(table, limits, 6, 1) != random_choices(table, limits, 6, 2)

    def test_as_many_as_there_are(self, table):
        """The smallest plan alone fits: one plan, not eight."""
        assert [(0, 0, 0, 0)] == random_choices(table, limits_of(table, 0.0), 8, seed=0)

    def test_forbidden_rows_are_never_taken(self, table):
        """A resource of which there is none."""
        plain = limits_of(table, 0.6)
        bits = [row.candidates[0].weight_bits for row in table.rows]
        forbidden = np.array([[int(b == 6) for b in bits]])
        limits = Limits(
            costs=np.vstack([plain.costs, forbidden]), limits=np.append(plain.limits, 0)
        )
        found = random_choices(table, limits, 8, seed=0)

        assert found
        assert all(3 not in choice for choice in found)


class TestNearChoices:
    def test_are_near_within_and_new(self, table):
        """Within the limit, none of the centres, mostly a few groups away."""
        limits = limits_of(table, 0.5)
        centres = random_choices(table, limits, 2, seed=5)
        found = near_choices(table, limits, centres, 6, seed=0)

        assert len(set(found)) == len(found) == 6
        assert not set(found) & set(centres)
        assert all(limits.allow(table, choice) for choice in found)
        assert min(distance(found[0], c) for c in centres) <= 3

    def test_no_centres_no_plans(self, table):
        """Near to nothing is nowhere."""
        assert [] == near_choices(table, limits_of(table, 0.5), [], 6, seed=0)
