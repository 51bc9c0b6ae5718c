"""Small floats: every code and value beside ml_dtypes, scales as they are stored."""

import ml_dtypes
import numpy as np
import pytest
import torch

from bitquota.candidates.storage import (
    FLOATS,
    Granularity,
    Grid,
    ScaleFormat,
    Scheme,
    storage_size,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers.float_formats import (
    float_codes,
    float_read,
    float_values,
    scale_bytes,
    scales_of_bytes,
    stored_scales,
)
from bitquota.quantizers.packing import pack, unpack
from bitquota.quantizers.rounders import output_errors
from bitquota.quantizers.weights import quantize
from refusals import refused

TYPES = {
    (Grid.FLOAT, 4): ml_dtypes.float4_e2m1fn,
    (Grid.FLOAT, 6): ml_dtypes.float6_e2m3fn,
    (Grid.FLOAT, 8): ml_dtypes.float8_e4m3fn,
    (Grid.FLOAT_RANGE, 6): ml_dtypes.float6_e3m2fn,
    (Grid.FLOAT_RANGE, 8): ml_dtypes.float8_e5m2,
}
FORMATS = [pytest.param(FLOATS[g][b], t, b, id=f"{g}-{b}") for (g, b), t in TYPES.items()]

MXFP4 = Scheme(
    grid=Grid.FLOAT,
    granularity=Granularity.GROUP,
    group_size=32,
    scale_format=ScaleFormat.E8M0,
)
NVFP4 = Scheme(
    grid=Grid.FLOAT,
    granularity=Granularity.GROUP,
    group_size=16,
    scale_format=ScaleFormat.E4M3,
)


def test_every_format_is_compared():
    assert {(g, b) for g, formats in FLOATS.items() for b in formats} == TYPES.keys()


@pytest.mark.parametrize(("of", "dtype", "bits"), FORMATS)
class TestFormats:
    def test_every_code_stands_for_the_published_number(self, of, dtype, bits):
        codes = np.arange(2**bits, dtype=np.uint8)
        published = codes.view(dtype).astype(np.float64)
        finite = np.isfinite(published)
        ours = float_read(torch.from_numpy(codes.astype(np.int32)), of, torch.float64).numpy()
        assert np.array_equal(ours[finite], published[finite])
        assert published[finite].max() == of.largest

    @pytest.mark.parametrize("kind", [torch.float32, torch.float64])
    def test_values_are_rounded_as_published(self, of, dtype, bits, kind):
        """Random ones of every size, all numbers, all middles between them (ties to even)."""
        numbers = float_read(torch.arange(2 ** (bits - 1)), of, torch.float64)
        numbers = numbers[numbers <= of.largest].sort().values
        middles = (numbers[1:] + numbers[:-1]) / 2
        generator = torch.Generator().manual_seed(0)
        sizes = torch.exp2(torch.rand(20_000, generator=generator, dtype=torch.float64) * 36 - 20)
        values = torch.cat([numbers, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), sizes])
        values = torch.cat([values, -values]).to(kind)
        clipped = values.clamp(-of.largest, of.largest)
        published = clipped.float().numpy().astype(dtype)
        found = float_values(values, of)
        assert found.dtype == kind
        assert np.array_equal(found.numpy(), published.astype(found.numpy().dtype))
        codes = float_codes(values, of).numpy()
        bytes_of = published.view(np.uint8)
        zero = published.astype(np.float32) == 0
        assert np.array_equal(codes[~zero], bytes_of[~zero])
        assert not codes[zero].any()


class TestScales:
    @pytest.mark.parametrize("scale_format", [ScaleFormat.E8M0, ScaleFormat.E4M3])
    def test_stored_scales_come_back_from_their_bytes(self, scale_format):
        scales = torch.exp2(torch.randn(64, 5, generator=torch.Generator().manual_seed(1)) * 3 - 8)
        stored = stored_scales(scales.double(), scale_format).float()
        data, factor = scale_bytes(stored, scale_format)
        assert data.dtype == torch.uint8
        assert torch.equal(scales_of_bytes(data, scale_format, factor), stored)
        ratio = stored / scales
        if scale_format is ScaleFormat.E8M0:
            assert bool(((ratio > 0.7) & (ratio < 1.5)).all())
            published = data.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
            assert np.array_equal(published, stored.numpy())
        else:
            large = scales > scales.max() / 1000
            assert bool(((ratio[large] - 1).abs() <= 2**-4).all())
            published = data.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            assert np.array_equal(published * np.float32(factor), stored.numpy())

    def test_a_group_of_zeros_has_a_scale_that_is_stored(self):
        for scheme in (MXFP4, NVFP4):
            weight = quantize(torch.zeros(2, 64), 4, scheme)
            assert bool(weight.scales.isfinite().all())
            assert torch.equal(unpack(pack(weight)).dequantize(), torch.zeros(2, 64))


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4, Scheme(grid=Grid.FLOAT)])
class TestQuantize:
    def test_bytes_are_counted_and_come_back(self, scheme):
        matrix = torch.randn(6, 70, generator=torch.Generator().manual_seed(0)) * 0.02
        weight = quantize(matrix, 4, scheme)
        packed = pack(weight)
        assert packed.size == storage_size(6, 70, 4, scheme)
        again = unpack(packed)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scales, weight.scales)
        assert torch.equal(again.dequantize(), weight.dequantize())

    def test_what_is_on_the_grid_stays(self, scheme):
        """Scales that were stored are found again."""
        matrix = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        once = quantize(matrix, 4, scheme).dequantize()
        again = quantize(once, 4, scheme).dequantize()
        assert float((again - once).abs().max()) <= 1e-6

    def test_products_are_exact_in_bfloat16(self, scheme):
        """So runtimes that multiply code, scale and factor in it read what was measured."""
        values = quantize(torch.randn(8, 64) * 0.03, 4, scheme).dequantize()
        exact = torch.equal(values.bfloat16().float(), values)
        assert exact is (scheme.scale_format is not ScaleFormat.FP32)

    def test_feedback_lowers_the_output_error(self, scheme):
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(400, 64, generator=generator) @ torch.randn(
            64, 64, generator=generator
        )
        gram = (inputs.T @ inputs).double()
        matrix = torch.randn(16, 64, generator=generator)
        nearest = quantize(matrix, 4, scheme, importance=gram.diagonal())
        fed = quantize(matrix, 4, scheme, inputs_gram=gram, rounding="gptq")
        before, after = (
            output_errors((matrix - w.dequantize()).double(), gram).sum() for w in (nearest, fed)
        )
        assert float(after) < 0.6 * float(before)


class TestSizes:
    @pytest.mark.parametrize(
        ("scheme", "bits", "per_weight"),
        [(MXFP4, 4, 4.25), (MXFP4, 6, 6.25), (MXFP4, 8, 8.25), (NVFP4, 4, 4.5)],
    )
    def test_bits_per_weight_are_the_published_ones(self, scheme, bits, per_weight):
        size = storage_size(64, 256, bits, scheme)
        assert size.total - scheme.scale_format.tensor_bits == per_weight * 64 * 256

    def test_a_width_that_the_format_lacks(self):
        with refused(InvalidInput, weight_bits=5, grid="float") as caught:
            storage_size(4, 4, 5, MXFP4)
        assert str(caught.value) == "the grid 'float' takes 4, 6, 8 bits; got 5"

    def test_small_scales_belong_to_floats(self):
        with refused(InvalidInput, scale_format="e8m0") as caught:
            Scheme(scale_format=ScaleFormat.E8M0)
        assert "float, float_range" in str(caught.value)
