"""Which tensors are alive at once, against peaks by hand and by brute force."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bitquota.candidates.budget import Budget
from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.live import Cut, LiveTensor, Schedule
from bitquota.candidates.peak import constraints, peak_of
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate, CandidateTable, Row
from bitquota.context import Context, MemoryLedger
from bitquota.errors import BudgetTooSmall, InvalidBudget
from bitquota.matrix import SensitivityMatrix
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.loaded import finish
from bitquota.models.schedule import Operation, cuts_of, schedule_of
from bitquota.plan import Plan
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.solver.build import build_problem
from bitquota.solver.dispatch import solve
from refusals import refused


class Residual(nn.Module):
    """A wide middle, a sum, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Conv2d(4, 16, 1)
        self.narrow = nn.Conv2d(16, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.narrow(torch.relu(self.wide(x))) + x
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return finish(Residual().eval(), source="residual", architecture="Residual")


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return CalibrationSet(inputs=(torch.randn(96, 2, 8, 8),))


def alive(schedule, operation):
    (cut,) = [c for c in schedule.cuts if c.operation == operation]
    return {t.readers: t.elements for t in cut.tensors}


class TestScheduleOf:
    def test_each_cut_by_hand(self, model, samples):
        """64 positions; the sum is written over one of its terms, which is in full precision."""
        inputs = samples.first(2).inputs
        found = schedule_of(model.module, discover(model.module, inputs), inputs)
        by_hand = [
            # Input, and what the norm and the activation make of the first output: read by the
            # wide layer and by the sum.
            ("conv2d", {("first",): 128, (): 256}),
            ("conv2d", {(): 256, ("narrow",): 1024}),
            ("conv2d", {(): 256 + 256, ("narrow",): 1024}),
            ("mean", {(): 256, ("head",): 4}),
            ("linear", {("head",): 4, (): 3}),
        ]
        got = [(c.operation, {t.readers: t.elements for t in c.tensors}) for c in found.cuts]
        assert by_hand == got

    def test_memory_is_taken_again_only_when_nothing_reads_it(self):
        """A relu whose input is read later has memory of its own."""
        relu = Operation(name="relu", sources=("a",), results={"b": 5})
        both = Operation(name="concat", sources=("a", "b"), results={"c": 10})
        found = cuts_of([relu, both], {"a": 5}, {"c"})
        assert [10, 20] == [sum(t.elements for t in cut.tensors) for cut in found.cuts]
        last = Operation(name="concat", sources=("b",), results={"c": 10})
        found = cuts_of([relu, last], {"a": 5}, {"c"})
        assert [15] == [sum(t.elements for t in cut.tensors) for cut in found.cuts]

    @pytest.mark.slow
    def test_a_graph_of_onnx_has_the_cuts_of_its_module(self, model, samples, tmp_path):
        """The same tensors, whatever the operations are called."""
        inputs = samples.first(2).inputs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own trees
            torch.onnx.export(model.module, inputs, tmp_path / "m.onnx", dynamo=True, verbose=False)
        graph = load_model(str(tmp_path / "m.onnx")).module
        found = schedule_of(graph, discover(graph, inputs), inputs)
        own = schedule_of(model.module, discover(model.module, inputs), inputs)

        def shape(schedule):
            return [sorted((t.elements, len(t.readers)) for t in c.tensors) for c in schedule.cuts]

        assert shape(own) == shape(found)


def random_schedule(rng, names):
    """Return cuts of tensors with one reader, several, or none."""
    cuts = []
    for k in range(8):
        tensors = []
        for _ in range(int(rng.integers(1, 4))):
            n = int(rng.integers(0, 3))
            readers = tuple(rng.choice(names, size=n, replace=False).tolist())
            tensors.append(LiveTensor(elements=int(rng.integers(1, 50)), readers=readers))
        cuts.append(Cut(operation=f"op{k}", tensors=tuple(tensors)))
    return Schedule(cuts=tuple(cuts))


def random_table(names):
    rows = []
    for name in names:
        layer = Layer(name=name, kind=LayerKind.LINEAR, weight_name=name, weight_shape=(4, 8),
                      rows=4, columns=8, n_weights=32, n_inputs=8)  # fmt: skip
        for bits, inputs in ((4, 4), (4, 8), (8, 8), (0, None)):
            candidate = Candidate.of(layer, bits, Scheme(), inputs)
            rows.append(Row(group=name, candidates=(candidate,)))
    return CandidateTable(rows=tuple(rows))


class TestConstraints:
    @pytest.mark.parametrize("seed", range(6))
    def test_the_solver_finds_the_best_choice_below_the_peak(self, seed):
        """Brute force over all choices; tensors of several groups count as their widest reader."""
        rng = np.random.default_rng(seed)
        names = ["a", "b", "c", "d"]
        table = random_table(names)
        schedule = random_schedule(rng, names)
        # Readers that decide together, as planning ties them; others make the bound a bound.
        schedule = Schedule(
            cuts=tuple(
                replace(c, tensors=tuple(replace(t, readers=t.readers[:1]) for t in c.tensors))
                for c in schedule.cuts
            )
        )
        matrix = SensitivityMatrix(
            table=table, diagonal=rng.random(len(table.rows)), loss="kl", unit="kl"
        )
        choices = list(itertools.product(range(4), repeat=4))
        peaks = {k: peak_of(schedule, table.decode(k)) for k in choices}
        lowest, highest = min(peaks.values()), max(peaks.values())
        for limit in np.linspace(lowest, highest, 5).astype(int):
            budget = Budget(resource="activation_bits_peak", limit=int(limit), schedule=schedule)
            problem = build_problem(matrix, [budget])
            fitting = [k for k in choices if peaks[k] <= limit]
            for choice in choices:
                rows = table.offsets[:-1] + np.array(choice)
                spent = problem.costs[:, rows].sum(axis=1)
                assert (peaks[choice] <= limit) == bool((spent <= problem.limits).all())
            best = min(sum(matrix.diagonal[table.offsets[:-1] + np.array(k)]) for k in fitting)
            assert solve(problem).objective == pytest.approx(best)

    def test_readers_that_decide_apart_are_never_underestimated(self):
        """The constraint holds only where the peak does."""
        rng = np.random.default_rng(9)
        names = ["a", "b", "c"]
        table, schedule = random_table(names), random_schedule(rng, names)
        for limit in (200, 400, 800):
            held = constraints(schedule, table, limit)
            for choice in itertools.product(range(4), repeat=3):
                rows = table.offsets[:-1] + np.array(choice)
                if all(costs[rows].sum() <= most for costs, most in held):
                    assert peak_of(schedule, table.decode(choice)) <= limit

    def test_a_peak_below_what_is_always_alive_is_refused(self):
        """The message says what the smallest plan takes."""
        tensors = (LiveTensor(elements=10), LiveTensor(elements=5, readers=("a",)))
        schedule = Schedule(cuts=(Cut(operation="op", tensors=tensors),))
        budget = Budget(resource="activation_bits_peak", limit=300, schedule=schedule)
        with refused(BudgetTooSmall, limit=300, smallest=320):
            budget.check(random_table(["a"]))


class TestPlans:
    def test_a_plan_keeps_its_peak(self, model, samples):
        """Inputs of the wide middle get fewer bits, those of others need not."""
        request = PlanRequest(
            budgets=("6 bits + act peak 2900 B",),
            activation_bits=(4, 8),
            weight_bits=(4, 8),
            effort="quick",
            refine=False,
            samples=48,
            holdout_samples=48,
        )
        context = Context(device="cpu", ledger=MemoryLedger())
        plan = allocate(model, samples, request, context=context).plans[0]
        chosen = {a.layer.name: a.candidate.activation_bits for a in plan.assignments}
        assert chosen["narrow"] == 4
        (peak,) = [b for b in plan.budgets if b.schedule is not None]
        # Two tensors of the sum in full precision, and the wide one.
        assert 32 * 512 + 4 * 1024 == plan.spent(peak)
        assert Plan.from_json(plan.to_json()) == plan

    def test_without_quantized_inputs_there_is_no_schedule(self):
        """Only what is planned can be limited."""
        inventory = Inventory(
            model_digest="",
            layers=(
                Layer(name="a", kind=LayerKind.LINEAR, weight_name="a", weight_shape=(4, 8),
                      rows=4, columns=8, n_weights=32),
            ),
        )  # fmt: skip
        with refused(InvalidBudget, budget="act peak 9 kB"):
            Budget.parse("act peak 9 kB", inventory)
