import pytest
import torch
from torch import nn

from bitquota.candidates.table import CandidateTable, enumerate_candidates
from bitquota.context import Context
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import FirstOrder
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import build, inventory_of, samples

KL = loss_by_name("kl")


class Small(nn.Module):
    """Two linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def prepare(widths=(2, 4), fixed=None, chunk_size=99):
    module = build(Small)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(Small), chunk_size=chunk_size, engine="eager")
    return runner, enumerate_candidates(inventory, widths, fixed=fixed)


def by_hand(runner, first, second):
    """Σ |∂KL/∂W ⊙ ΔW| of both layers, gradients with both quantized."""
    module, x = build(Small), runner.calibration.inputs[0]
    reference = module(x).detach()
    changes = {}
    for candidate in (first, second):
        layer = module.get_submodule(candidate.layer)
        changes[candidate.layer] = runner.weights(candidate).detach() - layer.weight.detach()
        layer.weight.data = runner.weights(candidate).detach().clone()
    KL.per_sample(module(x), reference, None).mean().backward()
    return {
        name: float((module.get_submodule(name).weight.grad * d).abs().double().sum())
        for name, d in changes.items()
    }


class TestFirstOrder:
    def test_gradient_is_that_of_the_quantized_model(self):
        """Each width in the pass of its own uniform plan, by plain autograd."""
        runner, table = prepare()
        matrix = FirstOrder().measure(runner, table, KL)

        for k in range(2):
            first, second = table.rows[k].candidates[0], table.rows[2 + k].candidates[0]
            expected = by_hand(runner, first, second)
            assert matrix.diagonal[k] == pytest.approx(expected["first"], rel=1e-4)
            assert matrix.diagonal[2 + k] == pytest.approx(expected["second"], rel=1e-4)

    def test_a_group_without_the_width_takes_the_nearest(self):
        """One layer fixed at 4 bits: the 2-bit row of the other is scored beside it."""
        runner, table = prepare(fixed={"second": 4})
        matrix = FirstOrder().measure(runner, table, KL)
        expected = by_hand(runner, table.rows[0].candidates[0], table.rows[2].candidates[0])

        assert matrix.diagonal[0] == pytest.approx(expected["first"], rel=1e-4)

    def test_cost_grows_with_the_widths(self):
        """One pass both ways for every label, and the references."""
        runner, _ = prepare()
        for widths in ((2,), (2, 4), (2, 4, 8)):
            table = enumerate_candidates(runner.inventory, widths)
            assert 1 + 3 * len(widths) == FirstOrder().cost(runner, table)

    def test_mean_and_error_over_chunks(self):
        """Scores of each chunk, averaged by size."""
        runner, table = prepare(chunk_size=6)
        matrix = FirstOrder().measure(runner, table, KL)
        halves = []
        for rows in (range(6), range(6, 12)):
            data = runner.calibration.take(rows)
            alone = make_runner(runner.module, runner.inventory, data, engine="eager")
            halves.append(FirstOrder().measure(alone, table, KL).diagonal)

        assert matrix.diagonal == pytest.approx((halves[0] + halves[1]) / 2)
        assert matrix.diagonal_error == pytest.approx(abs(halves[0] - halves[1]) / 2)

    def test_only_asks_the_ledger_for_the_same_point(self):
        """A row's score depends on what the other groups are at, and so does its key."""
        from bitquota.context import MemoryLedger

        ledger = MemoryLedger()
        runner, table = prepare()
        whole = FirstOrder().measure(runner, table, KL, context=Context(ledger=ledger))
        partial = CandidateTable(rows=table.rows[:2])  # the second layer stays as it is
        other = FirstOrder().measure(runner, partial, KL, context=Context(ledger=ledger))

        assert not (whole.diagonal[:2] == other.diagonal).any()
