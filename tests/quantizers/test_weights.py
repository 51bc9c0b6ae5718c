"""Weights: codes fit their bits, the stored scale is the one that was used."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import (
    SMALL_SCALES,
    Granularity,
    Grid,
    Rounding,
    ScaleFormat,
    ScaleRule,
    Scheme,
    n_scales,
)
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.quantizers import weights
from bitquota.quantizers.parameters import SCALE_DTYPES
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.weights import fake_quantize, quantize
from layer_shapes import LAYERS, layer_of
from refusals import refused
from sensitivity_networks import inventory_of

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def random_matrix(rows=6, columns=20, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@st.composite
def schemes(draw):
    granularity = draw(st.sampled_from(Granularity))
    group_size = draw(st.integers(1, 9)) if granularity is Granularity.GROUP else None
    return Scheme(
        grid=draw(st.sampled_from((Grid.SYMMETRIC, Grid.ASYMMETRIC))),
        granularity=granularity,
        group_size=group_size,
        scale_rule=draw(st.sampled_from(ScaleRule)),
        scale_format=draw(st.sampled_from(sorted(set(ScaleFormat) - SMALL_SCALES))),
        row_alignment_bits=draw(st.sampled_from([0, 8, 16, 32, 64])),
    )


class TestQuantize:
    @given(
        scheme=schemes(),
        bits=st.sampled_from(BITS),
        rows=st.integers(1, 5),
        columns=st.integers(1, 12),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=80, deadline=None)
    def test_codes_and_zero_points_fit_their_bits(self, scheme, bits, rows, columns, seed):
        """For every scheme, shape and width, and as many scales as storage counts."""
        weight = quantize(random_matrix(rows, columns, seed), bits, scheme)
        if scheme.grid is Grid.ASYMMETRIC:
            assert 0 <= int(weight.codes.min())
            assert int(weight.codes.max()) < 2**bits
            assert int(weight.zero_points.max()) < 2**bits
            assert weight.zero_points.shape == weight.scales.shape
        elif bits == 1:
            assert set(weight.codes.unique().tolist()) <= {-1, 1}
        else:
            assert -(2 ** (bits - 1)) <= int(weight.codes.min())
            assert int(weight.codes.max()) < 2 ** (bits - 1)
        assert n_scales(rows, columns, scheme) == weight.scales.numel()
        assert SCALE_DTYPES[scheme.scale_format] == weight.scales.dtype
        assert (rows, columns) == tuple(weight.dequantize().shape)

    @pytest.mark.parametrize("scale_format", [ScaleFormat.FP16, ScaleFormat.BF16])
    def test_codes_are_nearest_for_the_stored_scale(self, scale_format):
        """Rounding the scale after choosing codes would leave codes that are not nearest."""
        matrix = random_matrix(40, 100)
        weight = quantize(matrix, 8, Scheme(scale_format=scale_format))
        scale = weight.scales.double()
        nearest = torch.round(matrix.double() / scale).clamp(-128, 127)
        assert torch.equal(nearest.int(), weight.codes)

    def test_the_full_signed_range_is_used(self):
        """A symmetric grid of b bits has 2^b codes, the lowest included."""
        codes = quantize(random_matrix(4, 2000), 3, Scheme()).codes
        assert list(range(-4, 4)) == codes.unique().tolist()

    def test_one_bit_keeps_signs(self):
        """The grid is {-1, +1}: neither all zero nor only negative."""
        matrix = random_matrix()
        back = quantize(matrix, 1, Scheme()).dequantize()
        assert torch.equal(matrix.sign(), back.sign())

    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    def test_more_bits_never_raise_the_squared_error(self, grid):
        """Least squares per channel, over all widths."""
        matrix = random_matrix(8, 64)
        errors = [
            float((quantize(matrix, b, Scheme(grid=grid)).dequantize() - matrix).square().sum())
            for b in BITS
        ]
        assert sorted(errors, reverse=True) == errors
        assert errors[-1] < 1e-6

    def test_finer_granularity_never_raises_the_squared_error(self):
        """Groups fit at least as well as channels, channels at least as well as the tensor."""
        matrix = random_matrix(8, 60) * torch.logspace(-2, 1, 8)[:, None]
        schemes_ = [
            Scheme(granularity=Granularity.TENSOR),
            Scheme(),
            Scheme(granularity=Granularity.GROUP, group_size=7),
        ]
        errors = [
            float((quantize(matrix, 4, s).dequantize() - matrix).square().sum()) for s in schemes_
        ]
        assert sorted(errors, reverse=True) == errors

    def test_a_group_sees_only_its_own_columns(self):
        """Quantizing a slice of columns alone gives the same codes; the last group is short."""
        matrix = random_matrix(3, 10)
        scheme = Scheme(granularity=Granularity.GROUP, group_size=4)
        whole = quantize(matrix, 3, scheme)
        alone = quantize(matrix[:, 8:], 3, scheme)
        assert torch.equal(alone.codes, whole.codes[:, 8:])
        assert torch.equal(alone.scales[:, 0], whole.scales[:, 2])

    def test_importance_moves_the_error_to_what_matters_less(self):
        """The weighted error falls where weights are given."""
        matrix = random_matrix(4, 50)
        importance = torch.cat([torch.full((25,), 100.0), torch.ones(25)])
        plain = quantize(matrix, 3, Scheme()).dequantize() - matrix
        weighted = quantize(matrix, 3, Scheme(), importance=importance).dequantize() - matrix
        assert float((importance * weighted**2).sum()) < float((importance * plain**2).sum())

    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    @pytest.mark.parametrize("bits", [1, 4, 16])
    def test_all_zero_weights_stay_zero(self, grid, bits):
        """No division by a scale of zero."""
        back = quantize(torch.zeros(2, 5), bits, Scheme(grid=grid)).dequantize()
        assert torch.equal(torch.zeros(2, 5), back)

    def test_scales_beyond_fp16_are_kept_finite(self):
        """Huge weights saturate instead of turning into infinity."""
        weight = quantize(torch.tensor([[1e9, -1e9]]), 2, Scheme(scale_format=ScaleFormat.FP16))
        assert bool(torch.isfinite(weight.dequantize()).all())

    @pytest.mark.parametrize("bits", [10, 9, 12, 32, -1])
    def test_refuses_a_width_off_the_list(self, bits):
        """Full precision is not a width to quantize to either."""
        with pytest.raises(InvalidInput, match="must be one of 1, 2, 3, 4, 5, 6, 7, 8, 16"):
            quantize(random_matrix(), bits, Scheme())

    def test_refuses_negative_importance(self):
        """A negative weight would reward errors."""
        with pytest.raises(InvalidInput, match="not negative"):
            quantize(random_matrix(), 4, Scheme(), importance=torch.tensor(-1.0))

    def test_refuses_importance_of_another_shape(self):
        """The shape is named."""
        with refused(InvalidInput, shape=[7]):
            quantize(random_matrix(), 4, Scheme(), importance=torch.ones(7))

    def test_refuses_weights_that_are_not_finite(self):
        """NaN has no nearest code."""
        with refused(InvalidModel, n_bad=1):
            quantize(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]), 4, Scheme())

    def test_refuses_a_tensor_that_is_no_matrix(self):
        """Layers are turned into matrices first."""
        with refused(InvalidInput, shape=[2, 3, 4]):
            quantize(torch.zeros(2, 3, 4), 4, Scheme())


class TestFakeQuantize:
    @pytest.mark.parametrize("kind", LayerKind)
    def test_rounds_each_output_channel_on_its_own(self, kind):
        """Scaling one output channel changes that channel alone, in every kind of layer."""
        layer = LAYERS[kind]
        weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0))
        once = fake_quantize(weight, layer, 3, Scheme())
        assert weight.shape == once.shape
        doubled = fake_quantize(weight * 2, layer, 3, Scheme())
        assert torch.allclose(once * 2, doubled, rtol=1e-5)

    def test_32_bits_is_the_weight_itself(self):
        """Full precision copies nothing."""
        weight = torch.randn(5, 7)
        assert fake_quantize(weight, LAYERS[LayerKind.LINEAR], 32, Scheme()) is weight

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_dtype(self, dtype):
        """A half-precision checkpoint stays one."""
        weight = torch.randn(5, 7).to(dtype)
        assert fake_quantize(weight, LAYERS[LayerKind.LINEAR], 4, Scheme()).dtype == dtype

    def test_names_the_layer_whose_weights_are_not_finite(self):
        """The user must find it."""
        weight = torch.full((5, 7), torch.inf)
        with refused(InvalidModel, layer="layer", n_bad=35):
            fake_quantize(weight, LAYERS[LayerKind.LINEAR], 4, Scheme())

    def test_takes_importance_in_the_shape_of_the_weight(self):
        """A Fisher diagonal comes in the weight's own layout."""
        layer = layer_of(LayerKind.LINEAR_TRANSPOSED, (7, 5))
        weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
        importance = torch.rand(7, 5, generator=torch.Generator().manual_seed(4))
        ours = fake_quantize(weight, layer, 3, Scheme(), importance=importance)
        by_hand = quantize(weight.t(), 3, Scheme(), importance=importance.t()).dequantize().t()
        assert torch.equal(by_hand, ours)

    def test_error_feedback_without_a_gram_is_refused(self):
        """It would silently be rounding to nearest."""
        with pytest.raises(InvalidInput, match="needs inputs_gram"):
            fake_quantize(
                torch.randn(5, 7),
                LAYERS[LayerKind.LINEAR],
                4,
                Scheme(rounding=Rounding.ERROR_FEEDBACK),
            )


