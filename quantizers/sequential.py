"""Round layer after layer: each to what its inputs are once the earlier layers are rounded.

References:
    [QEP] Y. Arai, Y. Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise
    Post-Training Quantization", 2025, arXiv 2504.09629.
    [GPTQ] arXiv 2210.17323.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.layers import MATRICES, LayerKind
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.models.calls import CallCounter, Given, tensor_key
from bitquota.models.heap import give_back
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.onnx.program import source_of
from bitquota.models.processes import Processes
from bitquota.models.running import tensor_of
from bitquota.quantizers.gptq import forget_factors
from bitquota.quantizers.input_moments import call_settings, moment, patches, positions_of
from bitquota.quantizers.qep import Propagation, propagated
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.shrinkage import shrink
from bitquota.quantizers.walk import walk_layers, walk_onnx
from bitquota.quantizers.weights import joined_rows, quantize, row_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate
    from bitquota.context import Context
    from bitquota.models.batch_norm import Followed
    from bitquota.models.calls import LayerCall
    from bitquota.quantizers.quantized_weights import QuantizedWeights
    from bitquota.quantizers.walk import Meeting
    from bitquota.quantizers.weights import QuantizedWeight

APART = frozenset({LayerKind.EMBEDDING, LayerKind.EXPERTS, *MATRICES})
"""Kinds whose weights no watched operator multiplies with whole rows."""

FORK_WORTH = 2**31
"""Products from which on moments are taken in several processes: a quarter of a second."""

STAGE = "rounding"
"""Name for progress."""

QEP = "qep"
AUTO = "auto"
"""As ``qep`` where that is possible and better, else to nearest."""
LEARNED = "learned"
"""As ``qep``, then learned block by block (``learned.learn_in_blocks``)."""


def rounder_in(rounding: str) -> Rounder:
    """Return what rounds a single layer where plans are rounded as ``rounding`` says."""
    return Rounder.GPTQ if rounding == QEP else Rounder(rounding)


def round_in_sequence(
    module: nn.Module,
    quantized: Sequence[nn.Module],
    candidates: Sequence[Mapping[str, Candidate]],
    batches: Sequence[tuple[Tensor, ...]],
    weights: QuantizedWeights,
    *,
    rounding: str,
    followed: Sequence[dict[tuple[Any, ...], Followed]] = (),
    context: Context | None = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> list[dict[str, QuantizedWeight]]:
    """Quantize the weights of ``quantized`` in place, one layer after the other as they run.

    Each layer is rounded with error feedback to the second moment of the inputs that it gets in
    the model whose earlier layers are quantized already; with ``qep`` what it is rounded to also
    makes up for part of what they did to its inputs. Layers that no single call shows (embeddings,
    experts, gates of recurrent layers, weights that are used several times in a pass) are
    quantized beforehand, by themselves.

    Args:
        module: The full-precision model in eval mode.
        quantized: Copies of it; their inputs are quantized already, where they will be.
        candidates: For each of them what each layer becomes, by name; layers in full precision may
            be left out. Each comes out as it would alone: they only share what is to be seen of
            ``module``.
        batches: Positional arguments of forward passes.
        weights: Quantizers of single layers.
        rounding: ``gpfq``, ``gptq`` or ``qep``.
        followed: As in ``walk_layers``: where statistics of batch norms will be moved, layers are
            rounded to inputs that they have then. Nothing is put in for an ONNX graph.
        context: Told of each layer, and asked before it whether to go on.
        processes: Share layers that are given the same, such as q, k and v.

    Returns:
        For each of ``quantized`` codes and scales by layer name.

    Raises:
        Cancelled: The context said so.

    Cost: one forward pass of each model over the batches, and for each layer the moments of its
    inputs and the rounding itself. Deterministic.
    """
    chosen = [
        {name: c for name, c in each.items() if c.weight_bits != FULL_PRECISION_BITS}
        for each in candidates
    ]
    layers = {name: weights.layer(name) for each in chosen for name in each}
    onnx = source_of(module) is not None
    # In an ONNX graph the walk itself knows where a weight is read once.
    once = dict.fromkeys(layers, -1) if onnx else _called_once(module, layers, batches[0])
    found: list[dict[str, QuantizedWeight]] = [{} for _ in quantized]

    def put(k: int, name: str, stored: QuantizedWeight) -> None:
        found[k][name] = stored
        place = tensor_of(quantized[k], layers[name].weight_name)
        with torch.no_grad():
            place.copy_(from_matrix(stored.dequantize().to(place.dtype), layers[name]))

    for k, each in enumerate(chosen):
        for name, candidate in each.items():
            if name not in once:
                put(k, name, weights.stored(candidate))
    walked = {name: layer for name, layer in layers.items() if name in once}
    meetings = (
        walk_onnx([module, *quantized], walked, batches)
        if onnx
        else walk_layers(
            module,
            quantized,
            walked,
            batches,
            call_settings,
            followed=followed,
            abreast=processes.count > 1,
        )
    )
    moments: _Moments | None = None
    ahead: list[dict[str, QuantizedWeight]] = [{} for _ in quantized]
    for done, meeting in enumerate(meetings):
        if context is not None:
            context.check(STAGE)
            context.report(STAGE, done, len(walked), weight=0.0)
        name = meeting.layer
        layer = layers[name]
        which = [k for k, each in enumerate(chosen) if name in each]
        if moments is None or not moments.are_of(meeting, layer, which):
            moments = None
            ahead = [{} for _ in quantized]
            give_back()
            moments = _Moments(meeting, layer, which, processes)
        for k in which:
            if name not in ahead[k]:
                together = [name]
                if processes.count > 1:
                    alike = (n for n in walked if once[n] == once[name] >= 0 and n in chosen[k])
                    together += [n for n in alike if n != name and n not in found[k]]
                rounded = _Rounded(*moments.of[k], weights, chosen[k], layers, rounding)
                ahead[k] |= rounded.found(together, processes)
            put(k, name, ahead[k].pop(name))
    del moments
    forget_factors()
    # What the samples never reach is rounded by itself.
    for k, each in enumerate(chosen):
        for name, candidate in each.items():
            if name not in found[k]:
                put(k, name, weights.stored(candidate))
    return found


class _Rounded:
    """Layers that are given what moments are of (``_Moments.of``), each rounded by itself.

    Large weights are rounded some rows at a time, whatever the number of processes: no row depends
    on another, and in float64 the whole would take several times its own memory.
    """

    def __init__(
        self,
        gram: Tensor,
        cross: Tensor,
        weights: QuantizedWeights,
        chosen: Mapping[str, Candidate],
        layers: Mapping[str, Layer],
        rounding: str,
    ) -> None:
        self._gram, self._cross, self._weights = gram, cross, weights
        self._chosen, self._layers, self._rounding = chosen, layers, rounding
        self._propagation: Propagation | None = None

    def found(self, names: Sequence[str], processes: Processes) -> dict[str, QuantizedWeight]:
        """Return what the layers become; their rows are shared by processes."""
        tasks = [
            (name, rows)
            for name in names
            for rows in row_blocks(
                self._layers[name].rows,
                self._layers[name].columns,
                self._chosen[name].scheme,
                self._gram,
            )
        ]
        if self._rounding == QEP and len(tasks) > len(names):
            self._propagation = Propagation(self._gram, self._cross)

        def tensors(k: int) -> dict[str, Tensor]:
            return self._quantized(*tasks[k]).tensors()

        parts: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in names}
        for (name, _), part in zip(tasks, processes.map(tensors, len(tasks)), strict=True):
            parts[name].append(part)
        return {
            name: joined_rows(
                parts.pop(name), self._chosen[name].weight_bits, self._chosen[name].scheme
            )
            for name in names
        }

    def _quantized(self, name: str, rows: range) -> QuantizedWeight:
        whole = to_matrix(self._weights.original(name).detach(), self._layers[name])
        importance = self._weights.importance.get(name)
        if importance is not None and len(rows) < len(whole):
            importance = importance.expand_as(whole)[rows.start : rows.stop]
        matrix = whole[rows.start : rows.stop].double()
        gram, cross = self._gram, self._cross
        if self._rounding == QEP:
            apart = self._propagation if len(rows) < len(whole) else None
            matrix = propagated(matrix, gram, cross) if apart is None else apart.of(matrix)
        return quantize(
            matrix,
            self._chosen[name].weight_bits,
            self._chosen[name].scheme,
            importance=importance,
            inputs_gram=gram,
            rounding=rounder_in(self._rounding),
        )


class _Moments:
    """Moments of a layer's inputs; layers that are given the same share them.

    Attributes:
        of: By quantized model ``Xq^T Xq`` and ``X^T Xq``, f64[groups, columns, columns] each,
            shrunk.
    """

    def __init__(
        self, meeting: Meeting, layer: Layer, which: Sequence[int], processes: Processes
    ) -> None:
        n = 2 * len(which)
        sums: list[Tensor] = []
        positions = 0
        limit = positions_of(layer, meeting.settings, len(meeting.inputs))
        held: dict[int, list[Tensor]] = {}
        # A router may send other tokens to an expert of a quantized model: then rows of its inputs
        # and of those in full precision are no pairs, and its own count alone.
        paired = [
            all(along[1 + j].shape == along[0].shape for along in meeting.inputs) for j in which
        ]

        def product(number: int) -> dict[str, Tensor]:
            """Return what one batch adds to one of the sums."""
            b, k = divmod(number, n)
            if b not in held:
                full, *others = meeting.inputs[b]
                held.clear()
                wanted = (full, *(others[j] for j in which))
                held[b] = [patches(x, layer, meeting.settings, limit) for x in wanted]
            xq = held[b][1 + k // 2]
            x = held[b][0] if paired[k // 2] else xq
            count = torch.tensor(0 if k else held[b][0].shape[1])
            return {"product": moment(x if k % 2 else xq, xq, layer), "positions": count}

        size = layer.columns * sum(full.numel() for full, *_ in meeting.inputs)
        worth = processes if size > FORK_WORTH else Processes()
        for number, found in enumerate(worth.map(product, n * len(meeting.inputs))):
            if number < n:
                sums.append(found["product"].double())
            else:
                sums[number % n] += found["product"]
            positions += int(found["positions"])
        self.of = dict(zip(which, zip(sums[::2], sums[1::2], strict=True), strict=True))
        for gram, cross in self.of.values():
            shrink(gram, positions, cross)
        self._inputs, self._states = meeting.inputs, _states(meeting)

    def are_of(self, meeting: Meeting, layer: Layer, which: Sequence[int]) -> bool:
        """Whether a layer is given the same tensors."""
        same = set(which) <= self.of.keys() and self._states == _states(meeting)
        return same and not layer.kind.name.startswith("CONV")


def _states(meeting: Meeting) -> list[tuple[int, int]]:
    """Return what tells the inputs of a meeting, as long as they are held, from any others."""
    return [(id(t), t._version) for along in meeting.inputs for t in along]  # noqa: SLF001  # counts writes


def _called_once(
    module: nn.Module, layers: Mapping[str, Layer], batch: tuple[Tensor, ...]
) -> dict[str, int]:
    """Return the layers that one call of a pass multiplies with, and which of them are alike.

    Those that are given the same, one after the other, such as q, k and v, have the same number.
    Costs a pass over a sample.
    """
    counting = _Sources(
        {
            tensor_key(tensor_of(module, layer.weight_name)): name
            for name, layer in layers.items()
            if layer.kind not in APART
        }
    )
    with torch.no_grad(), counting:
        module(*(tensor[:2] for tensor in batch))
    return {name: counting.of[name] for name, calls in counting.calls.items() if calls == 1}


class _Sources(CallCounter):
    """Tells layers that are given the same tensor from others.

    Attributes:
        of: A number for what each layer was given last.
    """

    def __init__(self, known: Mapping[tuple[Any, ...], str]) -> None:
        super().__init__(known)
        self.of: dict[str, int] = {}
        self._given = Given()

    def around(
        self,
        known: str,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Note what a layer is given."""
        self.of[known] = self._given.number(call.inputs)
        return super().around(known, call, func, args, kwargs)
