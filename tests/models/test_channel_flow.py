"""Where scaled channels go, found by running models."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.models.channel_flow import ChannelPair, Reader, channel_pairs
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.onnx.channel_flow import onnx_channel_pairs
from bitquota.models.running import put_in_eval_mode
from bitquota.quantizers.smoothing import Scaling, scale_channels

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))


def pairs_of(module, x):
    put_in_eval_mode(module)
    return channel_pairs(module, discover(module, (x,)), (x,))


def places(module, x):
    """Return which weights are producers, and who reads each."""
    return {p.weight: [r.layer for r in p.readers] for p in pairs_of(module, x)}


class Images(nn.Module):
    """Two convolutions with something between, and a head behind flattened positions."""

    def __init__(self, between=functional.relu, groups=1):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.third = nn.ConvTranspose2d(8, 4, 3, groups=2)
        self.head = nn.Linear(4 * 25, 5)
        self.between = between

    def forward(self, x):
        x = self.second(self.between(self.norm(self.first(x))))
        x = functional.max_pool2d(self.third(functional.leaky_relu(x)), 2)
        return self.head(x.flatten(1))


class Decoder(nn.Module):
    """A block with grouped key and value heads, and a gated MLP."""

    def __init__(self, n_kv=2):
        super().__init__()
        self.n_kv = n_kv
        self.norm, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 4 * n_kv), nn.Linear(16, 4 * n_kv)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(2, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        k, v = (part.repeat_interleave(4 // self.n_kv, dim=1) for part in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(x.mean(dim=1))


class TestChannelPairs:
    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_through_activations_pooling_and_flattening(self, groups):
        module = Images(groups=groups)
        assert pairs_of(module, IMAGES) == [
            ChannelPair(
                weight="norm.weight", bias="norm.bias", channels=8,
                readers=(Reader(layer="second"),),
            ),
            ChannelPair(
                weight="second.weight", bias="second.bias", layer="second", channels=8,
                readers=(Reader(layer="third"),),
            ),
            ChannelPair(
                weight="third.weight", bias="third.bias", layer="third", channels=4,
                readers=(Reader(layer="head", repeats=25),),
            ),
        ]  # fmt: skip

    def test_of_a_decoder(self):
        """Norms, values through attention with repeated heads, and the linear half of a gate."""
        found = pairs_of(Decoder(), ROWS)
        assert {p.weight: [r.layer for r in p.readers] for p in found} == {
            "norm.weight": ["q", "k", "v"],
            "v.weight": ["o"],
            "norm2.weight": ["gate", "up"],
            "up.weight": ["down"],
        }
        (values,) = [p for p in found if p.layer == "v"]
        assert values.readers == (Reader(layer="o", repeats=2, block=4),)

    @pytest.mark.parametrize("make", [Images, Decoder])
    def test_scaled_by_any_numbers_nothing_changes(self, make):
        torch.manual_seed(0)
        x = IMAGES if make is Images else ROWS
        module = make().eval()
        inventory = discover(module, (x,))
        with torch.no_grad():
            expected = module(x)
        for pair in channel_pairs(module, inventory, (x,)):
            factors = torch.rand(pair.channels) * 3 + 0.2
            scale_channels(module, inventory, Scaling(pair=pair, factors=factors))
        with torch.no_grad():
            assert torch.allclose(module(x), expected, rtol=1e-4, atol=1e-5)

    def test_exported_graphs_are_treated_alike(self):
        for module, x in ((Images(), IMAGES), (Decoder(), ROWS)):
            exported = torch.export.export(module.eval(), (x,)).module()
            assert places(exported, x) == places(module, x)

    def test_onnx_graphs_are_treated_alike(self, tmp_path):
        """Norms, values through attention with repeated heads, and the linear half of a gate."""
        torch.manual_seed(0)
        module = Decoder().eval()
        with torch.no_grad():
            # Equal tensors would be one in the file.
            for norm in (module.norm, module.norm2):
                norm.weight.uniform_(0.5, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own trees
            torch.onnx.export(module, (ROWS,), tmp_path / "m.onnx", dynamo=True, verbose=False)
        graph = load_model(str(tmp_path / "m.onnx")).module
        inventory = discover(graph, (ROWS,))
        found = onnx_channel_pairs(graph, inventory, (ROWS,))

        def forms(pairs):
            return [(p.bias, p.channels, [(r.repeats, r.block) for r in p.readers]) for p in pairs]

        assert forms(found) == forms(pairs_of(module, ROWS))
        assert {"norm.weight", "norm2.weight"} <= {p.weight for p in found}
        # Scaled by any numbers nothing changes.
        with torch.no_grad():
            expected = graph(ROWS)
            for pair in found:
                factors = torch.rand(pair.channels) * 3 + 0.2
                scale_channels(graph, inventory, Scaling(pair=pair, factors=factors))
            assert torch.allclose(graph(ROWS), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "between", [functional.gelu, functional.relu6, functional.hardswish, torch.tanh]
    )
    def test_not_through_functions_that_bend_elsewhere(self, between):
        assert "norm.weight" not in places(Images(between), IMAGES)

    def test_not_where_something_else_reads(self):
        class Both(nn.Module):
            def __init__(self, end):
                super().__init__()
                self.a, self.b, self.end = nn.Linear(16, 16), nn.Linear(16, 16), end

            def forward(self, x):
                x = self.a(x)
                return self.end(x, self.b(x))

        assert places(Both(lambda _, y: y), ROWS) == {"a.weight": ["b"]}
        assert places(Both(lambda x, y: x + y), ROWS) == {}
        assert places(Both(lambda x, y: (y, x)), ROWS) == {}

    def test_not_into_weights_that_are_used_twice(self):
        class Twice(nn.Module):
            def __init__(self, tied):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
                if tied:
                    self.c.weight = self.b.weight
                self.last = self.c if tied else self.b

            def forward(self, x):
                return self.last(functional.gelu(self.b(functional.relu(self.a(x)))))

        assert places(Twice(tied=True), ROWS) == {}
        assert places(Twice(tied=False), ROWS) == {}

    def test_not_into_heads_that_share_the_embedding(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.a, self.norm = (
                    nn.Embedding(30, 16), nn.Linear(16, 16), nn.LayerNorm(16)
                )  # fmt: skip

            def forward(self, x):
                x = self.norm(functional.gelu(self.a(self.embed(x))))
                return functional.linear(x, self.embed.weight)

        tokens = torch.arange(20).reshape(4, 5)
        exported = torch.export.export(Tied().eval(), (tokens,)).module()
        assert places(Tied(), tokens) == places(exported, tokens) == {}
