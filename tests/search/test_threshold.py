import itertools

import numpy as np
import pytest

from bitquota.candidates.table import enumerate_candidates
from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.search.neighborhood import Limits
from bitquota.search.threshold import threshold_choice, threshold_within
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import RelativeWeightMse
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples

WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def matrix():
    module = build(Residual)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(Residual), engine="eager")
    table = enumerate_candidates(inventory, WIDTHS)
    return RelativeWeightMse().measure(runner, table, loss_by_name("kl"))


def size_limits(matrix, limit):
    return Limits(costs=matrix.table.costs("size_bits")[None], limits=np.array([limit]))


def crafted(values, widths=(2, 4, 8)):
    inventory = inventory_of(build(Residual))
    table = enumerate_candidates(inventory, widths)
    return SensitivityMatrix(table=table, diagonal=np.tile(values, 4))


class TestThresholdChoice:
    def test_takes_the_smallest_width_below_the_bar(self):
        """Errors 100, 5, 1 at 2, 4, 8 bits."""
        found = {
            m: threshold_choice(crafted([100.0, 5.0, 1.0]), m)[0] for m in (1, 4.9, 5, 99, 100)
        }

        assert {1: 2, 4.9: 2, 5: 1, 99: 1, 100: 0} == found

    def test_is_monotone(self, matrix):
        """A larger multiplier never gives any group more bits."""
        choices = [threshold_choice(matrix, m) for m in np.geomspace(1, 1e6, 60)]

        for low, high in itertools.pairwise(choices):
            assert all(b <= a for a, b in zip(low, high, strict=True))
        assert (4, 4, 4, 4) == choices[0]
        assert (0, 0, 0, 0) == choices[-1]

    def test_full_precision_is_no_reference(self):
        """A 32-bit row has no error to take multiples of; the widest below it is taken."""
        matrix = crafted([9.0, 1.0, 0.0], widths=(2, 4, 32))

        assert (1, 1, 1, 1) == threshold_choice(matrix, 5.0)
        assert (0, 0, 0, 0) == threshold_choice(matrix, 9.0)

    def test_multiplier_below_one(self):
        """Not even the reference would pass."""
        with pytest.raises(InvalidInput, match="at least 1; got 0.5"):
            threshold_choice(crafted([3.0, 2.0, 1.0]), 0.5)


class TestThresholdWithin:
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
    def test_is_the_smallest_multiplier_that_fits(self, matrix, share):
        """No finer scan finds a smaller one."""
        costs = matrix.table.costs("size_bits").reshape(4, -1)
        low, high = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
        limits = size_limits(matrix, int(low + share * (high - low)))

        choice, multiplier = threshold_within(matrix, limits)

        assert limits.allow(matrix.table, choice)
        assert choice == threshold_choice(matrix, multiplier)
        for smaller in (m for m in np.linspace(1.0, multiplier, 200) if m < multiplier):
            assert not limits.allow(matrix.table, threshold_choice(matrix, float(smaller)))

    def test_none_below_the_smallest_plan(self, matrix):
        """Nothing fits nothing."""
        assert threshold_within(matrix, size_limits(matrix, 1)) is None
