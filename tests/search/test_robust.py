import itertools

import numpy as np
import pytest

from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.search.robust import pessimistic, project, saturate, saturated_loss, shrink
from sensitivity_networks import Residual, build, inventory_of, table_of

TABLE = table_of(inventory_of(build(Residual)), (2, 4))
SAME = TABLE.group_of_row[:, None] == TABLE.group_of_row[None, :]


def matrix(seed=0, scale=0.1, error=0.0):
    """Return a random indefinite matrix with constant standard errors."""
    rng = np.random.default_rng(seed)
    cross = rng.normal(size=(8, 8)) * scale
    cross = np.where(SAME, 0.0, (cross + cross.T) / 2)
    return SensitivityMatrix(
        table=TABLE,
        diagonal=rng.uniform(0.05, 0.3, size=8),
        cross=cross,
        diagonal_error=np.full(8, error),
        cross_error=np.where(SAME, 0.0, error),
    )


class TestShrink:
    def test_sure_terms_stay_and_unsure_ones_go(self):
        """Half of a term that equals its error, all of one without error."""
        one = matrix(error=0.02)
        found = shrink(one)
        reliable = one.cross**2 / np.where(SAME, 1.0, one.cross**2 + 0.02**2)

        np.testing.assert_allclose(found.cross, one.cross * reliable)
        np.testing.assert_allclose(shrink(matrix()).cross, matrix().cross, rtol=1e-12)
        np.testing.assert_array_equal(found.diagonal, one.diagonal)


class TestPessimistic:
    def test_adds_standard_errors(self):
        """Mean + κ·error, per entry."""
        found = pessimistic(matrix(error=0.02), 1.5)

        np.testing.assert_allclose(found.diagonal, matrix().diagonal + 0.03)
        np.testing.assert_allclose(found.cross, matrix().cross + np.where(SAME, 0, 0.03))

    def test_negative_kappa(self):
        """Optimism is refused."""
        with pytest.raises(InvalidInput):
            pessimistic(matrix(), -1)


class TestProject:
    def test_never_predicts_a_gain(self):
        """xᵀGx is not negative at any choice, where it was before at some."""
        wild = matrix(scale=2.0)
        tame = project(wild)
        choices = list(itertools.product(range(2), repeat=4))
        # Dropping blocks inside a group cannot be undone by one-hot x; the full form is checked.
        g = 2 * np.diag(wild.diagonal) + wild.cross

        assert min(wild.predict(c) for c in choices) < 0
        assert np.linalg.eigvalsh(g)[0] < 0
        assert min(tame.predict(c) for c in choices) >= -1e-12

    def test_leaves_a_semidefinite_matrix_alone(self):
        """Nothing to clip."""
        mild = matrix(scale=0.001)
        found = project(mild)

        np.testing.assert_allclose(found.diagonal, mild.diagonal, atol=1e-12)
        np.testing.assert_allclose(found.cross, mild.cross, atol=1e-12)


class TestSaturate:
    def test_a_saturating_loss_becomes_additive(self):
        """If losses are c(1 - Π(1 - aᵢ)), the cross terms vanish and plans are predicted."""
        ceiling = 2.0
        a = np.random.default_rng(1).uniform(0.01, 0.6, size=8)
        pairs = ceiling * (1 - np.outer(1 - a, 1 - a))
        singles = ceiling * a
        cross = np.where(SAME, 0.0, pairs - singles[:, None] - singles[None, :])
        measured = SensitivityMatrix(table=TABLE, diagonal=singles, cross=cross)

        found = saturate(measured, ceiling)

        np.testing.assert_allclose(found.cross, 0, atol=1e-12)
        choice = (0, 1, 1, 0)
        rows = [2 * g + k for g, k in enumerate(choice)]
        truth = ceiling * (1 - np.prod(1 - a[rows]))
        assert saturated_loss(found.predict(choice), ceiling) == pytest.approx(truth)
        assert measured.predict(choice) < truth

    def test_ceiling_must_be_positive(self):
        """A loss cannot saturate at nothing."""
        with pytest.raises(InvalidInput):
            saturate(matrix(), 0.0)
