"""Random torch modules: a seed gives a network and inputs that it takes.

``current`` is the factory that the fuzzer names; it returns the module that was made last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

ODD_NAMES = ("weight_", "0", "größe", "a b", "fc/1", "train_", "q_proj", "x" * 80, "head", "norm1")

_CURRENT: list[nn.Module] = []


def current() -> nn.Module:
    """Return the module that was made last."""
    return copy.deepcopy(_CURRENT[-1])


@dataclass(slots=True, kw_only=True)
class RandomModule:
    """A module and what it is run on."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    features: list[str] = field(default_factory=list)


class Chain(nn.Module):
    """Blocks one after the other, under odd names, some of them twice; further inputs are added."""

    def __init__(self, names: list[str], blocks: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.names, self.order = names, order
        for name, block in zip(names, blocks, strict=True):
            self.add_module(name, block)

    def run(self, x: Tensor) -> Tensor:
        """Return what the last block gives."""
        for k in self.order:
            x = self._modules[self.names[k]](x)
        return x


class OneOutput(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class TwoInputs(Chain):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.run(x)
        return y * (1 + scale.reshape(-1, *[1] * (y.ndim - 1)))


class Named(Chain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.run(x)
        return {"logits": y, "other": torch.tanh(y.flatten(1))}


class Pair(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.run(x)
        return torch.relu(y), y.flatten(1).softmax(-1)


class Softmaxed(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return functional.softmax(self.run(x).flatten(1), dim=1)


class Last(nn.Module):
    """A recurrent module's output, or its last state."""

    def __init__(self, rnn: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.rnn, self.last = rnn, last

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            return state[-1]
        return y


class Bare(nn.Module):
    """Parameters that no module of torch owns."""

    def __init__(self, how: str, n: int, m: int) -> None:
        super().__init__()
        self.how = how
        shapes = {"right": (n, m), "linear": (m, n), "left": (m, n), "batched": (n, m),
                  "einsum": (n, m), "addmm": (n, m)}  # fmt: skip
        self.w = nn.Parameter(torch.randn(shapes[how]) / n**0.5)
        self.b = nn.Parameter(torch.randn(m) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "right":
            return x @ self.w + self.b
        if self.how == "left":
            return (self.w @ x.unsqueeze(-1)).squeeze(-1)
        if self.how == "batched":
            return torch.bmm(x.reshape(len(x), -1, x.shape[-1]),
                             self.w.expand(len(x), -1, -1)).reshape(*x.shape[:-1], -1)  # fmt: skip
        if self.how == "einsum":
            return torch.einsum("...c,cd->...d", x, self.w)
        if self.how == "addmm":
            return torch.addmm(self.b, x.reshape(-1, x.shape[-1]), self.w).reshape(
                *x.shape[:-1], -1
            )
        return functional.linear(x, self.w, self.b)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.never = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Tied(nn.Module):
    """Two layers of one weight, the second one transposed."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(n, m), nn.Linear(n, m, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encode(x)) + self.decode(x)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Steps(nn.Module):
    """Images and signals as sequences, channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Maker:
    """Makes blocks for the shape (without batch) that the last one gave."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.features: list[str] = []

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def width(self) -> int:
        return int(self.pick((1, 2, 5, 8, 16, 31, 32)))

    def block(self, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        """Return a block and the shape of what it gives."""
        for _ in range(50):
            how = self.pick((self.linear, self.linear, self.conv, self.conv, self.conv_transpose,
                             self.recurrent, self.bare, self.residual, self.tied, self.attention,
                             self.norm, self.act, self.reshape, self.pool, self.derived,
                             self.bilinear, self.encoder))  # fmt: skip
            made = how(shape)
            if made is not None:
                self.features.append(how.__name__)
                return made
        return nn.Identity(), shape

    def linear(self, shape: Any) -> Any:
        m = self.width()
        return nn.Linear(shape[-1], m, bias=self.chance(0.7)), (*shape[:-1], m)

    def bare(self, shape: Any) -> Any:
        m, how = self.width(), self.pick(
            ("right", "linear", "left", "batched", "einsum", "addmm"))  # fmt: skip
        self.features.append(how)
        return Bare(how, shape[-1], m), (*shape[:-1], m)

    def conv(self, shape: Any) -> Any:
        if not 2 <= len(shape) <= 4:
            return None
        c, *space = shape
        groups = int(self.pick([g for g in (1, 1, c, 2) if c % g == 0]))
        m = groups * int(self.pick((1, 2, 3)))
        k = int(self.pick([k for k in (1, 2, 3, 5) if k <= min(space)]))
        d = 2 if k == 2 and min(space) > 2 and self.chance(0.5) else 1
        p, s = (k // 2 if d == 1 else 0), int(self.pick((1, 2)))
        mode = self.pick(("zeros", "zeros", "circular", "replicate"))
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space) - 1]
        made = kind(c, m, k, stride=s, padding=p, dilation=d, groups=groups,
                    bias=self.chance(0.5), padding_mode=mode)  # fmt: skip
        sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n in space]
        return made, (m, *sizes)

    def conv_transpose(self, shape: Any) -> Any:
        if not 2 <= len(shape) <= 4 or max(shape[1:]) > 16:
            return None
        c, *space = shape
        groups = int(self.pick([g for g in (1, 1, c) if c % g == 0]))
        m, k, s = groups * int(self.pick((1, 2))), int(self.pick((2, 3))), int(self.pick((1, 2)))
        extra = 1 if s == 2 and self.chance(0.4) else 0
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(space) - 1]
        made = kind(c, m, k, stride=s, groups=groups, output_padding=extra)
        return made, (m, *[(n - 1) * s + k + extra for n in space])

    def recurrent(self, shape: Any) -> Any:
        if len(shape) != 2:
            return None
        kind, hidden = self.pick((nn.LSTM, nn.GRU, nn.RNN)), int(self.pick((1, 3, 8)))
        options: dict[str, Any] = {"batch_first": True, "bias": self.chance(0.7),
                                   "num_layers": int(self.pick((1, 1, 2))),
                                   "bidirectional": self.chance(0.3)}  # fmt: skip
        if kind is nn.LSTM and hidden > 1 and self.chance(0.2):
            options["proj_size"] = hidden - 1
        if kind is nn.RNN and self.chance(0.3):
            options["nonlinearity"] = "relu"
        rnn = kind(shape[1], hidden, **options)
        out = options.get("proj_size", hidden)
        last = self.chance(0.3)
        ways = 2 if options["bidirectional"] else 1
        return Last(rnn, last=last), ((out,) if last else (shape[0], ways * out))

    def residual(self, shape: Any) -> Any:
        return Residual(nn.Linear(shape[-1], shape[-1])), shape

    def tied(self, shape: Any) -> Any:
        m = self.width()
        return Tied(shape[-1], m), (*shape[:-1], m)

    def attention(self, shape: Any) -> Any:
        if len(shape) != 2:
            return None
        heads = int(self.pick([h for h in (1, 2, 4) if shape[1] % h == 0]))
        return SelfAttention(shape[1], heads, bias=self.chance(0.5)), shape

    def encoder(self, shape: Any) -> Any:
        if len(shape) != 2 or self.chance(0.5):
            return None
        heads = int(self.pick([h for h in (1, 2) if shape[1] % h == 0]))
        return nn.TransformerEncoderLayer(
            shape[1], heads, 8, batch_first=True, norm_first=self.chance(0.5)
        ), shape

    def norm(self, shape: Any) -> Any:
        c = shape[0]
        if len(shape) == 1:
            return self.pick((nn.BatchNorm1d, nn.LayerNorm))(c), shape
        if self.chance(0.4):
            return nn.LayerNorm(shape[-1]), shape
        if self.chance(0.3):
            return nn.GroupNorm(1, c), shape
        return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](c), shape

    def act(self, shape: Any) -> Any:
        kinds = (nn.ReLU(inplace=self.chance(0.5)), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.PReLU(),
                 nn.Dropout(0.5), nn.Identity(), nn.Hardswish(), nn.ELU())  # fmt: skip
        return self.pick(kinds), shape

    def reshape(self, shape: Any) -> Any:
        if len(shape) > 2 and int(np.prod(shape[1:])) <= 60 and self.chance(0.5):
            return Steps(), (int(np.prod(shape[1:])), shape[0])
        size = int(np.prod(shape))
        return (Flat(), (size,)) if len(shape) > 1 and size <= 400 else None

    def pool(self, shape: Any) -> Any:
        if len(shape) == 3 and min(shape[1:]) >= 2:
            return self.pick((nn.MaxPool2d(2), nn.AvgPool2d(2))), (
                shape[0], shape[1] // 2, shape[2] // 2)  # fmt: skip
        if len(shape) == 3:
            return nn.AdaptiveAvgPool2d(1), (shape[0], 1, 1)
        return None

    def derived(self, shape: Any) -> Any:
        """A weight that is computed on each pass."""
        m, how = self.width(), self.pick(("weight_norm", "spectral_norm", "prune", "old"))
        self.features.append(how)
        layer = nn.Linear(shape[-1], m)
        if how == "weight_norm":
            layer = parametrizations.weight_norm(layer)
        elif how == "spectral_norm":
            layer = parametrizations.spectral_norm(layer)
        elif how == "prune":
            prune.l1_unstructured(layer, "weight", amount=0.4)
        else:
            layer = nn.utils.weight_norm(layer)
        return layer, (*shape[:-1], m)

    def bilinear(self, shape: Any) -> Any:
        if self.chance(0.7) or shape[-1] > 16:
            return None

        class Square(nn.Module):
            def __init__(self, n: int) -> None:
                super().__init__()
                self.product = nn.Bilinear(n, n, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.product(x, x)

        return Square(shape[-1]), (*shape[:-1], 3)


SHAPES = ((1,), (8,), (13,), (5, 4), (7, 12), (3, 8, 8), (4, 9, 6), (2, 16), (1, 4, 3, 4), "tokens")


def random_module(seed: int) -> RandomModule:
    """Return the module of ``seed`` in eval mode, and make it the one that ``current`` returns."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    make = Maker(rng)
    n = int(rng.integers(9, 14))
    shape, blocks = make.pick(SHAPES), []
    if shape == "tokens":
        words, width = int(make.pick((17, 32))), int(make.pick((4, 7)))
        inputs: tuple[Tensor, ...] = (torch.randint(0, words, (n, 6)),)
        blocks.append(nn.Embedding(words, width, padding_idx=make.pick((None, 0))))
        shape = (6, width)
        make.features.append("tokens")
    else:
        inputs = (torch.randn(n, *shape),)
    order: list[int] = list(range(len(blocks)))
    for _ in range(int(rng.integers(1, 6))):
        before = shape
        block, shape = make.block(shape)
        order.append(len(blocks))
        if shape == before and make.chance(0.2):
            order.append(len(blocks))
            make.features.append("called twice")
        blocks.append(block)
    blocks += [nn.Linear(2, 3)] * int(make.chance(0.1))  # never called
    names = [f"{make.pick(ODD_NAMES)}{k}" if make.chance(0.3) else f"layer{k}"
             for k in range(len(blocks))]  # fmt: skip
    kind = make.pick((OneOutput, OneOutput, OneOutput, TwoInputs, Named, Pair, Softmaxed))
    make.features.append(kind.__name__)
    if kind is TwoInputs:
        inputs = (*inputs, torch.rand(n))
    module = kind(names, blocks, order)
    with torch.no_grad():  # statistics that are not trivial
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    module.eval()
    _CURRENT[:] = [module]
    return RandomModule(module=module, inputs=inputs, features=make.features)
