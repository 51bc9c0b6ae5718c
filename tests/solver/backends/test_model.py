"""The external solvers' view of a problem says the same as the problem."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings

from bitquota.solver.backends.answer import Answer, Task
from bitquota.solver.backends.child import solve_with_covers
from bitquota.solver.backends.linear import constraints
from bitquota.solver.backends.model import Model, Products
from bitquota.solver.backends.shift import convex_shift
from contracts.solver_backend import small, tight
from strategies import any_problems, problems


def all_choices(model: Model):
    spans = [range(a, b) for a, b in itertools.pairwise(model.offsets.tolist())]
    return [np.array(rows) for rows in itertools.product(*spans)]


def one_hot(model: Model, rows) -> np.ndarray:
    x = np.zeros(model.n_rows)
    x[rows] = 1.0
    return x


class TestModel:
    @settings(max_examples=60)
    @given(any_problems(max_groups=3, max_rows=3))
    def test_values_and_constraints_are_the_problems(self, problem):
        """Objective up to the scale, budgets and pairs exactly, for every choice."""
        model = Model.of(problem)
        size = 1 + np.abs(model.diagonal).max() + np.abs(model.cross).max(initial=0.0)
        for rows in all_choices(model):
            choice = model.choice(rows)
            assert abs(model.value(rows) / model.scale - problem.evaluate(choice)) <= (
                1e-12 * size / model.scale
            )
            within = bool((problem.spent(choice) <= problem.limits).all())
            assert within == (model.cover(rows) is None)
            chosen = set(rows.tolist())
            apart = not any({a, b} <= chosen for a, b in model.pairs.tolist())
            assert problem.is_feasible(choice) == (within and apart)

    @settings(max_examples=40)
    @given(any_problems())
    def test_survives_its_bytes(self, problem):
        """What the child reads is what was written."""
        model = Model.of(problem)
        again = Model.from_bytes(model.to_bytes())
        for name in Model.__slots__:
            assert np.array_equal(getattr(model, name), getattr(again, name))

    def test_group_without_rows_is_no_model(self):
        """An empty group is infeasible before any solver is asked."""
        assert Model.of(small(allowed=np.array([0] * 3 + [1] * 6, dtype=bool))) is None

    @settings(max_examples=60)
    @given(any_problems(max_groups=4, max_rows=3))
    def test_cover_cuts_off_no_feasible_choice(self, problem):
        """A cover is broken by the choice that it is made for, and by no feasible one."""
        model = Model.of(problem)
        for rows in all_choices(model):
            cover = model.cover(rows)
            if cover is None:
                continue
            most = len(set(model.group[cover].tolist())) - 1
            assert np.isin(rows, cover).sum() == most + 1
            for other in all_choices(model):
                if problem.is_feasible(model.choice(other)):
                    assert np.isin(other, cover).sum() <= most


class TestProducts:
    @settings(max_examples=60)
    @given(problems(max_groups=4, max_rows=3))
    def test_linear_form_has_the_same_values(self, problem):
        """Linear terms and products without reference rows give every choice its value."""
        model = Model.of(problem)
        products = Products.of(model)
        size = 1 + np.abs(model.diagonal).max() + np.abs(model.cross).max(initial=0.0)
        for rows in all_choices(model):
            x = one_hot(model, rows)
            value = products.constant + products.linear @ x
            value += products.weight @ (x[products.left] * x[products.right])
            assert abs(value - model.value(rows)) <= 1e-11 * size


class TestConstraints:
    @settings(max_examples=60)
    @given(any_problems(max_groups=4, max_rows=3))
    def test_choices_meet_them_as_they_meet_the_problem(self, problem):
        """One row per group, budgets and pairs; a cover cuts off what it is made for."""
        model = Model.of(problem)
        task = Task(
            model=model, gap=0, time_limit_s=None, node_limit=None, seed=0, report=lambda _: None
        )
        one_each, A, b = constraints(task)
        scaled_exactly = not len(model.costs) or int(model.costs.max()) <= 10**6
        for chosen in all_choices(model):
            x = one_hot(model, chosen)
            assert (one_each @ x == 1).all()
            if scaled_exactly:
                assert problem.is_feasible(model.choice(chosen)) == bool((A @ x <= b).all())
            if (cover := model.cover(chosen)) is not None:
                _, A_cut, b_cut = constraints(replace(task, covers=(cover,)))
                assert (A_cut @ x)[-1] > b_cut[-1]


class TestConvexShift:
    @settings(max_examples=60)
    @given(problems(kinds=("psd", "noisy", "indefinite", "wide", "negative")))
    def test_makes_convex_and_keeps_every_value(self, problem):
        """The shifted matrix is positive semidefinite; one-hot vectors keep their value."""
        model = Model.of(problem)
        shift = convex_shift(model.cross, model.diagonal)
        assert (shift >= 0).all()
        Q = (model.cross if len(model.cross) else 0.0) + np.diag(shift)
        scale = np.sqrt(np.maximum(shift, 1e-300))
        if model.cross.any():
            assert np.linalg.eigvalsh(Q / np.outer(scale, scale)).min() >= -1e-9
        for rows in all_choices(model):
            x = one_hot(model, rows)
            value = model.constant + (model.diagonal - shift / 2) @ x + 0.5 * x @ Q @ x
            assert abs(value - model.value(rows)) <= 1e-9 * (1 + np.abs(Q).max())

    def test_follows_the_rows_scales(self):
        """Where scales span decades the shift does too: no multiple of the identity."""
        scale = 10.0 ** np.repeat([0, -3], 4)
        cross = np.outer(scale, scale)
        for g in range(4):
            cross[2 * g : 2 * g + 2, 2 * g : 2 * g + 2] = 0.0
        shift = convex_shift(cross, scale**2)
        assert shift[-1] < 1e-5 * shift[0]
        assert shift.sum() < 0.6 * 8 * -np.linalg.eigvalsh(cross).min()

    def test_nothing_to_shift(self):
        """A separable problem needs none."""
        assert not convex_shift(np.zeros((3, 3)), np.ones(3)).any()


class TestSolveWithCovers:
    """The loop around a solver that breaks budgets within its tolerance."""

    def task(self, model, **fields):
        given = {
            "model": model,
            "gap": 1e-6,
            "time_limit_s": None,
            "node_limit": None,
            "seed": 0,
            "report": lambda _: None,
        }
        return Task(**given | fields)

    def sloppy(self, model):
        """Return a solver that ignores budgets but obeys covers, and its calls."""
        calls = []

        def optimise(task: Task) -> Answer:
            calls.append(task)
            best = min(
                (
                    rows
                    for rows in all_choices(model)
                    if all(
                        np.isin(rows, cover).sum() <= task.cover_limit(cover)
                        for cover in task.covers
                    )
                ),
                key=model.value,
            )
            return Answer(status="optimal", chosen=best, bound=model.value(best), nodes=1)

        return optimise, calls

    def test_cuts_until_the_budget_holds(self):
        """The sloppy optimum is cut off, once per round, and the bound stays valid."""
        model = Model.of(tight())
        optimise, calls = self.sloppy(model)
        answer = solve_with_covers(optimise, self.task(model))
        assert "optimal" == answer.status
        assert model.cover(answer.chosen) is None
        assert len(calls) > 1
        assert len(calls) == answer.nodes == answer.details["cover_rounds"] + 1
        best = min(model.value(r) for r in all_choices(model) if model.cover(r) is None)
        assert best == model.value(answer.chosen)
        assert answer.bound <= best

    def test_gives_up_on_a_solver_that_ignores_covers(self):
        """A solver that never meets the budget gives 'unknown', not a wrong choice."""
        model = Model.of(tight())
        bad = np.array([1, 3, 5])
        answer = solve_with_covers(
            lambda _: Answer(status="optimal", chosen=bad, bound=0.0), self.task(model)
        )
        assert ("unknown", None) == (answer.status, answer.chosen)

    def test_keeps_a_reported_choice(self):
        """A feasible choice seen on the way is better than none; infeasible ones are dropped."""
        model = Model.of(tight())
        heard = []

        def optimise(task: Task) -> Answer:
            task.report(np.array([1, 3, 5]))  # over budget
            task.report(np.array([0, 3, 4]))
            return Answer(status="feasible", limit="time", chosen=np.array([1, 3, 5]))

        answer = solve_with_covers(optimise, self.task(model, report=heard.append))
        assert ("feasible", "time") == (answer.status, answer.limit)
        assert [0, 3, 4] == answer.chosen.tolist()
        assert [[0, 3, 4]] == [h.tolist() for h in heard]

    def test_time_is_shared_by_the_rounds(self):
        """A second call gets what the first left."""
        model = Model.of(tight())
        optimise, calls = self.sloppy(model)
        ticks = itertools.count(0, 2)
        solve_with_covers(
            optimise, self.task(model, time_limit_s=7.0), clock=lambda: float(next(ticks))
        )
        assert [5.0, 3.0] == [c.time_limit_s for c in calls[:2]]
