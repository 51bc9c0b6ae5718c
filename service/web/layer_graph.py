"""Which layer reads which: the graph of a model's layers, for the drawing on its page.

The graph of a ``.pt2`` or ONNX file is walked by the names of its values; no tensor is computed and
nothing runs. Between two layers there is an edge where a value gets from one to the other and
through no third layer. An edge that a longer way makes unnecessary is left out, as a residual
connection past a block: otherwise each layer of a transformer would have one from all before.

Design: docs/design/web-pages.md
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquota.candidates.layers import Inventory
from bitquota.models.pt2.vetting import vet_pt2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bitquota.canonical import JsonObject

Call = tuple[list[str], list[str]]
"""Names of the values that an operation reads and makes."""

MOST_BYTES = 512 * 2**20
"""Of a file that is read for it: the tensors of an ONNX file are in memory meanwhile."""


def graph_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return ``{"order": [layer, …], "edges": [[from, to], …] or null}``, layers by position."""
    inventory = Inventory.from_json(json.loads(Path(arguments["inventory"]).read_bytes()))
    names = [layer.name for layer in inventory.layers]
    position = {layer.weight_name: k for k, layer in enumerate(inventory.layers)}
    order, edges = list(range(len(names))), None
    read = {"pt2": _of_pt2, "onnx": _of_onnx}.get(arguments["format"])
    path = Path(arguments["model"] or "")
    # A file that is gone, or that only its evaluator can read, leaves the order of the model.
    with contextlib.suppress(Exception):
        if read is not None and path.stat().st_size <= MOST_BYTES:
            inputs, weights, calls = read(path)
            known = {value: position[w] for value, w in weights.items() if w in position}
            reached, found = layer_edges(inputs, known, calls)
            order = reached + sorted(set(order).difference(reached))
            place = {layer: at for at, layer in enumerate(order)}
            edges = sorted([place[a], place[b]] for a, b in found)
    said = {"order": [names[k] for k in order], "edges": edges}
    return {}, json.dumps(said, separators=(",", ":")).encode()


def layer_edges(
    inputs: Iterable[str], weights: dict[str, int], calls: Iterable[Call]
) -> tuple[list[int], set[tuple[int, int]]]:
    """Return the layers in the order in which they run, and the edges between them.

    Args:
        inputs: Values that differ from sample to sample.
        weights: Value to the layer whose weight it is.
        calls: Operations in order.

    Cost: O(layers) bits for each operation.
    """
    weights = dict(weights)
    behind: dict[str, frozenset[int]] = dict.fromkeys(inputs, frozenset())
    before: dict[int, int] = {}  # bit k of before[layer]: layer k runs in front of it
    edges: set[tuple[int, int]] = set()
    for reads, makes in calls:
        own = [weights[name] for name in reads if name in weights]
        moving = [name for name in reads if name in behind]
        if not moving:
            # A weight that is transposed or cast remains the weight.
            weights |= {name: own[0] for name in makes if own}
            continue
        sources = _nearest(frozenset().union(*(behind[name] for name in moving)), before)
        for layer in own:
            if layer not in before:
                before[layer] = 0
            for source in sources:
                # A layer that is used twice would otherwise come before itself.
                if source != layer and not before[source] >> layer & 1:
                    before[layer] |= before[source] | 1 << source
                    edges.add((source, layer))
        behind |= dict.fromkeys(makes, frozenset(own) if own else sources)
    return list(before), edges


def _nearest(sources: frozenset[int], before: dict[int, int]) -> frozenset[int]:
    """Return the sources that do not run in front of another of them."""
    passed = 0
    for source in sources:
        passed |= before[source]
    return frozenset(source for source in sources if not passed >> source & 1)


def _of_pt2(path: Path) -> tuple[list[str], dict[str, str], list[Call]]:
    """Return inputs, names of parameters by value, and calls."""
    program = vet_pt2(path).program["graph_module"]
    inputs: list[str] = []
    weights: dict[str, str] = {}
    for spec in program["signature"]["input_specs"]:
        if (body := spec.get("parameter")) is not None:
            weights[body["arg"]["name"]] = body["parameter_name"]
        elif (body := spec.get("user_input")) is not None:
            inputs.extend(_names(body))
    nodes = program["graph"]["nodes"]
    return inputs, weights, [([*_names(n["inputs"])], [*_names(n["outputs"])]) for n in nodes]


def _names(value: Any) -> Iterator[str]:  # noqa: ANN401  # JSON
    """Yield every name of a tensor in an argument."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in {"as_tensor", "as_tensors", "as_optional_tensor", "as_optional_tensors"}:
                yield from _named(item)
            elif isinstance(item, (dict, list)):
                yield from _names(item)


def _named(value: Any) -> Iterator[str]:  # noqa: ANN401  # JSON
    if isinstance(value, list):
        for item in value:
            yield from _named(item)
    elif isinstance(value, dict):
        if isinstance(value.get("name"), str):
            yield value["name"]
        else:
            yield from _names(value)


def _of_onnx(path: Path) -> tuple[list[str], dict[str, str], list[Call]]:
    """Return inputs, names of initializers by value, and calls."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in stored]
    calls = [(list(node.input), list(node.output)) for node in graph.node]
    return inputs, {name: name for name in stored}, calls
