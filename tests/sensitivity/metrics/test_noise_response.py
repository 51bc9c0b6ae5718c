"""The loss's answer to noise in one layer at a time (HIGGS)."""

import numpy as np
import pytest
import torch

from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import NoiseResponse, RelativeWeightMse
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Branches, build, inventory_of, samples, table_of

MSE = loss_by_name("mse")


def measured(metric, change=None, chunk_size=99):
    """Return the matrix of a metric: two linear layers whose outputs add, squared error."""
    module = build(Branches)
    if change is not None:
        change(module)
    inventory = inventory_of(module)
    runner = make_runner(
        module, inventory, samples(Branches), chunk_size=chunk_size, engine="eager"
    )
    return runner, metric.measure(runner, table_of(inventory), MSE)


class TestNoiseResponse:
    def test_is_the_relative_error_times_the_slope(self):
        """On a quadratic loss the slope is exact: the increase of one size over its square."""
        runner, matrix = measured(NoiseResponse())
        relative = measured(RelativeWeightMse())[1].diagonal.reshape(2, 2)
        alphas = matrix.provenance["metric"]["alpha"]
        found = np.array([alphas["left"], alphas["right"]])
        np.testing.assert_allclose(
            matrix.diagonal.reshape(2, 2), found[:, None] * relative, rtol=1e-6
        )
        # By hand, with a size of its own: |x (e / |e|)|^2 |W|^2 per sample, e the noise.
        x = runner.calibration.inputs[0]
        for name, alpha in alphas.items():
            weight = getattr(runner.module, name).weight
            moved = _noise(runner, name, size=0.02)
            increase = (x @ moved.T).square().mean()
            assert alpha == pytest.approx(float(increase) / 0.02**2, rel=1e-3)
            assert moved.norm() == pytest.approx(0.02 * float(weight.detach().norm()), rel=1e-4)

    def test_does_not_depend_on_scale_alone(self):
        """Twice the weights of a layer: the same relative error, four times the answer."""
        plain = measured(NoiseResponse())[1].diagonal
        double = measured(NoiseResponse(), lambda m: m.left.weight.data.mul_(2.0))[1].diagonal
        assert double[:2] == pytest.approx(4 * plain[:2], rel=1e-3)
        assert double[2:] == pytest.approx(plain[2:], rel=1e-3)

    def test_chunks_give_a_standard_error(self):
        """One chunk has none."""
        assert (measured(NoiseResponse())[1].diagonal_error == 0).all()
        assert (measured(NoiseResponse(), chunk_size=4)[1].diagonal_error > 0).all()


def _noise(runner, name, size):
    import zlib

    weight = runner.weights.original(name).detach()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(weight.shape, generator=generator)
    return size * weight.norm() / noise.norm() * noise
