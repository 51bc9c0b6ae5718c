"""Input Grams: they give the output error of any change of a weight, for every kind of layer."""

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Rounding, Scheme
from bitquota.models.discovery import discover
from bitquota.models.layout import to_matrix
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.weights import fake_quantize
from sensitivity_networks import Attention, Residual, build, samples

LAYERS = {
    "linear": (nn.Linear(5, 4), (3, 6, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2, padding="same", dilation=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 5, 4, 6)),
    "transposed1d": (nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, groups=2), (2, 6, 5)),
    "transposed2d": (
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 4),
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 2, 2, dilation=2), (2, 2, 3, 3, 3)),
}


class TestInputGrams:
    @pytest.mark.parametrize("name", LAYERS)
    def test_give_the_output_error_of_any_change(self, name):
        """Sum of e G e^T over output channels is the squared change of the output."""
        layer, shape = LAYERS[name]
        generator = torch.Generator().manual_seed(0)
        module = nn.Sequential(layer).double()
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        inventory = discover(module, (x,))
        gram = input_grams(module, inventory, [(x[:1],), (x[1:],)])["0"]
        change = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            before = module(x)
            layer.weight += change
            moved = float((module(x) - before).square().sum())
        rows = to_matrix(change, inventory.layers[0])
        grouped = rows.reshape(len(gram), -1, rows.shape[1])
        predicted = torch.einsum("grc,gcd,grd->", grouped, gram, grouped)
        assert moved == pytest.approx(float(predicted), rel=1e-9)

    def test_leave_out_embeddings(self):
        """Looking up is no product with rows."""
        module = build(Attention)
        data = samples(Attention)
        grams = input_grams(module, discover(module, data.inputs), [data.inputs])
        assert {"q", "k", "v", "o"} == set(grams)

    def test_projections_of_fused_attention(self):
        """Torch's attention in eval mode hides none of its layers."""
        module = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
        inventory = discover(module, (x,))
        grams = input_grams(module, inventory, [(x,)])
        assert {layer.name for layer in inventory.layers} == set(grams)
        flat = x.double().reshape(-1, 8)
        (name,) = (layer.name for layer in inventory.layers if "in_proj" in layer.name)
        assert torch.allclose(flat.T @ flat, grams[name][0], rtol=1e-4, atol=1e-4)
        assert torch.backends.mha.get_fastpath_enabled()

    def test_only_the_layers_asked_for(self):
        """A Gram is large; it need not be kept for all layers."""
        module = build(Residual)
        data = samples(Residual)
        inventory = discover(module, data.inputs)
        assert ["inner"] == list(input_grams(module, inventory, [data.inputs], layers=["inner"]))

    def test_error_feedback_lowers_the_error_of_a_convolution(self):
        """The whole way: Gram of real inputs, rounding, output of the layer."""
        module = build(Residual)
        data = samples(Residual)
        inventory = discover(module, data.inputs)
        gram = input_grams(module, inventory, [data.inputs])["inner"]
        layer = inventory.layer("inner")
        kept = []
        hook = module.inner.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        module(*data.inputs)
        hook.remove()
        errors = []
        with torch.no_grad():
            exact, weight = module.inner(kept[0]), module.inner.weight.detach().clone()
            for rounding in Rounding:
                scheme = Scheme(rounding=rounding)
                module.inner.weight.copy_(fake_quantize(weight, layer, 3, scheme, inputs_gram=gram))
                errors.append(float((module.inner(kept[0]) - exact).square().sum()))
        assert errors[1] < 0.8 * errors[0]


class Sometimes(nn.Module):
    """Two layers that are given the same tensor, but not always, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        """Run."""
        other = x if x[0, 0] > 0 else x.clone().mul_(2)
        return self.a(x) + self.b(other) + self.c(x) + self.a(x)


class TestSharing:
    def test_layers_with_one_input_share_a_gram(self):
        """As each of them has by itself."""
        module, data = build(Attention), samples(Attention)
        inventory = discover(module, data.inputs)
        batches = [(data.inputs[0][:2],), (data.inputs[0][2:],)]
        together = input_grams(module, inventory, batches, shrunk=True)
        assert together["q"] is together["k"]
        assert together["q"] is together["v"]
        for name in ("q", "o"):
            alone = input_grams(module, inventory, batches, layers=[name], shrunk=True)
            assert torch.equal(alone[name], together[name])

    @pytest.mark.parametrize("signs", [(1, 1), (1, -1, 1), (-1, 1, 1), (-1, -1)])
    def test_layers_part_where_their_inputs_do(self, signs):
        """Also after they shared some batches, and where a layer is called twice."""
        module = Sometimes().eval()
        batches = [(k * torch.ones(2, 3) + torch.arange(3) * 0.1,) for k in signs]
        inventory = discover(module, batches[0])
        together = input_grams(module, inventory, batches)
        for name in "abc":
            alone = input_grams(module, inventory, batches, layers=[name])
            assert torch.allclose(alone[name], together[name])
        assert (together["b"] is together["c"]) == (min(signs) > 0)
