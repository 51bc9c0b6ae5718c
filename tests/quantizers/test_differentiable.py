"""Differentiable quantizers: the gradients of Uhlich et al. 2020, by case and by number."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquota.errors import InvalidInput
from bitquota.quantizers.differentiable import (
    UniformForm,
    UniformQuantizer,
    binary,
    lsq,
    ste_ceil,
    ste_round,
)

STEP, BITS = 0.3, 4
LARGEST = 7 * STEP
INSIDE, OUTSIDE = 0.77, -5.0


def gradients(quantizer, x):
    """Return the gradients to both parameters and to x."""
    value = torch.tensor(x, requires_grad=True)
    quantizer.zero_grad()
    quantizer(value).backward()
    return quantizer.first.grad.item(), quantizer.second.grad.item(), value.grad.item()


class TestSteRounding:
    @pytest.mark.parametrize(("function", "expected"), [(ste_round, 1.0), (ste_ceil, 1.0)])
    def test_rounds_with_gradient_one(self, function, expected):
        """Forward is a staircase, backward the identity."""
        x = torch.tensor(0.7, requires_grad=True)
        y = function(x)
        y.backward()
        assert expected == pytest.approx(y.item(), abs=1e-6)
        assert 1.0 == x.grad.item()


class TestUniformQuantizer:
    def test_is_equation_1(self):
        """Nearest multiple of the step, clipped to the range."""
        quantizer = UniformQuantizer(STEP, BITS)
        x = torch.tensor([-9.0, -0.4, 0.1, 0.5, 2.0, 9.0])
        expected = torch.tensor([-2.1, -0.3, 0.0, 0.6, 2.1, 2.1])
        assert torch.allclose(expected, quantizer(x))

    def test_u3_gradients(self):
        """Bounded and decoupled (Uhlich et al. 2020, arXiv 1905.11452)."""
        quantizer = UniformQuantizer(STEP, BITS)
        error = (quantizer(torch.tensor(INSIDE)) - INSIDE).item()
        inside, outside = gradients(quantizer, INSIDE), gradients(quantizer, OUTSIDE)
        assert (error / STEP, 0.0, 1.0) == pytest.approx(inside, abs=1e-6)
        assert (0.0, -1.0, 0.0) == pytest.approx(outside, abs=1e-6)

    def test_u1_gradients(self):
        """The gradient to the bits grows as 2^b."""
        quantizer = UniformQuantizer(STEP, BITS, UniformForm.BITS_STEP)
        error = (quantizer(torch.tensor(INSIDE)) - INSIDE).item()
        inside, outside = gradients(quantizer, INSIDE), gradients(quantizer, OUTSIDE)
        assert (0.0, error / STEP, 1.0) == pytest.approx(inside, abs=1e-6)
        assert (-8 * math.log(2) * STEP, -7.0, 0.0) == pytest.approx(outside, abs=1e-5)

    def test_u2_gradients(self):
        """The gradient to the bits varies with the bits."""
        quantizer = UniformQuantizer(STEP, BITS, UniformForm.BITS_RANGE)
        error = (quantizer(torch.tensor(INSIDE)) - INSIDE).item()
        inside, outside = gradients(quantizer, INSIDE), gradients(quantizer, OUTSIDE)
        bits = -(8 * math.log(2) / 7) * error
        assert (bits, error / LARGEST, 1.0) == pytest.approx(inside, abs=1e-6)
        assert (0.0, -1.0, 0.0) == pytest.approx(outside, abs=1e-6)

    @given(x=st.floats(-50, 50), step=st.floats(0.01, 2.0), bits=st.integers(2, 8))
    def test_u3_gradients_are_bounded(self, x, step, bits):
        """Half a step and one, whatever the values; U1's are not."""
        first, second, _ = gradients(UniformQuantizer(step, bits), x)
        assert abs(first) <= 0.5 + 1e-3
        assert abs(second) <= 1.0
        assert first == 0 or second == 0

    def test_the_gauss_newton_matrix_of_u3_is_diagonal(self):
        """E[g g^T] on Gaussian data, as the paper argues; U1's is not."""
        x = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
        off = {}
        for form in (UniformForm.STEP_RANGE, UniformForm.BITS_STEP):
            rows = torch.tensor([gradients(UniformQuantizer(0.2, 3, form), v)[:2] for v in x])
            second = rows.T @ rows / len(rows)
            off[form] = abs(second[0, 1]) / (second[0, 0] * second[1, 1]).sqrt()
        assert 0.0 == off[UniformForm.STEP_RANGE]
        assert off[UniformForm.BITS_STEP] > 0.1

    @pytest.mark.parametrize(("ratio", "bits"), [(1, 2), (3, 3), (7, 4), (127, 8)])
    def test_bits_follow_from_range_and_step(self, ratio, bits):
        """Signed widths of Uhlich et al. 2020: q_max / d of 1, 3, 7, 127 is 2, 3, 4, 8 bits."""
        quantizer = UniformQuantizer(0.1, 4)
        quantizer.second.data.fill_(0.1 * ratio)
        assert bits == quantizer.bits().item()

    def test_bits_have_the_paper_s_gradient(self):
        """db/dd = -r / (d ln2 (r+1)), db/dq_max = 1 / (ln2 (q_max + d))."""
        quantizer = UniformQuantizer(STEP, BITS)
        quantizer.bits().backward()
        assert -7 / (STEP * math.log(2) * 8) == pytest.approx(quantizer.first.grad.item(), rel=1e-5)
        expected = 1 / (math.log(2) * (LARGEST + STEP))
        assert expected == pytest.approx(quantizer.second.grad.item(), rel=1e-5)

    def test_unsigned_replaces_the_relu(self):
        """Negative values are zero, and one bit more is left for the others."""
        quantizer = UniformQuantizer(0.5, 2, signed=False)
        assert [0.0, 0.5, 1.5] == quantizer(torch.tensor([-3.0, 0.4, 9.0])).tolist()
        assert 2 == quantizer.bits().item()

    def test_power_of_two_steps(self):
        """D is rounded in the forward pass; its gradient is scaled by at most sqrt 2."""
        quantizer = UniformQuantizer(0.3, 4, power_of_two_step=True)
        assert 0.25 == quantizer.grid()[0].item()
        quantizer.grid()[0].backward()
        assert 0.25 / 0.3 == pytest.approx(quantizer.first.grad.item(), rel=1e-5)

    def test_clips_gradients_to_the_step(self):
        """Both by d, not by q_max."""
        quantizer = UniformQuantizer(STEP, BITS)
        quantizer.first.grad, quantizer.second.grad = torch.tensor(-9.0), torch.tensor(9.0)
        quantizer.clip_gradients()
        clipped = quantizer.first.grad.item(), quantizer.second.grad.item()
        assert (-STEP, STEP) == pytest.approx(clipped)

    def test_projects_into_the_box(self):
        """A step above the range is swapped with it."""
        quantizer = UniformQuantizer(STEP, BITS)
        quantizer.first.data.fill_(500.0)
        quantizer.second.data.fill_(1e-9)
        quantizer.project()
        assert 2.0**-8 == quantizer.first.item()
        assert 127.0 == quantizer.second.item()

    def test_refuses_fewer_than_two_signed_bits(self):
        """One signed bit would have zero levels."""
        with pytest.raises(InvalidInput, match="at least 2 bits"):
            UniformQuantizer(0.1, 1)


