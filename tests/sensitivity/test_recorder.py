"""Measures by name: one list, whoever asks."""

from __future__ import annotations

from bitquota.errors import InvalidInput
from bitquota.request import LOSSES, MEASURES, PRECISIONS, PlanRequest
from bitquota.sensitivity.losses import LOSSES as KNOWN_LOSSES
from bitquota.sensitivity.registry import measure_by_name, measures
from refusals import refused


class TestMeasures:
    def test_a_request_may_name_every_measure(self):
        """What can be ordered is what there is, besides ``auto``."""
        assert set(MEASURES) == {"auto", *measures()}
        assert len(set(MEASURES)) == len(MEASURES)

    def test_names_are_the_measures_own(self):
        """The name that finds a measure is the one it writes into provenance."""
        assert all(name == measure.name for name, measure in measures().items())

    def test_unknown(self):
        """The error lists what there is."""
        with refused(InvalidInput, measure="fisher"):
            measure_by_name("fisher")
        with refused(InvalidInput, measure="fisher"):
            PlanRequest(measure="fisher")


class TestPlanRequest:
    def test_losses_and_precisions(self):
        """Names that a request takes are those that measuring knows."""
        assert set(LOSSES) == set(KNOWN_LOSSES)
        assert PRECISIONS == ("fp32", "bf16")
        with refused(InvalidInput, precision="fp8"):
            PlanRequest(precision="fp8")
