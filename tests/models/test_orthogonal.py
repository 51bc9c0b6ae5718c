"""Orthogonal matrices of few numbers."""

from __future__ import annotations

import pytest
import torch

from bitquota.models.orthogonal import Orthogonal


class TestAlong:
    @pytest.mark.parametrize("size", [1, 2, 7, 32, 48])
    def test_is_the_product_with_an_orthogonal_matrix(self, size):
        matrix = Orthogonal.drawn(size, 0)
        full = matrix.along(torch.eye(size, dtype=torch.float64), 1)
        assert torch.allclose(full @ full.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        x = torch.randn(3, 2 * size, 5, dtype=torch.float64)
        blocks = x.reshape(3, 2, size, 5)
        expected = torch.einsum("abnc,nm->abmc", blocks, full).reshape(x.shape)
        assert torch.allclose(matrix.along(x, 1), expected, atol=1e-12)
        assert torch.allclose(matrix.along(x.float(), 1), expected.float(), atol=1e-5)

    def test_of_a_power_of_two_is_a_hadamard_matrix_with_signs(self):
        """Known in closed form: all entries have the size 1 / sqrt(n), rows of H alternate."""
        matrix = Orthogonal.drawn(4, 3)
        full = matrix.along(torch.eye(4, dtype=torch.float64), 1) * 2
        hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
        expected = matrix.signs[:, None] * hadamard * float(matrix.odd)
        assert torch.allclose(full, expected.double(), atol=1e-12)

    def test_other_lengths_are_refused(self):
        with pytest.raises(RuntimeError):
            Orthogonal.drawn(8, 0).along(torch.ones(3, 12), 1)

    @pytest.mark.parametrize(("q", "n"), [(0, 0), (1, 0), (3, 8), (3, 9), (1, 6)])
    def test_sizes_belong_together(self, q, n):
        with pytest.raises(ValueError, match="signs"):
            Orthogonal(odd=torch.eye(q, dtype=torch.float64), signs=torch.ones(n))

    def test_drawn_alike_by_one_seed(self):
        one, two, other = (Orthogonal.drawn(24, seed) for seed in (1, 1, 2))
        assert torch.equal(one.odd, two.odd)
        assert torch.equal(one.signs, two.signs)
        assert not torch.equal(one.signs, other.signs)
