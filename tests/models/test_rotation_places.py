"""Places that can be turned, found by running models."""

from __future__ import annotations

import pytest
from torch import nn

from bitquota.errors import InvalidInput
from bitquota.models.discovery import discover
from bitquota.models.rotation_places import RotationPlace, attention_heads, residual_stream
from decoder_networks import TOKENS, Block, Decoder


def made(module):
    module.eval()
    return module, discover(module, (TOKENS,)), (TOKENS,)


class Shortcut(Decoder):
    """The stream is read past the norms."""

    def __init__(self):
        super().__init__()
        self.past = nn.Linear(16, 20)

    def forward(self, tokens):
        return super().forward(tokens) + self.past(self.embed(tokens))


class Unused(Decoder):
    """A layer that only other samples reach."""

    def __init__(self):
        super().__init__()
        self.pictures = nn.Linear(16, 16)

    def forward(self, tokens):
        y = super().forward(tokens)
        return y if tokens.ndim == 2 else self.pictures(y)


class Behind(Block):
    """A norm behind the MLP, whose output is added to the stream."""

    def forward(self, x):
        return x + self.norm2(self.down(self.up(self.norm1(x))))


class TestResidualStream:
    def test_everything_that_writes_and_reads_it(self):
        place = residual_stream(*made(Decoder()))
        assert place.size == 16
        written = {"embed.weight": 1} | {
            f"blocks.{k}.{name}": 0
            for k in range(2)
            for name in ("o.weight", "down.weight", "down.bias")
        }
        read = {f"blocks.{k}.{name}.weight": 1 for k in range(2) for name in ("q", "k", "v")}
        read |= {f"blocks.{k}.{name}.weight": 1 for k in range(2) for name in ("gate", "up")}
        assert dict(place.sides) == written | read | {"head.weight": 1}
        norms = [f"blocks.{k}.norm{n}.weight" for k in range(2) for n in (1, 2)]
        assert [norm.weight for norm in place.norms] == [*norms, "norm.weight"]
        assert place.norms[-1].readers == (("head.weight", 1),)

    def test_is_stored_as_json(self):
        place = residual_stream(*made(Decoder()))
        stored = {"size": 16, "sides": [list(side) for side in place.sides], "norms": [
            {"weight": n.weight, "readers": [list(side) for side in n.readers]}
            for n in place.norms
        ]}  # fmt: skip
        assert RotationPlace.of(stored) == place

    @pytest.mark.parametrize(
        ("module", "why"),
        [
            (lambda: Decoder(tied=True), "tied"),
            (lambda: Decoder(norm=nn.LayerNorm), "layer_norm"),
            (lambda: Decoder(last=nn.Identity), "without a norm"),
            (Shortcut, "what 'embed' writes is read without a norm"),
            (Unused, "'pictures' does not run"),
            (
                lambda: nn.Sequential(nn.Embedding(20, 16), Behind(), Behind()),
                "norm2.weight' is added to it",
            ),
            (lambda: nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 4)), "no norm"),
        ],
        ids=["tied", "means", "no last norm", "shortcut", "unused", "behind", "no norm"],
    )
    def test_others_are_refused(self, module, why):
        with pytest.raises(InvalidInput, match=why):
            residual_stream(*made(module()))


class TestAttentionHeads:
    @pytest.mark.parametrize("n_kv", [1, 2, 4])
    def test_values_but_no_gates(self, n_kv):
        """Each head has 4 channels, also where heads of keys and values are repeated."""
        places = attention_heads(*made(Decoder(n_kv=n_kv)))
        assert [place.size for place in places] == [4, 4]
        assert [place.sides for place in places] == [
            ((f"blocks.{k}.v.weight", 0), (f"blocks.{k}.o.weight", 1)) for k in range(2)
        ]

    def test_biases_are_turned_too(self):
        places = attention_heads(*made(Decoder(bias=True)))
        assert places[0].sides[1] == ("blocks.0.v.bias", 0)

    def test_tied_heads_and_other_norms_do_not_matter(self):
        assert len(attention_heads(*made(Decoder(tied=True, norm=nn.LayerNorm)))) == 2

    def test_networks_without_attention_have_none(self):
        module = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        assert attention_heads(*made(module)) == []
