"""Run an ONNX graph from value to value, every node once; and where its layers take their inputs.

Design: docs/design/runners.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitquota.models.onnx.rewrites import import_onnx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import nn

    from bitquota.models.onnx.program import Arrays, OnnxProgram, OnnxSource

_READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Steps:
    """One model on one batch, run as far as it is asked.

    Args:
        program: The graph.
        source: Where it comes from.
        module: Holds its weights; they are read when a node runs.
        piece: The batch, from ``OnnxSource.pieces``.
    """

    def __init__(
        self, program: OnnxProgram, source: OnnxSource, module: nn.Module, piece: Arrays
    ) -> None:
        self._program, self._source, self._module, self._piece = program, source, module, piece
        self._known: Arrays = {}
        self._done: frozenset[int] = frozenset()

    def upto(self, target: str) -> NDArray[Any]:
        """Run what ``target`` needs and has not run, and return it."""
        program = self._program
        if target in self._piece:
            return self._piece[target]
        nodes = program.needed([target], self._known)
        self._done |= nodes
        # Whatever a later node will read is kept; everything else is forgotten.
        later = [n for n in program.nodes if n.index not in self._done]
        read = {s for n in later for s in n.sources if s in program.kept_types}
        made = {r for k in nodes for r in program.nodes[k].results}
        targets = [target, *sorted((read & made) - {target})]
        asked = {s for k in nodes for s in program.nodes[k].sources}
        feeds = self._source.feeds(self._module, asked) | self._piece
        fresh = program.run(nodes, targets, self._known, feeds)
        self._known = {k: v for k, v in (self._known | fresh).items() if k in read or k == target}
        return self._known[target]

    def replace(self, name: str, value: NDArray[Any]) -> None:
        """Let later nodes read ``value`` for the value ``name`` that was asked for last."""
        self._known[name] = value


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInput:
    """The one node that multiplies with a layer's weight.

    Attributes:
        layer: Name of the layer.
        value: What the node reads beside the weight.
        turned: Whether the axes of ``value``, a matrix, are to be swapped.
        settings: Stride, padding and the like of a convolution, as ``input_moments.patches``
            takes them.
    """

    layer: str
    value: str
    turned: bool
    settings: dict[str, Any]


def layer_inputs(
    program: OnnxProgram, source: OnnxSource, layers: Mapping[str, str]
) -> list[LayerInput]:
    """Return where layers take their inputs, in the order in which they run.

    Args:
        program: The graph.
        source: Where it comes from.
        layers: Layer by path of its weight in the module. Left out are those that several nodes
            read, that are views of a weight, and that no single product multiplies with.
    """
    helper = import_onnx().helper
    names = {fed.name: layers[fed.path] for fed in source.fed if fed.path in layers}
    weights = {fed.name for fed in source.fed} | program.static
    uses: dict[str, list[LayerInput | None]] = {}
    for node in program.nodes:
        read = [name for name in node.sources if name in names]
        for name in read:
            proto = node.proto
            operator = proto.op_type.removeprefix("Fused")
            place = list(proto.input).index(name) if name in proto.input else None
            found = None
            if operator in _READERS and place in (0, 1) and len(read) == 1:
                given = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
                found = _input_of(names[name], operator, proto, place, given)
            if found is not None and (found.value in weights or program.is_constant(found.value)):
                found = None  # a product of two weights
            uses.setdefault(name, []).append(found)
    return [found for (found, *more) in uses.values() if found is not None and not more]


def _input_of(
    layer: str,
    operator: str,
    proto: Any,  # noqa: ANN401  # onnx.NodeProto
    place: int,
    given: dict[str, Any],
) -> LayerInput | None:
    if operator in ("Gemm", "MatMul"):
        # Columns of the weight are what is summed over: the last axis of a left factor.
        turned = bool(given.get("transB" if place == 0 else "transA", 0)) ^ (place == 0)
        return LayerInput(layer=layer, value=proto.input[1 - place], turned=turned, settings={})
    if place != 1 or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    kernel = given.get("kernel_shape")
    if kernel is None:
        return None
    n = len(kernel)
    pads = list(given.get("pads", [0] * 2 * n))
    settings: dict[str, Any] = {
        "stride": tuple(given.get("strides", [1] * n)),
        "dilation": tuple(given.get("dilations", [1] * n)),
        "groups": int(given.get("group", 1)),
        "padding": tuple(pads[:n]),
        "padding_after": tuple(pads[n:]),
    }
    if operator == "ConvTranspose":
        if "output_shape" in given:
            return None
        settings["output_padding"] = tuple(given.get("output_padding", [0] * n))
    return LayerInput(layer=layer, value=proto.input[0], turned=False, settings=settings)
