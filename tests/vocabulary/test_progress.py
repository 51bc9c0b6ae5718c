"""Progress of a whole job: weighted phases, time left, stages in words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.progress import ALMOST, Course, Pace, Progress, lasting, stage_words
from bitquota.request import MEASURES

if TYPE_CHECKING:
    from pathlib import Path


class TestProgress:
    def test_unknown_parts_are_not_written(self):
        """What a release before wrote is what is written without them."""
        plain = Progress(stage="pairs", done=1, total=2)
        assert {"stage": "pairs", "done": 1, "total": 2, "reused": 0} == plain.to_json()
        whole = Progress(stage="pairs", done=1, total=2, fraction=0.25, until=0.5)
        assert whole == Progress.from_json(whole.to_json())

    @pytest.mark.parametrize(
        "values",
        [{"fraction": 1.5}, {"fraction": -0.1}, {"fraction": 0.5, "until": 0.4}, {"left_s": -1.0}],
    )
    def test_refuses(self, values):
        with pytest.raises(InvalidInput):
            Progress(stage="pairs", done=1, total=2, **values)


class TestCourse:
    def test_phases_count_by_what_they_take(self):
        """One fifth of the work is a fifth of the job, however many stages there are."""
        course = Course([20, 80])
        assert (0.1 * ALMOST, 0.2 * ALMOST) == pytest.approx(course.at("a", 1, 2, None))
        course.next_phase()
        assert course.at("b", 1, 4, 40)[0] == pytest.approx(0.3 * ALMOST)
        assert course.at("c", 1, 1, 20)[0] == pytest.approx(0.5 * ALMOST)

    def test_never_goes_back_nor_beyond(self):
        """A phase that takes more than expected waits at its end; one that ends early jumps."""
        course = Course([10, 10])
        told = [course.at(f"stage {k}", 1, 1, 7.0)[0] for k in range(3)]
        course.next_phase()
        told += [course.at("last", done, 2, 1.0)[0] for done in (1, 2)]
        assert sorted(told) == told
        assert told[2] == pytest.approx(0.5 * ALMOST)
        assert told[-1] < ALMOST

    def test_the_same_stage_again_is_another_one(self):
        course = Course([4])
        assert course.at("evidence", 2, 2, 1.0)[0] == pytest.approx(0.25 * ALMOST)
        assert course.at("evidence", 1, 2, 1.0)[0] == pytest.approx(0.375 * ALMOST)

    def test_what_weighs_nothing_is_part_of_the_stage_around_it(self):
        """Plans are rounded while they are compared."""
        told = []
        for rounds in (False, True):
            course = Course([10])
            course.at("hold-out", 1, 4, 8.0)
            if rounds:
                assert [course.at("rounding", k, 3, 0.0)[0] for k in range(3)] == [0.2 * ALMOST] * 3
            told.append(course.at("hold-out", 2, 4, 8.0))
        assert told[0] == told[1]

    @pytest.mark.parametrize("weight", [None, 0.0, 7.0])
    def test_without_phases_a_stage_is_the_whole(self, weight):
        seen = []
        Context(on_progress=seen.append).report("evaluate", 3, 4, weight=weight)
        assert [0.75 * ALMOST] == [p.fraction for p in seen]

    def test_nothing_to_weigh(self):
        assert (0.0, 0.0) == Course([0.0, 0.0]).at("weight_mse", 1, 1, 0.0)


class TestPace:
    def test_extrapolates(self):
        now = [0.0]
        pace = Pace(lambda: now[0])
        pace.told(0.0)
        assert pace.left_s is None
        now[0] = 10.0
        pace.told(0.25)
        assert pace.left_s == pytest.approx(30.0)

    def test_what_comes_before_the_first_fraction(self):
        """Preparing a model may take longer than all that is counted."""
        now = [0.0]
        pace = Pace(lambda: now[0])
        pace.told(0.0)
        now[0] = 300.0
        pace.told(0.0)
        now[0] = 310.0
        pace.told(0.25)
        assert pace.left_s == pytest.approx(30.0)

    def test_a_slower_phase_is_noticed(self):
        """What went fast long ago does not count for ever."""
        now = [0.0]
        pace = Pace(lambda: now[0])
        pace.told(0.0)
        now[0] = 1.0
        pace.told(0.5)
        for k in range(1, 41):
            now[0] = 1.0 + 10 * k
            pace.told(0.5 + 0.001 * k)
        assert pace.left_s == pytest.approx(10 * (1 - 0.54) / 0.001, rel=0.2)

    @pytest.mark.parametrize(
        ("seconds", "text"), [(40, "40 s"), (720, "12 min"), (7500, "2 h 5 min")]
    )
    def test_durations(self, seconds, text):
        assert text == lasting(seconds)


class TestStageWords:
    @pytest.mark.parametrize("name", [m for m in MEASURES if m != "auto"])
    def test_every_measure_has_words(self, name):
        """No identifier is shown to people."""
        assert " " in stage_words(name)
        assert "_" not in stage_words(name)

    def test_what_follows_is_kept(self):
        assert "measuring around a good plan (round 3)" == stage_words("linearisation 3")
        assert "trying swaps of layers (round 2 together)" == stage_words("swaps 2 together")
        assert "comparing plans (budget 1 of 2)" == stage_words("hold-out, budget 1 of 2")

    def test_every_stage_in_the_code_has_words(self, repository):
        """Literal names of stages, wherever they are reported."""
        found = set()
        for folder in ("src", "sensitivity", "service", "training"):
            for path in (repository / folder).rglob("*.py"):
                found |= _stages_in(path)
        assert {"load", "export", "evidence", "evaluate", "finetune"} <= found
        assert [] == sorted(name for name in found if stage_words(name) == name != "done")


def _stages_in(path: Path) -> set[str]:
    text = path.read_text()
    named = (
        r"(?:stage=|\.report\(\s*|(?:work|self)\.say\(|\.aside\("
        r'|_beating\(|check\()f?"([a-z][^"{]*)'
    )
    return {name.strip(" ,") for name in re.findall(named, text) if " " not in name.strip(" ,")}
