"""Where values may be turned: a model's residual stream, and the values of its attention heads.

What a set of layers writes may be multiplied by an orthogonal matrix ``Q``, and what reads it by
``Q`` again, without changing what the model computes, if nothing between treats channels one by
one. Two places are looked for, by running the model on a few samples, not by names of modules:

* The residual stream: RMS norms alone read the sum of what many layers and the embeddings write.
  The root mean square of ``x Q`` is that of ``x``; the norm's weights, which are for each channel,
  are multiplied into the layers that read the norm. Found from which values reach which norm.
* Attention's values: each head's values are weighted and summed over positions, and channels are
  not looked at before the next layer. Found by a pass in which a layer's output is turned in
  blocks of some size, as ``channel_flow`` finds scaled channels.

Whether a place is one is decided by whoever turns it, by the model's outputs.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.layers import LayerKind
from bitquota.errors import InvalidInput
from bitquota.models.calls import tensor_key, tensors_in
from bitquota.models.channel_flow import Flow, Probe, Producer, channel_pairs
from bitquota.models.orthogonal import Orthogonal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.models.calls import LayerCall
    from bitquota.models.channel_flow import ChannelPair

Side = tuple[str, int]
"""A tensor, and its axis that counts channels of a place."""

LARGEST_HEAD = 512
"""Channels of an attention head at most."""

SAME = 1e-4
"""Relative difference of turned inputs up to which they are what was expected."""

_SCALES = frozenset({"rms_norm", "mul", "multiply", "__mul__", "__rmul__"})
"""The last operator of an RMS norm."""

_OUTPUT_AXIS = {LayerKind.LINEAR: 0, LayerKind.LINEAR_TRANSPOSED: 1, LayerKind.EMBEDDING: 1}
_INPUT_AXIS = {LayerKind.LINEAR: 1, LayerKind.LINEAR_TRANSPOSED: 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedNorm:
    """A norm whose weights are multiplied into what reads it.

    Attributes:
        weight: Name of its weight.
        readers: What is multiplied.
    """

    weight: str
    readers: tuple[Side, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationPlace:
    """Tensors that are turned together.

    Attributes:
        size: Consecutive channels that are mixed with each other.
        sides: What is turned: weights and biases that write, weights that read.
        norms: What is folded before.
    """

    size: int
    sides: tuple[Side, ...]
    norms: tuple[FoldedNorm, ...] = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Return the place of ``dataclasses.asdict``; raises ``TypeError`` if it is none."""
        norms = tuple(
            FoldedNorm(weight=norm["weight"], readers=_sides(norm["readers"]))
            for norm in stored["norms"]
        )
        return cls(**{**stored, "sides": _sides(stored["sides"]), "norms": norms})


def _sides(stored: Any) -> tuple[Side, ...]:  # noqa: ANN401  # of JSON
    return tuple((str(name), int(axis)) for name, axis in stored)


