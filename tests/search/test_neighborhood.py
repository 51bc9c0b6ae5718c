import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.search.neighborhood import Limits, distance, neighbours, rows_near
from sensitivity_networks import Residual, build, inventory_of, table_of

TABLE = table_of(inventory_of(build(Residual)), (2, 3, 8))
ALL = list(itertools.product(range(3), repeat=4))


@st.composite
def budgets(draw):
    """Costs of two resources and limits that a drawn choice keeps."""
    costs = np.array(draw(st.lists(st.integers(0, 9), min_size=24, max_size=24))).reshape(2, 12)
    inside = draw(st.sampled_from(ALL))
    rows = TABLE.offsets[:-1] + np.array(inside)
    slack = np.array(draw(st.lists(st.integers(0, 5), min_size=2, max_size=2)))
    return Limits(costs=costs, limits=costs[:, rows].sum(axis=1) + slack), inside


class TestNeighbours:
    @settings(deadline=None, max_examples=60)
    @given(budgets())
    def test_are_the_useful_feasible_choices_at_distance_one_or_two(self, drawn):
        """Against enumeration of all choices."""
        limits, inside = drawn
        found = neighbours(TABLE, limits, inside)
        spent = limits.spent(TABLE, inside)

        def useful(choice):
            if distance(choice, inside) == 1:
                return True
            singles = []
            for g in range(4):
                if choice[g] != inside[g]:
                    one = list(inside)
                    one[g] = choice[g]
                    singles.append((limits.spent(TABLE, one) <= spent).all())
            return not all(singles)

        expected = {
            c for c in ALL if distance(c, inside) in (1, 2) and limits.allow(TABLE, c) and useful(c)
        }
        assert len(found) == len(set(found))
        assert set(found) == expected


class TestWithin:
    @settings(deadline=None, max_examples=30)
    @given(budgets(), st.integers(0, 4))
    def test_adds_a_trust_region(self, drawn, radius):
        """Exactly the choices at most ``radius`` groups away remain."""
        limits, inside = drawn
        region = limits.within(TABLE, inside, radius)

        for choice in ALL:
            expected = limits.allow(TABLE, choice) and distance(choice, inside) <= radius
            assert region.allow(TABLE, choice) == expected


class TestOnly:
    @settings(deadline=None, max_examples=30)
    @given(budgets(), st.sets(st.integers(0, 11)))
    def test_leaves_nothing_but_the_rows(self, drawn, rows):
        """Exactly the choices made of these rows remain."""
        limits, inside = drawn
        region = limits.only([*rows, *(TABLE.offsets[:-1] + np.array(inside)).tolist()])
        offered = rows | set((TABLE.offsets[:-1] + np.array(inside)).tolist())

        for choice in ALL:
            made = {int(a + k) for a, k in zip(TABLE.offsets[:-1], choice, strict=True)}
            expected = limits.allow(TABLE, choice) and made <= offered
            assert region.allow(TABLE, choice) == expected


class TestRowsNear:
    def test_stops_at_the_ends(self):
        """One place up and down, within each group."""
        assert rows_near(TABLE, (0, 1, 2, 0), 1) == [0, 1, 3, 4, 5, 7, 8, 9, 10]
        assert rows_near(TABLE, (0, 1, 2, 0), 0) == [0, 4, 8, 9]
        assert rows_near(TABLE, (0, 1, 2, 0), 2) == list(range(12))
