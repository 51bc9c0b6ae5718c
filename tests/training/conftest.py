"""Samples that most tests of training share."""

import pytest

from bitquota.models.calibration import CalibrationSet
from digits_network import N_TRAIN, digits


@pytest.fixture(scope="module")
def data():
    """Labelled training samples."""
    x, y = digits()
    return CalibrationSet(inputs=(x[:N_TRAIN],), labels=y[:N_TRAIN])
