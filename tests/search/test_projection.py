import itertools

import numpy as np

from bitquota.matrix import SensitivityMatrix
from bitquota.search.projection import project
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
