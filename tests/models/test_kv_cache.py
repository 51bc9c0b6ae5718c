"""KV caches found in models of transformers, without a list of architectures."""

from __future__ import annotations

import pytest
import torch

from bitquota.candidates.layers import Cache
from bitquota.errors import InvalidModel
from bitquota.models.kv_cache import find_caches, latent_size, open_caches
from bitquota.models.load import load_model, load_outline
from bitquota.models.loaded import finish
from transformer_families import write_family

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))

CAUSAL = {
    # Heads, numbers of a head, and windows, layer by layer.
    "llama": (2, 8, [None, None]),
    "gpt2": (4, 8, [None, None]),
    "mixtral": (2, 8, [None, None]),
    "gemma2": (2, 8, [8, None]),
    "gpt_oss": (2, 8, [8, None]),
    "exaone4": (2, 8, [8, None]),
    "deepseek_v3": (4, 8, [None, None]),
    "lfm2": (2, 8, [None]),
}


class TestFindCaches:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", CAUSAL)
    def test_families(self, family, tmp_path):
        """Keys and values of each attention layer, as queries are grouped over; also headers."""
        heads, size, windows = CAUSAL[family]
        path = str(write_family(family, tmp_path))
        model, sketch = load_model(path), load_outline(path)
        found = find_caches(model, (IDS,))
        assert find_caches(sketch, sketch.example_inputs) == found
        assert [(heads, size, w) for w in windows for _ in "kv"] == [
            (cache.heads, cache.head_size, cache.window) for cache in found
        ]
        assert [c.holds_keys for c in found] == [True, False] * len(windows)
        assert latent_size(model) == (8 if family == "deepseek_v3" else None)

        # Opened, and not hooked into, they change nothing; each is seen by its layer.
        with torch.no_grad():
            before = model.module(IDS)
            open_caches(model.module, [cache.name for cache in found])
            assert torch.equal(model.module(IDS), before)
            for cache in found:
                place = model.module.get_submodule(cache.name)
                handle = place.register_forward_pre_hook(lambda _, given: (0.5 * given[0],))
                assert not torch.equal(model.module(IDS), before)
                handle.remove()

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["bert", "mamba"])
    def test_without_a_cache(self, family, tmp_path):
        model = load_model(str(write_family(family, tmp_path)))
        with pytest.raises(InvalidModel) as caught:
            find_caches(model, (IDS,))
        assert caught.value.details["architecture"] == model.architecture

    def test_own_networks(self):
        """What does not go through the registry of transformers has no cache that is known."""
        network = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
        model = finish(network, source="own", architecture="own")
        with pytest.raises(InvalidModel) as caught:
            find_caches(model, (torch.zeros(2, 3, 8),))
        assert caught.value.details["architecture"] == "own"


class TestCache:
    def test_sizes(self):
        """A window holds fewer tokens than the context."""
        cache = Cache(name="a.k_cache", heads=2, head_size=8, window=100)
        assert cache.at(64, 3).full_precision_bits == 64 * 3 * 16 * 16
        assert cache.at(4096, 1).full_precision_bits == 100 * 16 * 16
        assert cache.group == "a.k_cache"

    def test_nothing(self):
        with pytest.raises(InvalidModel):
            Cache(name="a.k_cache", heads=0, head_size=8)
