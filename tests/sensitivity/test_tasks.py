"""Chunks that others measure give the same bits as a measurement alone."""

from __future__ import annotations

import numpy as np
import pytest

from bitquota.context import Context, MemoryLedger
from bitquota.errors import InvalidInput
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.gram import measure_differences
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles
from bitquota.sensitivity.measures.parts import carry_out
from bitquota.sensitivity.runners.make import make_runner
from bitquota.sensitivity.tasks import Task
from refusals import refused
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


def a_runner():
    module = build(Residual)
    return make_runner(module, inventory_of(module), samples(Residual), chunk_size=2)


class Helped:
    """Has every second task done by another runner, back to front, and counts both."""

    def __init__(self):
        self.ledger = MemoryLedger()
        self.other = a_runner()
        self.table = table_of(self.other.inventory)
        self.here, self.elsewhere = [], []

    @property
    def context(self):
        return Context(ledger=self.ledger, executor=self)

    def __call__(self, tasks, do):
        for task in reversed(tasks):
            if task.chunk % 2:
                sent = Task.from_json(task.to_json())
                carry_out(sent, self.other, self.table, KL, context=Context(ledger=self.ledger))
                self.elsewhere.append(task)
            else:
                do(task)
                self.here.append(task)


class TestCarryOut:
    @pytest.mark.parametrize("measure", [measure_pairs, measure_singles])
    @pytest.mark.parametrize("from_point", [False, True])
    def test_same_bits_as_alone(self, measure, from_point):
        runner = a_runner()
        table = table_of(runner.inventory)
        point = tuple(0 for _ in table.groups) if from_point else None
        expected = measure(a_runner(), table, KL, base_point=point, context=Context())
        helped = Helped()
        found = measure(runner, table, KL, base_point=point, context=helped.context)
        assert expected.to_bytes() == found.to_bytes()
        assert helped.here
        assert helped.elsewhere

    def test_same_differences_as_alone(self):
        runner = a_runner()
        table = table_of(runner.inventory)
        alone = MemoryLedger()
        expected, theirs = measure_differences(a_runner(), table, KL, context=Context(ledger=alone))
        helped = Helped()
        found, ours = measure_differences(runner, table, KL, context=helped.context)
        assert expected.to_bytes() == found.to_bytes()
        assert theirs.differences.equal(ours.differences)
        assert len(alone) == len(helped.ledger)

    @pytest.mark.parametrize("with_centre", [False, True])
    def test_same_losses_of_choices_as_alone(self, with_centre):
        runner = a_runner()
        table = table_of(runner.inventory)
        choices = [tuple(0 for _ in table.groups), tuple(1 for _ in table.groups)]
        centre = choices[1] if with_centre else None
        expected = measure_choices(a_runner(), table, KL, choices, centre=centre)
        helped = Helped()
        found = measure_choices(runner, table, KL, choices, centre=centre, context=helped.context)
        assert np.array_equal(expected, found)
        assert helped.elsewhere

    def test_nobody_is_asked_for_what_is_there(self):
        runner = a_runner()
        table = table_of(runner.inventory)
        helped = Helped()
        measure_pairs(runner, table, KL, context=helped.context)
        before = len(helped.here)
        measure_pairs(a_runner(), table, KL, context=helped.context)
        assert before == len(helped.here)

    @pytest.mark.parametrize(
        "changes", [{"chunk": 10_000}, {"point": (0,)}, {"choices": ((99, 99, 99, 99),)}]
    )
    def test_task_of_another_model(self, changes):
        runner = a_runner()
        task = Task(**{"measure": "gram", "chunk": 0} | changes)
        with pytest.raises(InvalidInput, match="must name one of"):
            carry_out(
                task,
                runner,
                table_of(runner.inventory),
                KL,
                context=Context(),
            )


class TestTask:
    def test_survives_json(self):
        task = Task(measure="choices", chunk=3, point=(1, 0), choices=((0, 1), (1, 1)))
        assert task == Task.from_json(task.to_json())

    @pytest.mark.parametrize("data", [{}, {"measure": "gram"}, {"measure": 1, "chunk": "x"}])
    def test_refuses_anything_else(self, data):
        with pytest.raises(InvalidInput, match="a task"):
            Task.from_json(data)

    def test_refuses_unknown_measures(self):
        with refused(InvalidInput, measure="tangent", chunk=0):
            Task(measure="tangent", chunk=0)
