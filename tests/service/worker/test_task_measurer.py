"""Helpers measure on the samples that a task names: those of the measurement and of the search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitquota.context import Context, MemoryLedger
from bitquota.measurement_setup import build_setup
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.tasks import CHOICES, Task
from bitquota.service.worker.evaluator import task_measurer
from trained_digits import trained

REQUEST = PlanRequest(
    budgets=("2.5 bits",), weight_bits=(2, 4), samples=48, holdout_samples=48, rounding="nearest"
)


class CountingLedger(MemoryLedger):
    """A ledger that counts how often each entry is written."""

    def __init__(self):
        super().__init__()
        self.written = {}

    def put_many(self, entries):
        for key in entries:
            self.written[key] = self.written.get(key, 0) + 1
        super().put_many(entries)


@pytest.mark.parametrize("effort", ["quick", "normal"])
def test_nothing_that_a_helper_measured_is_measured_again(effort):
    """Another process with the same request does every task; its entries are those asked for."""
    known, request = trained(), replace(REQUEST, effort=effort)
    ledger, done = CountingLedger(), []
    help_out = task_measurer(
        build_setup(known.model, known.fit, request, context=Context(device="cpu", ledger=ledger))
    )

    def executor(tasks, do):
        del do
        for task in tasks:
            before = len(ledger)
            help_out(Task.from_json(task.to_json()))
            done.append((task.measure, task.samples, len(ledger) > before))

    context = Context(device="cpu", ledger=ledger, executor=executor)
    (plan,) = allocate(known.model, known.fit, request, context=context).plans
    (alone,) = allocate(known.model, known.fit, request, context=Context(device="cpu")).plans

    assert plan.dumps() == alone.dumps()
    # Also where something that is not uniform is larger and fits.
    assert effort == "normal" or ["uniform W2"] == [b.name for b in plan.baselines]
    searched = {samples for measure, samples, new in done if measure == CHOICES and new}
    assert len(searched) >= (1 if effort == "quick" else 2)
    assert set(ledger.written.values()) == {1}
