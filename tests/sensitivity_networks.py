"""Small networks with known structure for the sensitivity tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import enumerate_candidates
from bitquota.models.calibration import CalibrationSet

_KINDS = {
    nn.Linear: LayerKind.LINEAR,
    nn.Conv1d: LayerKind.CONV1D,
    nn.Conv2d: LayerKind.CONV2D,
    nn.Embedding: LayerKind.EMBEDDING,
}


class Residual(nn.Module):
    """Convolutions with batch norm, in-place ReLU and a skip; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.inner_norm(self.inner(x)))
        x = y + self.side(x)
        return self.head(x.mean(dim=(2, 3)))


class Branches(nn.Module):
    """Two linear layers side by side: outputs add, so a squared error is exactly quadratic."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.left(x) + self.right(x)


class Attention(nn.Module):
    """Embedding, one attention block, and an output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q = nn.Linear(8, 8, bias=False)
        self.k = nn.Linear(8, 8, bias=False)
        self.v = nn.Linear(8, 8, bias=False)
        self.o = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        heads = [f(x)[:, None] for f in (self.q, self.k, self.v)]
        y = functional.scaled_dot_product_attention(*heads, attn_mask=mask)[:, 0]
        return {"logits": self.out(x + self.o(y))}


class Branching(nn.Module):
    """Control flow that depends on the data: cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h if h.sum() > 0 else -h)


def build(kind, seed=0):
    """Return the network with seeded weights and non-trivial batch-norm statistics."""
    torch.manual_seed(seed)
    module = kind()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.3, 0.3)
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.3, 1.2)
    return module.eval()


def inventory_of(module, ties=()):
    """List the layers of a test network; tied weights count once."""
    layers, seen = [], {}
    for name, part in module.named_modules():
        if type(part) not in _KINDS or id(part.weight) in seen:
            continue
        seen[id(part.weight)] = name
        weight = part.weight
        layers.append(
            Layer(
                name=name,
                kind=_KINDS[type(part)],
                weight_name=f"{name}.weight",
                weight_shape=tuple(weight.shape),
                rows=weight.shape[0],
                columns=weight[0].numel(),
                n_weights=weight.numel(),
            )
        )
    inventory = Inventory(model_digest=f"test:{type(module).__name__}", layers=tuple(layers))
    return inventory.tie(ties) if ties else inventory


def samples(kind, n=12, seed=1):
    """Return a labelled calibration set that fits the network."""
    generator = torch.Generator().manual_seed(seed)
    if kind is Attention:
        tokens = torch.randint(0, 11, (n, 6), generator=generator)
        return CalibrationSet(inputs=(tokens,), labels=tokens.roll(-1, dims=1))
    shape = (n, 3, 8, 8) if kind is Residual else (n, 4)
    x = torch.randn(shape, generator=generator)
    classes = 5 if kind is Residual else 3
    return CalibrationSet(inputs=(x,), labels=torch.randint(0, classes, (n,), generator=generator))


def table_of(inventory, widths=(2, 4)):
    """Return the candidates of a test network."""
    return enumerate_candidates(inventory, widths)
