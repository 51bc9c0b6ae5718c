"""Fake-quantized keys and values, against llama.cpp's own Python package and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitquota.candidates.caches import own_scheme
from bitquota.candidates.layers import Cache
from bitquota.candidates.storage import Grid, Scheme
from bitquota.candidates.targets import target_by_name
from bitquota.errors import InvalidInput
from bitquota.quantizers.kv_cache import CacheQuantizer


def held(*shape: int) -> torch.Tensor:
    """Return keys of ``[samples, heads, tokens, head_size]`` with a few large channels."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(*shape, generator=generator)
    keys[..., 0] *= 20
    return keys


class TestCacheQuantizer:
    @pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0"])
    def test_blocks_of_llama_cpp(self, name):
        """To the last bit what the package ``gguf`` makes of the same numbers."""
        from gguf import GGMLQuantizationType, quants

        cache = target_by_name("gguf-k").require_cache()
        (known,) = [f for f in cache.formats if f.name == name]
        keys = held(2, 3, 5, 64)
        kind = GGMLQuantizationType[name.upper()]
        rows = keys.transpose(1, 2).reshape(-1, 64).numpy()
        expected = quants.dequantize(quants.quantize(rows, kind), kind)
        found = CacheQuantizer(known.bits, known.scheme)(keys)
        assert found.shape == keys.shape
        assert np.array_equal(expected, found.transpose(1, 2).reshape(-1, 64).numpy())

    @pytest.mark.parametrize("scales", ["head", "token"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_affine_lines(self, bits, scales):
        """No value moves by more than half a step, which the extremes of its line decide."""
        keys = held(2, 3, 5, 16)
        scheme = own_scheme(Cache(name="k_cache", heads=3, head_size=16), scales)
        error = (CacheQuantizer(bits, scheme)(keys) - keys).abs()
        shared = (3,) if scales == "head" else (1, 3)
        step = (keys.amax(shared, keepdim=True) - keys.amin(shared, keepdim=True)) / (2**bits - 1)
        # Scale and offset are stored in half precision.
        slack = keys.abs().amax(shared, keepdim=True) * 2**-9
        assert bool((error <= step / 2 + slack).all())
        assert float(error.max()) > float(step.max()) / 8

    def test_line_of_one_value(self):
        """Nothing is divided by a scale of zero."""
        keys = torch.full((1, 1, 2, 8), 0.5)
        for grid in (Grid.OFFSET, Grid.SYMMETRIC):
            found = CacheQuantizer(4, Scheme(grid=grid))(keys)
            assert torch.allclose(keys, found, atol=1e-3)
            assert not CacheQuantizer(4, Scheme(grid=grid))(0 * keys).any()

    def test_other_grids(self):
        with pytest.raises(InvalidInput) as caught:
            CacheQuantizer(4, Scheme(grid=Grid.CODEBOOK))
        assert caught.value.details["grid"] == "codebook"
