import itertools

import numpy as np
import pytest

from bitquota.context import Context, MemoryLedger
from bitquota.errors import Infeasible, InvalidInput
from bitquota.search.neighborhood import Limits
from bitquota.search.refine import RefineSettings, refine
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.gram import measure_differences
from bitquota.sensitivity.measures.pairs import measure_singles
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")
WIDTHS = (2, 3, 4, 8)


def brute_force(matrix, limits):
    """Solve by enumeration."""
    table = matrix.table
    counts = np.diff(table.offsets)
    choices = itertools.product(*(range(int(c)) for c in counts))
    inside = [c for c in choices if limits.allow(table, c)]
    return min(inside, key=lambda c: (matrix.predict(c), c), default=None)


def setting(bits=3.0, n=24, seed=0):
    module = build(Residual, seed)
    inventory = inventory_of(module)
    table = table_of(inventory, WIDTHS)
    runner = make_runner(module, inventory, samples(Residual, n), engine="eager", chunk_size=24)
    limits = Limits(costs=table.costs("code_bits")[None], limits=[int(bits * inventory.n_weights)])
    return runner, table, limits


class TestRefine:
    @pytest.mark.parametrize("seed", range(4))
    def test_ends_near_the_true_optimum(self, seed):
        """Against the measured loss of every feasible choice of a small network."""
        runner, table, limits = setting(seed=seed)
        every = [c for c in itertools.product(range(4), repeat=4) if limits.allow(table, c)]
        losses = measure_choices(runner, table, KL, every).mean(axis=1)

        found = refine(
            runner, table, KL, limits=limits, solve=brute_force, starts={"lowest": (0, 0, 0, 0)},
            settings=RefineSettings(accept_errors=0.0),
        )  # fmt: skip

        rank = int((losses < found.loss - 1e-12).sum())
        assert rank <= 0.02 * len(every)
        assert limits.allow(table, found.choice)

    def test_never_ends_worse_than_a_start(self):
        """Accepted steps improve; with no work allowed the best start is returned."""
        runner, table, limits = setting()
        starts = {"a": (0, 0, 0, 0), "b": (1, 1, 1, 1), "too large": (3, 3, 3, 3)}
        losses = measure_choices(runner, table, KL, [(0, 0, 0, 0), (1, 1, 1, 1)]).mean(axis=1)

        found = refine(runner, table, KL, limits=limits, solve=brute_force, starts=starts)
        lazy = refine(
            runner, table, KL, limits=limits, solve=lambda *_: None, starts=starts,
            settings=RefineSettings(iterations=0, swap_rounds=0),
        )  # fmt: skip

        assert found.loss <= lazy.loss <= losses.min() + 1e-12
        assert all(s.gain > s.gain_error for s in found.steps[1:] if s.accepted)
        assert (3, 3, 3, 3) not in found.measured

    def test_a_judge_decides(self):
        """With hold-out samples the reported loss is theirs."""
        runner, table, limits = setting()
        holdout = make_runner(
            build(Residual), runner.inventory, samples(Residual, 16, seed=9), engine="eager"
        )
        found = refine(
            runner, table, KL, limits=limits, solve=brute_force, starts={"s": (0, 0, 0, 0)},
            holdout=[holdout],
        )  # fmt: skip

        assert len(found.per_sample) == 16
        expected = measure_choices(holdout, table, KL, [found.choice])[0]
        np.testing.assert_array_equal(found.per_sample, expected)

    def test_more_samples_where_the_first_do_not_decide(self):
        """A second block is run only for choices that are close, and it counts."""
        runner, table, limits = setting()
        blocks = [
            make_runner(build(Residual), runner.inventory, samples(Residual, 16, seed=s),
                        engine="eager")
            for s in (8, 9)
        ]  # fmt: skip
        found = refine(
            runner, table, KL, limits=limits, solve=brute_force, starts={"s": (0, 0, 0, 0)},
            holdout=blocks, settings=RefineSettings(accept_errors=3.0),
        )  # fmt: skip
        calls = [block.passes.calls for block in blocks]

        assert 0 < calls[1] < calls[0]
        assert len(found.per_sample) in (16, 32)
        expected = [measure_choices(b, table, KL, [found.choice])[0] for b in blocks]
        np.testing.assert_array_equal(
            found.per_sample, np.concatenate(expected)[: len(found.per_sample)]
        )

    def test_far_first_then_near(self):
        """The first linearisation measures all rows on few samples, later ones the rows near by."""
        module = build(Residual)
        inventory = inventory_of(module)
        table = table_of(inventory, WIDTHS)
        runner = make_runner(module, inventory, samples(Residual, 24), chunk_size=6, engine="eager")
        limits = Limits(
            costs=table.costs("code_bits")[None], limits=[int(3.0 * inventory.n_weights)]
        )
        blind = measure_singles(runner, table, KL), None

        def only_near_plans(matrix, limits):
            return None if matrix.base_point is None else brute_force(matrix, limits)

        found = {}
        for iterations in (1, 8):
            found[iterations] = refine(
                runner, table, KL, limits=limits, solve=only_near_plans, first=blind,
                starts={"s": (0, 0, 0, 0)},
                settings=RefineSettings(iterations=iterations, swap_rounds=0, accept_errors=0.0),
            )  # fmt: skip
        far, near = found[1].last, found[8].last

        assert far.rows == tuple(range(16))
        assert far.point == (0, 0, 0, 0)
        assert [s.kind for s in found[1].steps] == ["start", "linearised"]
        assert near.point not in (None, far.point)
        for g, k in enumerate(near.point):
            rows = {int(r - table.offsets[g]) for r in near.rows if table.group_of_row[r] == g}
            assert rows == {r for r in range(4) if abs(r - k) <= 1}

    def test_begins_around_several_starts(self, monkeypatch):
        """All rows are measured around the best starts in turn, none around much worse ones."""
        runner, table, limits = setting(bits=4.0)
        around = []

        def watched(*args, **options):
            around.append((options["base_point"], tuple(options["only"])))
            return measure_differences(*args, **options)

        monkeypatch.setattr("bitquota.search.refine.measure_differences", watched)
        blind = measure_singles(runner, table, KL), None
        starts = {str(k): c for k, c in enumerate(itertools.product(range(2), repeat=4))}
        for wanted in (1, 3):
            around.clear()
            found = refine(
                runner, table, KL, limits=limits, solve=lambda *_: None, starts=starts, first=blind,
                settings=RefineSettings(iterations=3, starts=wanted, swap_rounds=0),
            )  # fmt: skip
            order = sorted(
                (c for c in starts.values() if c in found.measured), key=found.measured.get
            )
            promising = [c for c in order if found.measured[c] <= 2 * found.measured[order[0]]]
            assert len(promising) < len(order)
            everything = tuple(range(len(table.rows)))
            assert around[:wanted] == [(c, everything) for c in promising[:wanted]]
            assert all(point not in order[wanted:] for point, _ in around)

    def test_a_larger_budget_gives_a_start(self):
        """Its last linearisation proposes a choice within the smaller budget."""
        runner, table, limits = setting(bits=4.0)
        large = refine(
            runner, table, KL, limits=limits, solve=brute_force, starts={"s": (0, 0, 0, 0)}
        )
        _, _, smaller = setting(bits=3.0)
        found = refine(
            runner, table, KL, limits=smaller, solve=brute_force, starts={"s": (0, 0, 0, 0)},
            warm=large.last, settings=RefineSettings(iterations=0, swap_rounds=0),
        )  # fmt: skip
        inside = brute_force(large.last.matrix, smaller.only(large.last.rows))

        assert large.last.point is not None
        assert inside in found.measured
        assert smaller.allow(table, found.choice)

    def test_swaps_that_help_are_tried_together(self):
        """Two measured improvements in different groups are also measured as one step."""
        runner, table, limits = setting(bits=8.0)
        found = refine(
            runner, table, KL, limits=limits, solve=lambda *_: None, starts={"s": (0, 0, 0, 0)},
            first=(measure_singles(runner, table, KL), None),
            settings=RefineSettings(
                iterations=0, swap_rounds=1, swaps=66, accept_errors=1e9, effort=None
            ),
        )  # fmt: skip
        (step,) = [s for s in found.steps if s.kind == "swap"]

        together = [c for c in found.measured if sum(k > 0 for k in c) > 2]

        assert not step.accepted
        assert 1 <= len(together) <= 2
        alone = [c for c in found.measured if 0 < sum(k > 0 for k in c) <= 2]
        assert min(found.measured[c] for c in together) < min(found.measured[c] for c in alone)

    def test_effort_bounds_the_passes(self):
        """No linearisation or round of swaps begins beyond the limit; without one all are done."""
        module = build(Residual)
        inventory = inventory_of(module)
        table = table_of(inventory, WIDTHS)
        limits = Limits(
            costs=table.costs("code_bits")[None], limits=[int(3.0 * inventory.n_weights)]
        )
        kinds = {}
        for effort in (1e-3, None):
            runner = make_runner(module, inventory, samples(Residual, 24), engine="eager")
            first = measure_differences(runner, table, KL)
            found = refine(
                runner, table, KL, limits=limits, solve=brute_force, starts={"s": (0, 0, 0, 0)},
                first=first, settings=RefineSettings(effort=effort, least=0.0),
            )  # fmt: skip
            kinds[effort] = {step.kind for step in found.steps}

        assert kinds == {1e-3: {"start"}, None: {"start", "linearised", "swap"}}

    def test_counts_its_own_work_alone(self):
        """Runners that worked for another budget before have spent nothing of this one."""
        found = []
        for worked in (False, True):
            runner, table, limits = setting()
            holdout = make_runner(
                build(Residual), runner.inventory, samples(Residual, 12, seed=9), engine="eager"
            )
            first = measure_differences(runner, table, KL)
            if worked:
                measure_choices(holdout, table, KL, [(0, 0, 0, 0)] * 3)
                measure_choices(runner, table, KL, [(0, 0, 0, 0)] * 3)
            before = runner.passes.passes + holdout.passes.passes / 2
            result = refine(
                runner, table, KL, limits=limits, solve=brute_force, starts={"s": (0, 0, 0, 0)},
                first=first, holdout=[holdout, runner],
            )  # fmt: skip
            spent = runner.passes.passes + holdout.passes.passes / 2 - before
            found.append([step.passes for step in result.steps])
            assert found[-1][-1] == pytest.approx(spent)
        assert found[0] == pytest.approx(found[1], abs=2.0)

    def test_is_reproduced_from_the_ledger(self):
        """The second run gives the same steps without a pass apart from reference outputs."""
        ledger, results = MemoryLedger(), []
        for _ in range(2):
            runner, table, limits = setting()
            found = refine(
                runner, table, KL, limits=limits, solve=brute_force, starts={"s": (0, 0, 0, 0)},
                context=Context(ledger=ledger),
            )  # fmt: skip
            results.append((found, runner.passes.passes))
        (one, passes), (two, again) = results

        assert [s.choice for s in one.steps] == [s.choice for s in two.steps]
        assert one.per_sample.tobytes() == two.per_sample.tobytes()
        assert again <= 1 < passes

    def test_no_start_within_the_limits(self):
        """A clear error instead of a plan over budget."""
        runner, table, _ = setting()
        none = Limits(costs=table.costs("code_bits")[None], limits=[1])
        with pytest.raises(Infeasible, match="within the limits"):
            refine(runner, table, KL, limits=none, solve=brute_force, starts={"s": (0, 0, 0, 0)})


class TestRefineSettings:
    @pytest.mark.parametrize("bad", [{"radii": ()}, {"radii": (2.0,)}, {"iterations": -1}])
    def test_ranges(self, bad):
        """Impossible settings are refused."""
        with pytest.raises(InvalidInput):
            RefineSettings(**bad)
