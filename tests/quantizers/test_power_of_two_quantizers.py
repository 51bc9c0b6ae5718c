"""Power-of-two quantizers have the gradients of Uhlich et al. 2020, by case and by number."""

import pytest
import torch

from bitquota.quantizers.power_of_two import PowerOfTwoForm, PowerOfTwoQuantizer


def gradients(quantizer, x):
    """Return the gradients to both parameters and to x."""
    value = torch.tensor(x, requires_grad=True)
    quantizer.zero_grad()
    quantizer(value).backward()
    return quantizer.first.grad.item(), quantizer.second.grad.item(), value.grad.item()


class TestPowerOfTwoQuantizer:
    def test_is_equation_4(self):
        """Nearest power of two in the logarithm, no zero."""
        quantizer = PowerOfTwoQuantizer(1.0, 3)  # 2^-3 .. 1
        x = torch.tensor([-9.0, -0.3, 0.01, 0.0, 0.5, 0.72])
        expected = [-1.0, -0.25, 0.125, 0.125, 0.5, 1.0]
        assert expected == quantizer(x).tolist()

    def test_with_zero_small_values_vanish(self):
        """One code stands for exact zero."""
        quantizer = PowerOfTwoQuantizer(1.0, 3, with_zero=True, signed=False)
        x = torch.tensor([-9.0, 0.05, 0.1, 0.3])
        assert [0.0, 0.0, 0.125, 0.25] == quantizer(x).tolist()

    def test_p3_gradients(self):
        """Equation 6: (1, 0), (0, 0), (0, 1) in the three regions."""
        quantizer = PowerOfTwoQuantizer(1.0, 3, power_of_two_ends=False)
        assert (-1.0, 0.0, 0.0) == pytest.approx(gradients(quantizer, -0.01))
        assert (0.0, 1.0, 0.0) == pytest.approx(gradients(quantizer, 9.0))
        assert (0.0, 0.0, 0.25 / 0.3) == pytest.approx(gradients(quantizer, 0.3))

    @pytest.mark.parametrize("form", [PowerOfTwoForm.BITS_LARGEST, PowerOfTwoForm.BITS_SMALLEST])
    def test_p1_and_p2_are_coupled(self, form):
        """Some value moves both parameters at once."""
        quantizer = PowerOfTwoQuantizer(1.0, 3, form, power_of_two_ends=False)
        both = [g for x in (0.01, 9.0) if all((g := gradients(quantizer, x))[:2])]
        assert both

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_bits_follow_from_the_ends(self, bits):
        """The inverse of how the ends were made."""
        assert bits == PowerOfTwoQuantizer(1.0, bits).bits().item()

    def test_all_forms_start_alike(self):
        """Only what is learned differs."""
        x = torch.linspace(-2, 2, 41)
        outputs = [PowerOfTwoQuantizer(1.0, 3, form)(x) for form in PowerOfTwoForm]
        assert torch.allclose(outputs[0], outputs[1])
        assert torch.allclose(outputs[0], outputs[2])
