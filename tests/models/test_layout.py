"""Layouts: one row per output channel for every kind of layer, and exactly back."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.layers import LayerKind
from bitquota.errors import InvalidModel
from bitquota.models.layout import from_matrix, to_matrix
from layer_shapes import LAYERS, layer_of
from refusals import refused


class TestToMatrix:
    @pytest.mark.parametrize("kind", LayerKind)
    def test_is_undone_by_from_matrix(self, kind):
        """The way back gives the same tensor, bit for bit, contiguous."""
        layer = LAYERS[kind]
        weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0))
        back = from_matrix(to_matrix(weight, layer), layer)
        assert torch.equal(weight, back)
        assert back.is_contiguous()

    def test_a_row_holds_everything_of_one_output_channel_of_a_transposed_convolution(self):
        """Zeroing one row silences exactly that output channel, groups included."""
        module = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
        layer = layer_of(LayerKind.CONV_TRANSPOSE2D, module.weight.shape, groups=2)
        matrix = to_matrix(module.weight.detach(), layer).clone()
        matrix[3] = 0
        module.weight.data = from_matrix(matrix, layer)
        out = module(torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0)))
        silent = [c for c in range(4) if not out[:, c].abs().max() > 0]
        assert [3] == silent

    def test_a_row_of_experts_is_one_output_of_one_expert(self):
        """Experts stored [expert, in, out] are turned so that rows are outputs."""
        weight = torch.arange(24.0).reshape(2, 3, 4)
        layer = layer_of(LayerKind.EXPERTS, (2, 3, 4), transposed=True)
        assert (8, 3) == (layer.rows, layer.columns)
        assert torch.equal(weight[1, :, 2], to_matrix(weight, layer)[1 * 4 + 2])

    def test_a_linear_transposed_row_multiplies_the_input(self):
        """The output of a Conv1D layer is x times the transposed matrix."""
        weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
        layer = layer_of(LayerKind.LINEAR_TRANSPOSED, (5, 7))
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(x @ weight, functional.linear(x, to_matrix(weight, layer)))

    def test_keeps_gradients(self):
        """Training reads weights through the matrix."""
        weight = torch.randn(4, 3, 2, 2, requires_grad=True)
        to_matrix(weight, layer_of(LayerKind.CONV2D, (4, 3, 2, 2))).sum().backward()
        assert torch.equal(torch.ones(4, 3, 2, 2), weight.grad)

    def test_refuses_another_shape(self):
        """A weight that changed since discovery is named."""
        layer = layer_of(LayerKind.LINEAR, (4, 3))
        with refused(InvalidModel, layer="layer", shape=[3, 4]):
            to_matrix(torch.zeros(3, 4), layer)


class TestFromMatrix:
    def test_refuses_another_shape(self):
        """A matrix of another layer is named."""
        layer = layer_of(LayerKind.LINEAR, (4, 3))
        with pytest.raises(InvalidModel, match="must be 4 x 3"):
            from_matrix(torch.zeros(3, 4), layer)