class TestLsq:
    def test_gradient_to_the_step_is_equation_3(self):
        """Q - v inside, the end level outside, times the gradient scale."""
        for value, expected in ((0.77, 3 - 0.77 / 0.3), (9.0, 7.0), (-9.0, -8.0)):
            step = torch.tensor(0.3, requires_grad=True)
            lsq(torch.tensor(value), step, -8, 7, gradient_scale=0.5).backward()
            assert 0.5 * expected == pytest.approx(step.grad.item(), rel=1e-4)

    def test_gradient_to_the_weight_stops_outside(self):
        """Straight-through inside the grid only."""
        x = torch.tensor([0.5, 9.0, -9.0], requires_grad=True)
        lsq(x, torch.tensor(0.3), -8, 7).sum().backward()
        assert [1.0, 0.0, 0.0] == x.grad.tolist()

    def test_a_negative_step_turns_the_grid_around(self):
        """The extra level serves the positive side."""
        assert 2.4 == pytest.approx(lsq(torch.tensor(9.0), torch.tensor(-0.3), -8, 7).item())


class TestBinary:
    def test_gives_signs(self):
        """Two values, zero counted as positive."""
        x = torch.tensor([-3.0, 0.0, 0.1])
        assert [-0.5, 0.5, 0.5] == binary(x, torch.tensor(0.5)).tolist()
