import numpy as np
import pytest

from bitquota.candidates.table import enumerate_candidates
from bitquota.matrix import SensitivityMatrix
from bitquota.sensitivity.metrics import FlagKind, find_flags
from sensitivity_networks import Branches, build, inventory_of


def matrix(values, errors=None):
    table = enumerate_candidates(inventory_of(build(Branches)), (2, 4, 8))
    return SensitivityMatrix(
        table=table,
        diagonal=np.array(values),
        diagonal_error=None if errors is None else np.array(errors),
    )


class TestFindFlags:
    def test_a_decreasing_matrix_has_none(self):
        """Equal neighbours are fine."""
        assert () == find_flags(matrix([3.0, 1.0, 0.0, 2.0, 2.0, 2.0]))

    def test_a_negative_row(self):
        """With its size and its standard errors."""
        (flag,) = find_flags(matrix([3.0, 1.0, -0.2, 2.0, 1.0, 0.0], [0.1] * 6))

        assert (FlagKind.NEGATIVE, "left", "W8") == (flag.kind, flag.group, flag.label)
        assert (0.2, 2.0) == (flag.excess, pytest.approx(flag.standard_errors))

    def test_a_growing_row(self):
        """Flagged once, against the smallest row with fewer bits, in combined errors."""
        values, errors = [3.0, 1.0, 4.0, 2.0, 1.0, 0.0], [0.3, 0.3, 0.4, 0, 0, 0]
        (flag,) = find_flags(matrix(values, errors))

        assert (FlagKind.INCREASING, "W8", "W4") == (flag.kind, flag.label, flag.against)
        assert 3.0 == flag.excess
        assert flag.standard_errors == pytest.approx(3.0 / 0.5)

    def test_no_errors_no_multiple(self):
        """Without standard errors nothing is said about noise."""
        (flag,) = find_flags(matrix([1.0, 2.0, 0.0, 2.0, 1.0, 0.0]))

        assert flag.standard_errors is None
        assert {"kind", "group", "label", "against", "excess", "standard_errors"} == set(
            flag.to_json()
        )
