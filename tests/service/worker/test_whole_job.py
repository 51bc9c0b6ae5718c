"""What clients are told of a job: the whole of it, never backwards, never done before its end."""

from __future__ import annotations

import pytest

from bitquota.progress import ALMOST, Progress
from bitquota.service.worker.whole_job import WholeJob


def step(fraction, until=None, stage="pairs"):
    """Return a report of an evaluator."""
    return Progress(stage=stage, done=1, total=4, fraction=fraction, until=until)


class TestWholeJob:
    def test_says_it_in_words(self):
        said = WholeJob().told(step(0.25))
        assert ("pairs", "measuring pairs of candidates") == (said["stage"], said["text"])
        assert 0.25 == said["fraction"]

    def test_another_attempt_does_not_go_back(self):
        """It finds in the ledger what the one before has measured."""
        whole = WholeJob({"stage": "pairs", "fraction": 0.6})
        assert 0.6 == whole.aside("prepare")["fraction"]
        assert 0.6 == whole.told(step(0.1))["fraction"]
        assert 0.7 == whole.told(step(0.7))["fraction"]

    def test_helpers_move_it_within_the_stage(self):
        whole = WholeJob()
        whole.told(step(0.2, until=0.6))
        assert whole.shared("pairs", 1, 4)["fraction"] == pytest.approx(0.3)
        # The evaluator then runs through the chunks that it finds.
        assert whole.told(step(0.25, until=0.6))["fraction"] == pytest.approx(0.3)

    def test_only_the_end_is_the_end(self):
        whole = WholeJob({"stage": "done", "fraction": 1.0})
        assert ALMOST == whole.told(step(1.0))["fraction"]
        assert 1.0 == whole.ended()["fraction"]

    def test_time_left(self):
        now = [0.0]
        whole = WholeJob(clock=lambda: now[0])
        assert whole.told(step(0.0))["left_s"] is None
        now[0] = 10.0
        assert 10.0 == whole.told(step(0.5))["left_s"]