def residual_stream(
    module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> RotationPlace:
    """Return the residual stream of ``module``.

    Args:
        module: The model in eval mode, not an ONNX graph.
        inventory: All its layers.
        inputs: Positional arguments of one pass over few samples.

    Raises:
        InvalidInput: It has none that could be turned, and why.

    Cost: one pass.
    """
    flow = _Stream(module, inventory)
    with torch.no_grad(), flow:
        result = module(*inputs)
    flow.drop(flow.sources_in(result))
    writers = max(flow.norms.values(), key=len, default=frozenset())
    norms = [name for name, sources in flow.norms.items() if sources & writers]
    flow.check(norms, writers, flow.sources_in(result))
    layers = {layer.name: layer for layer in inventory.layers}
    written: dict[Side, None] = {}
    for name in flow.producers:
        if name in writers:
            written |= dict.fromkeys(flow.sides_written(layers[name]))
    folded = [
        FoldedNorm(
            weight=name,
            readers=tuple(_read(layers[reader]) for reader in flow.producers[name].readers),
        )
        for name in norms
    ]
    read = [side for norm in folded for side in norm.readers]
    return RotationPlace(
        size=flow.producers[norms[0]].channels, sides=(*written, *read), norms=tuple(folded)
    )


def _read(layer: Layer) -> Side:
    if layer.kind not in _INPUT_AXIS:
        raise _refused(f"'{layer.name}' reads it, a layer of kind {layer.kind}")
    return layer.weight_name, _INPUT_AXIS[layer.kind]


def _refused(why: str) -> InvalidInput:
    return InvalidInput(
        f"only RMS norms may read a residual stream that is turned, and linear layers write; {why}"
    )


class _Stream(Flow):
    """Notes what reaches each norm. Embeddings write, too."""

    def __init__(self, module: nn.Module, inventory: Inventory) -> None:
        super().__init__(module, inventory)
        self.norms: dict[str, frozenset[str]] = {}
        self._operators: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def at_norm(
        self,
        operator: str,
        vectors: list[tuple[Tensor, str]],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Note where its input comes from."""
        name = vectors[0][1]
        self._operators[name] = operator
        self.norms[name] = self.norms.get(name, frozenset()) | self.sources_in((args, kwargs))
        return super().at_norm(operator, vectors, func, args, kwargs)

    def at_other(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Take what is looked up in an embedding as written by it."""
        result = super().at_other(operator, func, args, kwargs)
        if operator == "embedding":
            for tensor in tensors_in((args, kwargs)):
                known = self.known.get(tensor_key(tensor))
                if known is not None:
                    producer = Producer(
                        weight=known.weight_name,
                        bias=None,
                        layer=known.name,
                        axis=-1,
                        channels=result.shape[-1],
                    )
                    self.produce(known.name, producer, result)
        return result

    def check(self, norms: list[str], writers: frozenset[str], shown: frozenset[str]) -> None:
        """Raise ``InvalidInput`` where values of the writers reach something else."""
        if len(writers) < 2:  # a sum has two parts
            raise _refused("no norm that has a weight for each channel reads a sum of layers")
        size = self.producers[norms[0]].channels
        for name in norms:
            norm = self.producers[name]
            if self._operators[name] not in _SCALES or norm.bias is not None:
                raise _refused(f"'{name}' is a weight of another norm ({self._operators[name]})")
            if self.norms[name] - writers or norm.channels != size:
                raise _refused(f"'{name}' reads something else, too")
            if tied := [r for r in norm.readers if not self.owned_once(r)]:
                raise _refused(
                    f"the weight of '{tied[0]}' has another place, too, as that of a head that is "
                    "tied to the embeddings, and would have to become two"
                )
            if not self.can_be_scaled(norm):
                raise _refused(f"what '{name}' puts out is read by other things than layers")
        # In the order in which they run: the same reason each time.
        writing = {name: made for name, made in self.producers.items() if name in writers}
        if added := [name for name, writer in writing.items() if writer.layer is None]:
            raise _refused(f"the output of the norm '{added[0]}' is added to it")
        for name, writer in writing.items():
            if writer.readers or name in shown or writer.channels != size:
                raise _refused(f"what '{name}' writes is read without a norm")
        if unseen := {layer.name for layer in self.known.values()} - self.producers.keys():
            raise _refused(f"'{min(unseen)}' does not run on the samples")

    def sides_written(self, layer: Layer) -> list[Side]:
        """Return the tensors that a layer writes with."""
        if layer.kind not in _OUTPUT_AXIS:
            raise _refused(f"'{layer.name}' writes it, a layer of kind {layer.kind}")
        bias = self.producers[layer.name].bias
        found = [(layer.weight_name, _OUTPUT_AXIS[layer.kind])]
        if bias is not None:
            found.append((self.owners[tensor_key(bias)][0][2], 0))
        return found


def attention_heads(
    module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> list[RotationPlace]:
    """Return the places where each head's values may be turned, in the order they run.

    Args:
        module: The model in eval mode, not an ONNX graph.
        inventory: All its layers.
        inputs: Positional arguments of one pass over few samples.

    Cost: the passes of ``channel_pairs``, and one for each divisor of a head's channels that is
    tried.
    """
    layers = {layer.name: layer for layer in inventory.layers}
    pairs: dict[str, ChannelPair] = {}
    taken: set[str] = set()
    for pair in channel_pairs(module, inventory, inputs):
        readers = {reader.layer for reader in pair.readers}
        kinds = {layers[name].kind for name in (pair.layer, *readers) if name is not None}
        if pair.layer is not None and kinds <= _INPUT_AXIS.keys() and not taken & readers:
            pairs[pair.layer] = pair
            taken |= readers
    if not pairs:
        return []
    flow = Flow(module, inventory)
    with torch.no_grad(), flow:
        module(*inputs)

    def passing(size: int) -> set[str]:
        fitting = {name: p for name, p in pairs.items() if _heads_of(p) % size == 0}
        if not fitting:
            return set()
        probe = _Turned(flow, fitting, Orthogonal.drawn(size, 0))
        with torch.no_grad(), probe:
            module(*inputs)
        return fitting.keys() - probe.differing

    # A gate treats channels one by one, and no two of them may be mixed.
    waiting = passing(2)
    sizes: dict[str, int] = {}
    for size in sorted({d for name in waiting for d in _divisors(_heads_of(pairs[name]))})[::-1]:
        if waiting - sizes.keys():
            sizes |= dict.fromkeys((passing(size) & waiting) - sizes.keys(), size)
    return [
        RotationPlace(size=sizes[name], sides=tuple(_pair_sides(pair, layers)))
        for name, pair in pairs.items()
        if name in sizes
    ]


def _heads_of(pair: ChannelPair) -> int:
    """Return a multiple of the channels of a head: of one head where heads are repeated."""
    return min(r.block if r.repeats > 1 else pair.channels for r in pair.readers)


def _divisors(n: int) -> list[int]:
    return [d for d in range(2, min(n, LARGEST_HEAD) + 1) if n % d == 0]


def _pair_sides(pair: ChannelPair, layers: Mapping[str, Layer]) -> list[Side]:
    assert pair.layer is not None  # noqa: S101  # norms were left out
    producer = layers[pair.layer]
    found = [(producer.weight_name, _OUTPUT_AXIS[producer.kind])]
    if pair.bias is not None:
        found.append((pair.bias, 0))
    return found + [_read(layers[reader.layer]) for reader in pair.readers]


class _Turned(Probe):
    """Turns what layers put out, and compares what their readers get.

    Attributes:
        differing: Layers whose readers do not get what they got before, turned.
    """

    def __init__(self, flow: Flow, pairs: Mapping[str, ChannelPair], matrix: Orthogonal) -> None:
        super().__init__(flow)
        self._pairs = pairs
        self._matrix = matrix
        self._reads = {r.layer: name for name, pair in pairs.items() for r in pair.readers}
        self.differing: set[str] = set()

    def look(self, layer: str, call: LayerCall) -> None:
        """Compare the input of a reader."""
        if layer not in self._reads:
            return
        first = self.first[layer]
        if call.inputs.shape == first.shape:
            expected = self._matrix.along(first, call.channel_axis)
            change, moved = (call.inputs - expected).norm(), (first - expected).norm()
            # Where nothing moves, nothing shows.
            if change <= SAME * first.norm() and moved > 0:
                return
        self.differing.add(self._reads[layer])

    def changed(self, name: str, output: Tensor) -> Tensor:
        """Turn what a probed layer puts out."""
        return self._matrix.along(output, -1) if name in self._pairs else output
