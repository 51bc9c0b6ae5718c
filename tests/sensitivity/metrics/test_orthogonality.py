import numpy as np
import pytest
import torch

from bitquota.candidates.budget import Budget
from bitquota.candidates.table import enumerate_candidates
from bitquota.errors import InvalidInput
from bitquota.search.baselines import size_only
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import Orthogonality
from bitquota.sensitivity.metrics.orthogonality import later_means, orthogonality
from bitquota.sensitivity.runners.make import make_runner
from bitquota.solver import build_problem, solve
from sensitivity_networks import Residual, build, inventory_of, samples

KL = loss_by_name("kl")


def prepare(chunk_size=99):
    module = build(Residual)
    inventory = inventory_of(module)
    runner = make_runner(
        module, inventory, samples(Residual), chunk_size=chunk_size, engine="eager"
    )
    return runner, enumerate_candidates(inventory, (2, 3, 4, 6))


def features(seed=0, shapes=((20, 5), (20, 3, 4), (20, 30))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class TestOrthogonalityFunction:
    def test_is_linear_cka(self):
        """‖F_iᵀ F_j‖² / (‖F_iᵀ F_i‖ ‖F_jᵀ F_j‖) from the features themselves."""
        given = features()
        found = orthogonality(given)
        flat = [f.reshape(20, -1).double() for f in given]
        centred = [f - f.mean(dim=0) for f in flat]
        for i, a in enumerate(centred):
            for j, b in enumerate(centred):
                expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
                assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-9)

    def test_is_one_on_the_diagonal_and_at_most_one(self):
        """Nothing is more alike to a layer than itself."""
        found = orthogonality(features())

        assert [1.0, 1.0, 1.0] == found.diagonal().tolist()
        assert bool((found <= 1.0).all())
        assert bool((found >= 0.0).all())

    def test_ignores_rotation_scale_and_shift(self):
        """Features that say the same are alike, however they say it."""
        (one,) = features(shapes=((20, 5),))
        turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))

        assert float(orthogonality([one, 3.0 * one @ turn + 7.0])[0, 1]) == pytest.approx(1.0)

    def test_a_constant_feature_is_alike_to_none(self):
        """It has no direction."""
        found = orthogonality([torch.ones(20, 3), *features()])

        assert [1.0, 0.0, 0.0, 0.0] == found[0].tolist()


class TestLaterMeans:
    def test_go_over_a_layer_and_those_behind_it(self):
        """Whatever the order in which layers are listed; by hand."""
        values = np.array([[3.0, 1.0, 8.0]])
        turns = np.array([1.0, 2.0, 0.0])  # the last one listed runs first
        assert [[2.0, 1.0, 4.0]] == later_means(values, turns).tolist()


class TestOrthogonality:
    def test_scores_are_theta_times_spared_bits(self):
        """(32 - b) times the mean of exp(-β γ) over a layer and those that run after it.

        γ from block outputs after addition and ReLU.
        """
        runner, table = prepare()
        module, x = runner.module, runner.calibration.inputs[0]
        with torch.no_grad():
            stem = module.act(module.norm(module.stem(x)))
            inner = module.act(module.inner_norm(module.inner(stem.clone())))
            block = inner + module.side(stem)
            head = module.head(block.mean(dim=(2, 3)))
        # side runs last before the head: its feature is what goes into the head.
        similar = orthogonality([stem, inner, block.mean(dim=(2, 3)), head])
        theta = torch.exp(-0.3 * (similar.sum(dim=1) - 1)).numpy()
        weights = [theta[k:].mean() for k in range(4)]  # stem, inner, side, head, as they run

        matrix = Orthogonality(beta=0.3).measure(runner, table, KL)

        expected = np.outer(weights, 32 - np.array([2, 3, 4, 6])).ravel()
        np.testing.assert_allclose(matrix.diagonal, expected, rtol=1e-5)

    @pytest.mark.parametrize("text", ["2.5 bits", "3 bits", "4.2 bits"])
    def test_without_beta_it_is_size_only(self, text):
        """Every θ is one: the same optimum as filling the smallest layers first."""
        runner, table = prepare()
        budget = Budget.parse(text, runner.inventory)
        metric = Orthogonality(beta=0.0).measure(runner, table, KL)
        values = []
        for matrix in (metric, size_only(table)):
            choice = solve(build_problem(matrix, [budget]), gap=0.0).choice
            values.append(size_only(table).predict(choice))

        assert values[0] == pytest.approx(values[1])

    def test_small_beta_converges_to_it(self):
        """β = 1e-9, as one released script has it, is indistinguishable."""
        tiny = Orthogonality(beta=1e-9).measure(*prepare(), KL).diagonal
        none = Orthogonality(beta=0.0).measure(*prepare(), KL).diagonal

        np.testing.assert_allclose(tiny, none, rtol=1e-8)

    def test_chunks_give_a_standard_error(self):
        """One chunk has none."""
        assert (Orthogonality().measure(*prepare(), KL).diagonal_error == 0).all()
        assert (Orthogonality().measure(*prepare(4), KL).diagonal_error > 0).all()

    @pytest.mark.parametrize("beta", [-0.1, float("inf"), float("nan")])
    def test_refuses_an_odd_beta(self, beta):
        """Negative and infinite ones make no importance."""
        with pytest.raises(InvalidInput, match="beta must be finite"):
            Orthogonality(beta=beta)
