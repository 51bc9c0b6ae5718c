"""Moved weights: what they minimise, and when there is nothing to move."""

from __future__ import annotations

import pytest
import torch

from bitquota.errors import InvalidInput
from bitquota.quantizers import qep
from bitquota.quantizers.qep import Propagation, propagated
from refusals import refused


def changed_inputs(seed: int = 0):
    """Return inputs and what an earlier layer's quantization made of them, f64[n, 12] each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    mixing = torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)
    noise = 0.1 * torch.randn(300, 12, generator=generator, dtype=torch.float64)
    return x, x @ mixing.double() + noise


def weights():
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


class TestPropagated:
    def test_undamped_and_whole_it_is_least_squares(self, monkeypatch):
        """The best weights for the changed inputs, as a solver of least squares finds them."""
        monkeypatch.setattr(qep, "STRENGTH", 1.0)
        monkeypatch.setattr(qep, "DAMPING", 1e-14)
        x, y = changed_inputs()
        expected = torch.linalg.lstsq(y, x @ weights().T).solution.T
        assert torch.allclose(expected, propagated(weights(), y.T @ y, x.T @ y), rtol=1e-9)

    def test_lowers_the_output_error(self):
        """With the constants that ship, on the data and on other data of the same kind."""
        x, y = changed_inputs()
        moved = propagated(weights(), y.T @ y / 300, x.T @ y / 300)
        for a, b in (changed_inputs(), (2 * x.roll(1, 0), 2 * y.roll(1, 0))):
            target = a @ weights().T
            before = (target - b @ weights().T).square().sum()
            assert (target - b @ moved.T).square().sum() < 0.5 * before

    def test_inputs_that_did_not_change(self):
        """Weights stay."""
        x, _ = changed_inputs()
        assert torch.equal(weights(), propagated(weights(), x.T @ x, x.T @ x))

    def test_no_input_at_all(self):
        """Nor do they where the layer saw only zeros."""
        zeros = torch.zeros(12, 12)
        assert torch.equal(weights(), propagated(weights(), zeros, zeros))

    def test_groups_of_rows(self):
        """A Gram per group equals each group alone."""
        (x, y), (u, v) = changed_inputs(0), changed_inputs(1)
        grams, crosses = torch.stack([y.T @ y, v.T @ v]), torch.stack([x.T @ y, u.T @ v])
        parts = [propagated(weights()[3 * k : 3 * k + 3], grams[k], crosses[k]) for k in (0, 1)]
        assert torch.allclose(torch.cat(parts), propagated(weights(), grams, crosses))

    @pytest.mark.parametrize("shape", [(5, 5), (4, 12, 12)])
    def test_shapes_that_do_not_fit(self, shape):
        """Both are named."""
        gram = torch.ones(shape)
        with refused(InvalidInput, gram_hat=list(shape), cross=list(shape)):
            propagated(weights(), gram, gram)


class TestPropagation:
    def test_some_rows_are_those_of_the_whole(self):
        x, y = changed_inputs()
        gram, cross = (y.T @ y)[None], (x.T @ y)[None]
        whole, apart = propagated(weights(), gram, cross), Propagation(gram, cross)
        assert torch.allclose(whole[:2], apart.of(weights()[:2]), rtol=1e-10)
        assert torch.allclose(whole[2:], apart.of(weights()[2:]), rtol=1e-10)

    def test_no_input_at_all(self):
        zeros = torch.zeros(1, 12, 12)
        assert torch.equal(weights(), Propagation(zeros, zeros).of(weights()))
