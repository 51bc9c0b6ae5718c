"""Decoders whose values may be turned."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention with heads of 4 channels and a gated MLP, each behind a norm."""

    def __init__(self, n_kv=2, norm=nn.RMSNorm, bias=False):
        super().__init__()
        self.n_kv = n_kv
        self.norm1, self.norm2 = norm(16), norm(16)
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16, bias=bias)
        self.k, self.v = nn.Linear(16, 4 * n_kv), nn.Linear(16, 4 * n_kv, bias=bias)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        y = self.norm1(x)
        n, t, _ = y.shape
        q = self.q(y).view(n, t, 4, 4).transpose(1, 2)
        k, v = (f(y).view(n, t, self.n_kv, 4).transpose(1, 2) for f in (self.k, self.v))
        k, v = (part.repeat_interleave(4 // self.n_kv, dim=1) for part in (k, v))
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(n, t, 16))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Two blocks between embeddings and a head."""

    def __init__(self, *, tied=False, last=nn.RMSNorm, **about):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block(**about) for _ in range(2))
        self.norm, self.head = last(16), nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