class TestBlocksOfRows:
    @pytest.mark.parametrize(
        "scheme",
        [
            Scheme(grid=Grid.SYMMETRIC, granularity=Granularity.CHANNEL),
            Scheme(grid=Grid.ASYMMETRIC, granularity=Granularity.GROUP, group_size=8),
            Scheme(grid=Grid.SYMMETRIC, granularity=Granularity.TENSOR),
            Scheme(
                grid=Grid.FLOAT, granularity=Granularity.GROUP, group_size=16,
                scale_format=ScaleFormat.E4M3,
            ),
        ],
        ids=["channel", "group", "tensor", "factor of the tensor"],
    )  # fmt: skip
    def test_are_quantized_as_the_whole(self, scheme, monkeypatch):
        """Also where rows share a scale: then they are not taken apart."""
        torch.manual_seed(0)
        module = nn.Linear(32, 24, bias=False)
        module.weight.data[20:] *= 100
        inventory = inventory_of(module)
        candidate = Candidate.of(inventory.layers[0], 4, scheme)
        found = []
        for block in (2**21, 200):
            monkeypatch.setattr(weights, "BLOCK_WEIGHTS", block)
            found.append(QuantizedWeights(module, inventory).stored(candidate))
        whole, parts = found
        assert torch.equal(whole.codes.int(), parts.codes.int())
        assert torch.equal(whole.scales, parts.scales)
        assert torch.equal(whole.dequantize(), parts.dequantize())
