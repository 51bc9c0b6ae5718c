"""Small networks and factories that the formats tests load."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, export, save

from bitquota.candidates.table import CandidateTable, enumerate_candidates
from bitquota.candidates.targets import TARGETS
from bitquota.models.discovery import discover
from bitquota.plan import Assignment, Plan

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.storage import Scheme
    from bitquota.models.loaded import LoadedModel


class TinyNet(nn.Module):
    """Convolution, batch norm, depthwise convolution, linear: 8x8 images to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.depthwise(x)).mean((2, 3)))


def tiny_net(seed: int = 0) -> TinyNet:
    """Return a network whose batch norm has statistics that are not trivial."""
    torch.manual_seed(seed)
    net = TinyNet()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def scripted() -> nn.Module:
    """Return a traced network, which must be refused."""
    with torch.no_grad():
        return torch.jit.trace(tiny_net(), torch.zeros(2, 3, 8, 8))


def not_a_module() -> int:
    """Return something else."""
    return 3


def fails() -> None:
    """Raise."""
    msg = "no such file"
    raise OSError(msg)


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Return eight images and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 3, 8, 8)).astype(np.float32), np.arange(8)


class no_value:  # noqa: N801
    """A class with a factory as a static method."""

    @staticmethod
    def net() -> nn.Module:
        """Return the tiny net."""
        return tiny_net()


def write_pt2(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> Path:
    """Export with a dynamic batch."""
    dynamic = tuple({0: Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        save(export(module, inputs, dynamic_shapes=dynamic), path)
    return path


class TiedTokens(nn.Module):
    """Embedding, linear layers with and without a bias, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.mix = nn.Linear(64, 96)
        self.back = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of every position."""
        x = self.embed(ids)
        return self.head(x + self.back(torch.relu(self.mix(x))))


def tied_tokens() -> nn.Module:
    """Return a small model of tokens with a tied head."""
    torch.manual_seed(2)
    return TiedTokens().eval()


def write_llama(path: Path, *, width: int = 64, inner: int = 96, tied: bool = True) -> Path:
    """Save a tiny random Llama, by default with a tied head, as transformers does."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def upsampler() -> nn.Module:
    """Return transposed convolutions, one of them in groups."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ConvTranspose2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


def plan_with(
    model: LoadedModel,
    inputs: tuple[Tensor, ...],
    *,
    target: str | None = None,
    bits: tuple[int, ...] | None = None,
    scheme: Scheme | None = None,
    table: CandidateTable | None = None,
    inventory: Inventory | None = None,
    seed: int = 0,
) -> Plan:
    """Return a plan of random rows: of a target, of bit-widths, or of a table."""
    inventory = inventory or discover(
        model.module, tuple(t[:2] for t in inputs), model_digest=model.digest
    )
    if table is None and target is not None:
        inventory = TARGETS[target].prepare(inventory)
        table = TARGETS[target].candidates(inventory, weight_bits=bits)
    table = table or enumerate_candidates(inventory, bits or (4,), scheme=scheme)
    groups: dict[str, list] = {}
    for row in table.rows:
        groups.setdefault(row.group, []).append(row)
    draw = random.Random(seed)  # noqa: S311  # a test's choice
    chosen = {c.layer: c for rows in groups.values() for c in draw.choice(rows).candidates}
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=layer, candidate=chosen[layer.name]) for layer in inventory.layers
        ),
        unquantized=inventory.unquantized,
    )
