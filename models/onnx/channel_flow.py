"""Where the scale of a channel goes in an ONNX graph; see ``models.channel_flow``.

The same two steps, by ONNX Runtime: which layers a producer's values reach before another layer,
which the graph says, and whether their inputs are those of a first run times powers of two, when
what lies between is run on scaled values.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.models.channel_flow import MOST_READERS, ChannelPair, factors_of, reader_of
from bitquota.models.onnx.layers import readers
from bitquota.models.onnx.program import source_of
from bitquota.models.onnx.shifts import added_behind, scale_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.models.channel_flow import Reader
    from bitquota.models.onnx.program import Arrays, OnnxNode, OnnxProgram, OnnxSource


_AXES = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}
"""Axis that counts channels of what layers take and give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A node that multiplies with a layer's weight.

    Attributes:
        layer: Name of the layer.
        weight: Its weight in the graph.
        value: What is multiplied.
        axis: That counts its channels.
    """

    layer: str
    weight: str
    value: str
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Producer:
    """A layer or norm.

    Attributes:
        weight: Name of its weight in the module.
        bias: Name of its bias, if it has one.
        layer: Name, where it is a layer.
        output: What it puts out, with the bias.
        axis: Axis of the output that counts channels.
        channels: How many.
    """

    weight: str
    bias: str | None
    layer: str | None
    output: str
    axis: int
    channels: int


def onnx_channel_pairs(
    module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> list[ChannelPair]:
    """Return every producer of an ONNX graph whose channels may be scaled, in the order they run.

    Exact for what the samples show, as ``channel_pairs``.

    Cost: one pass, and the nodes between a producer and its readers once for each.
    """
    source = source_of(module)
    assert source is not None  # noqa: S101  # callers ask first
    program = source.program("eval")
    piece = source.pieces(inputs)[0]
    feeds = source.feeds(module) | piece
    everything = frozenset(node.index for node in program.nodes)
    first = program.run(everything, list(program.kept_types), {}, feeds)
    flow = _Flow(source, program, inventory, feeds, first | piece)
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in program.nodes:
        producer = flow.producer(node)
        if producer is not None:
            reading = flow.readers_of(producer, generator)
            if reading:
                found.append(
                    ChannelPair(
                        weight=producer.weight,
                        bias=producer.bias,
                        layer=producer.layer,
                        channels=producer.channels,
                        readers=tuple(reading),
                    )
                )
    return found


class _Flow:
    """A graph, the values of one pass, and where its layers are."""

    def __init__(
        self,
        source: OnnxSource,
        program: OnnxProgram,
        inventory: Inventory,
        feeds: Arrays,
        first: Arrays,
    ) -> None:
        self._source, self._program, self._feeds, self._first = source, program, feeds, first
        self._paths = {fed.name: fed.path for fed in source.fed}
        self._vectors = {fed.name for fed in source.fed if feeds[fed.name].ndim == 1}
        self._users = readers(source.model.graph)
        named = {layer.weight_name: layer.name for layer in inventory.layers}
        weights = {name: named[path] for name, path in self._paths.items() if path in named}
        self._layers = {
            node.index: found
            for node in program.nodes
            if (found := self._product(node, weights)) is not None
        }
        """By the number of the node."""

    def _product(self, node: OnnxNode, weights: Mapping[str, str]) -> _Product | None:
        """Return what a node multiplies with a weight that no other node reads, if it does."""
        proto = node.proto
        names = [name for name in node.sources if name in weights]
        if len(names) != 1 or len(self._users[names[0]]) != 1 or names[0] not in proto.input[1:2]:
            return None
        operator, value = proto.op_type.removeprefix("Fused"), proto.input[0]
        # An activation that is swapped has its channels elsewhere.
        swapped = any(a.name == "transA" and a.i for a in proto.attribute)
        if operator not in _AXES or swapped or value not in self._first:
            return None
        return _Product(layer=weights[names[0]], weight=names[0], value=value, axis=_AXES[operator])

    def producer(self, node: OnnxNode) -> _Producer | None:
        """Return what a node is, if it is a layer or norm whose tensors nothing else reads."""
        proto, known = node.proto, self._layers.get(node.index)
        if known is None:
            names = scale_of(proto, self._vectors)
            if not names:
                return None
            weight, bias = names[0], names[1] if len(names) > 1 else None
            axis = 1 if proto.op_type == "BatchNormalization" else -1
            output, layer = proto.output[0], None
        else:
            if proto.op_type.startswith("Fused"):
                return None  # an activation is inside
            weight, axis = known.weight, known.axis
            bias = proto.input[2] if len(proto.input) > 2 and proto.input[2] else None
            output, layer = proto.output[0], known.layer
            add = added_behind(proto, self._users)
            if add is not None and output not in self._source.outputs:
                own = [n for n in add.input if n in self._paths]
                bias, output = (own[0], add.output[0]) if own else (bias, output)
        if any(len(self._users.get(n, ())) != 1 for n in (weight, bias) if n is not None):
            return None
        if (bias is not None and bias not in self._paths) or output not in self._first:
            return None
        return _Producer(
            weight=self._paths[weight],
            bias=None if bias is None else self._paths[bias],
            layer=layer,
            output=output,
            axis=axis,
            channels=self._first[output].shape[axis],
        )

    def readers_of(self, producer: _Producer, generator: torch.Generator) -> list[Reader]:
        """Return the layers that get the producer's channels times their factors; else nothing."""
        reached, reading = {producer.output}, []
        for node in self._program.nodes:
            mine = reached.intersection(node.sources)
            if node.index in self._layers and mine:
                if mine != {self._layers[node.index].value}:
                    return []
                reading.append(self._layers[node.index])
            elif mine:
                if node.proto.op_type.endswith("Normalization"):
                    return []
                reached |= set(node.results)
        if reached & set(self._source.outputs) or not 0 < len(reading) <= MOST_READERS:
            return []
        exponents = factors_of(producer.channels, generator)
        before = self._first[producer.output]
        shape = [1] * before.ndim
        shape[producer.axis] = -1
        factors = np.exp2(exponents.numpy()).astype(before.dtype).reshape(shape)
        known = {k: v for k, v in self._first.items() if k not in reached}
        with np.errstate(over="ignore"):  # of float16: then the inputs differ
            known[producer.output] = before * factors
        values = sorted({found.value for found in reading})
        nodes = self._program.needed(values, known)
        after = known | self._program.run(nodes, values, known, self._feeds)
        found = [
            reader_of(
                of.layer,
                torch.from_numpy(self._first[of.value]),
                torch.from_numpy(after[of.value]),
                of.axis,
                exponents,
            )
            for of in reading
        ]
        passing = [reader for reader in found if reader is not None]
        return passing if len(passing) == len(found) else []
