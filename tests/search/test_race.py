"""A race drops what is clearly worse, never the best, and saves the samples of the others."""

import numpy as np
import pytest

from bitquota.search.race import leader, race, survivors
from bitquota.search.validation import HoldOut
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")
PROPOSALS = {
    (0, 0, 0, 0): "lowest", (1, 1, 1, 1): "highest", (0, 1, 1, 1): "a", (1, 1, 1, 0): "b",
    (1, 0, 0, 0): "c", (0, 0, 0, 1): "d",
}  # fmt: skip


@pytest.fixture
def holdout():
    module = build(Residual)
    inventory = inventory_of(module)
    runner = make_runner(
        module, inventory, samples(Residual, 128), engine="eager", chunk_size=32
    )  # fmt: skip
    return HoldOut(blocks=(runner,), table=table_of(inventory), loss=KL)


class TestRace:
    def test_ends_with_the_best_of_all(self, holdout):
        """Those that are left have the losses that measuring everything gives them."""
        alive = race(holdout, PROPOSALS, keep=1)

        truth = measure_choices(holdout.runner(0), holdout.table, KL, list(PROPOSALS))
        means = dict(zip(PROPOSALS, truth.mean(axis=1), strict=True))
        assert min(means, key=means.get) == alive[0]
        for choice in alive:
            whole = truth[list(PROPOSALS).index(choice)]
            np.testing.assert_array_equal(whole, holdout.per_sample(choice))

    def test_saves_samples(self, holdout):
        """At most half of the choices see the second quarter of the samples."""
        race(holdout, PROPOSALS, keep=1)

        assert 6 * 32 + 3 * 32 + 2 * 64 >= holdout.asked
        assert holdout.runner(0).passes.passes <= 1 + holdout.asked / 128 + 1e-9

    def test_keeps_as_many_as_are_asked_for(self, holdout):
        alive = race(holdout, PROPOSALS, keep=4)
        assert len(alive) >= 4
        assert set(alive) == set(holdout.losses)


class TestSurvivors:
    def test_few_samples_drop_nobody(self):
        losses = {(k,): np.full(8, float(k)) for k in range(6)}
        assert [(k,) for k in range(6)] == survivors(losses, keep=1)

    def test_differences_are_paired(self):
        """What all choices share of a sample does not hide that one is always worse."""
        shared = np.random.default_rng(0).normal(0, 100, 64)
        losses = {
            (0,): shared, (1,): shared + 1, (2,): shared + np.tile([2.0, -1.9], 32),
        }  # fmt: skip
        assert [(0,), (2,)] == survivors(losses, keep=1)

    def test_at_most_half_stay(self):
        rng = np.random.default_rng(0)
        losses = {(k,): rng.normal(0, 1, 64) for k in range(9)}
        assert 5 >= len(survivors(losses, keep=1))


class TestLeader:
    def test_prefers_the_first_of_equals(self, holdout):
        """One that is better by less than the standard error does not displace it."""
        noise = np.tile([1.0, -1.0], 64)
        holdout.losses = {
            (0,): [np.ones(128)], (1,): [np.ones(128) + 0.2 * noise - 0.01],
            (2,): [np.ones(128) + 0.2 * noise + 0.5],
        }  # fmt: skip
        proposals = {(2,): "worse", (0,): "first", (1,): "lucky"}

        assert (0,) == leader(holdout, [(1,), (0,), (2,)], proposals)
