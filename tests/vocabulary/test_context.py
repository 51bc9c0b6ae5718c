"""Context: whom long work tells, when it stops, and what a part of it inherits."""

from __future__ import annotations

import numpy as np

from bitquota.context import Context, MemoryLedger
from bitquota.errors import Cancelled
from refusals import refused


class TestContext:
    def test_tells_nobody_by_default(self):
        Context().report("stage", 1, 2)
        Context().check("stage")

    def test_reports(self):
        seen = []
        Context(on_progress=seen.append).report("stage", 1, 2, 1)
        (told,) = seen
        assert ("stage", 1, 2, 1) == (told.stage, told.done, told.total, told.reused)

    def test_stops(self):
        with refused(Cancelled, stage="stage"):
            Context(cancelled=lambda: True).check("stage")

    def test_each_has_a_ledger_of_its_own(self):
        one, two = Context(), Context()
        one.ledger.put("k", np.ones(2))
        assert 0 == len(two.ledger)

    def test_a_part_keeps_the_ledger_and_the_stop(self):
        whole = Context(
            ledger=MemoryLedger(),
            cancelled=lambda: True,
            on_progress=print,
            executor=lambda _tasks, _do: None,
        )
        part = whole.part()
        assert whole.ledger is part.ledger
        assert whole.cancelled is part.cancelled
        assert part.on_progress is None
        assert part.executor is None
