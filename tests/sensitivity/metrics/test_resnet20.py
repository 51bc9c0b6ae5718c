"""The trained ResNet-20: what metrics are known to do there."""

import sys
from functools import cache

import numpy as np
import pytest

from bitquota.candidates.table import enumerate_candidates
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.search.agreement import spearman
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.pairs import measure_singles
from bitquota.sensitivity.metrics import METRICS, HessianTrace, find_flags
from bitquota.sensitivity.runners.make import make_runner

pytestmark = [pytest.mark.shared_data, pytest.mark.slow]
KL = loss_by_name("kl")


@pytest.fixture(scope="module")
def resnet(repository):
    """Return a runner on 64 images and the candidates of 3, 4, 5 and 8 bits."""
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        from resnet_cifar import images, load_resnet
    finally:
        sys.path.pop(0)
    module = load_resnet(20)
    x, y = images("calibration", 64)
    inventory = discover(module, (x[:2],))
    runner = make_runner(module, inventory, CalibrationSet(inputs=(x,), labels=y))
    return runner, enumerate_candidates(inventory, (3, 4, 5, 8))


@pytest.fixture(scope="module")
def matrix_by(resnet):
    """Return a function from a metric's name to its matrix, measured once."""
    return cache(lambda name: METRICS[name].measure(*resnet, KL))


class TestOnResNet20:
    def test_hessian_trace_ranks_like_one_layer_loss(self, resnet):
        """Rank correlation above 0.5 over all 80 candidates."""
        runner, table = resnet
        trace = HessianTrace(probes=4).measure(runner, table, KL)
        single = measure_singles(runner, table, KL)

        assert spearman(trace.diagonal, single.diagonal) > 0.5

    def test_metrics_that_look_at_the_error_rank_plans(self, resnet, matrix_by):
        """Twelve random plans: predicted and measured order agree; importances are not asked."""
        runner, table = resnet
        generator = np.random.default_rng(1)
        plans = [tuple(int(generator.integers(4)) for _ in range(20)) for _ in range(12)]
        measured = measure_choices(runner, table, KL, plans).mean(axis=1)
        found = {}
        for name in ("relative_mse", "empirical_fisher", "output_fisher", "kronecker", "gpfq"):
            matrix = matrix_by(name)
            found[name] = spearman([matrix.predict(p) for p in plans], measured)

        assert all(value > 0.3 for value in found.values()), found

    def test_weight_errors_are_monotone(self, matrix_by):
        """A finer grid is never worse for the weights; GPFQ keeps that on this network."""
        for name in ("relative_mse", "weight_mse", "gpfq"):
            assert () == find_flags(matrix_by(name))
