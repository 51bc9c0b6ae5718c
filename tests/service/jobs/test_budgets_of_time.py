"""Budgets of time in a request over REST: the cost table travels inside it."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from bitquota.candidates.cost_table import CostTable, LayerCost
from bitquota.errors import InvalidInput
from bitquota.request import PlanRequest
from bitquota.service.api.submissions import JobSubmission, new_job
from bitquota.service.jobs.kinds import kind_by_name
from refusals import refused

TABLE = CostTable(
    resource="latency_ns",
    model_digest="sha256:0",
    layers=(LayerCost(layer="conv", candidate="W4", cost=3, standard_error=0.5),),
)
REQUEST = PlanRequest(budgets=("5 ms + 12 MiB",), tables=(TABLE,))


def order(request: dict) -> JobSubmission:
    """The order of a plan job."""
    body = {"kind": "plan"} | kind_by_name("plan").example | {"request": request}
    return TypeAdapter(JobSubmission).validate_python(body)


class TestRequest:
    def test_is_taken_as_it_is(self):
        """What the client wrote is what the job reads."""
        assert REQUEST == PlanRequest.from_json(order(REQUEST.to_json()).request)

    def test_needs_its_table(self):
        """Refused at once, before a job is queued."""
        new_job(order(REQUEST.to_json()), "ann")
        with refused(InvalidInput, resource="latency_ns"):
            new_job(order(PlanRequest(budgets=("5 ms",)).to_json()), "ann")

    @pytest.mark.parametrize(
        "change", [{"cost": -1}, {"cost": "3"}, {"cost": 1.5}, {"surprise": 1}]
    )
    def test_a_broken_table(self, change):
        """As the reader of files refuses it."""
        body = REQUEST.to_json()
        body["tables"][0]["layers"][0] |= change
        with pytest.raises((InvalidInput, ValueError)):
            order(body)
