"""Where the scale of a channel goes: which layers read what a layer or a norm puts out.

A layer's output channels, or those of a norm with a weight, may be divided by positive numbers, and
the input channels of everything that reads them multiplied with the same numbers, without changing
what the model computes, if nothing but layers reads them and each channel reaches them times its
factor, and by itself. Whether it does is found by running the model on a few samples, not from the
names of its modules:

1. One pass notes, for every such *producer*, which layers its values reach before another layer or
   norm. It is dropped where its values are added to others that lack them, as on residual paths, or
   reach a norm, an output, or a layer that runs more than once.
2. Some passes multiply producers' outputs with powers of two, other ones for each channel, and
   compare the inputs of their readers with those of the first pass. Powers of two change no digit,
   so whatever passes a channel on times its factor (ReLU, pooling, attention's values, a gate's
   other half) gives equal bits, and whatever does not (GELU, a norm, a bias on the way) differs.
   Readers are handed the inputs of the first pass, so that producers do not mix; those that share a
   reader take turns.

Which input channel belongs to which output channel shows in the factors, so repeated heads and
flattened positions are found too.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.layers import MATRICES, LayerKind
from bitquota.models.calls import (
    LayerCall,
    LayerWatcher,
    parameter_owners,
    tensor_key,
    tensors_in,
    with_input,
)
from bitquota.models.running import tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer

    Owner = tuple[nn.Module, str, str]

FARTHEST = 8
"""Factors of a probe are 2^-8 to 2^8: a clamp that any channel comes near to shows."""

MOST_READERS = 64
"""Producers with more readers are dropped."""

NORMS = {"batch_norm": 1, "layer_norm": -1, "native_layer_norm": -1, "rms_norm": -1,
         "group_norm": 1, "mul": -1, "multiply": -1, "__mul__": -1, "__rmul__": -1,
         "_native_batch_norm_legit_no_training": 1}  # fmt: skip
"""Operators with a weight for each channel, and the axis of their output that counts channels."""

_SUMS = frozenset({"add", "sub", "add_", "sub_", "__add__", "__radd__", "__iadd__", "__sub__",
                   "__rsub__", "__isub__", "cat", "concat", "stack", "where"})  # fmt: skip
"""Operators that put values beside each other, or on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A layer that reads channels of a producer.

    Attributes:
        layer: Its name.
        repeats: Input channels for each output channel of the producer.
        block: Input channel ``(a * repeats + q) * block + b`` reads output channel
            ``a * block + b``, for every ``q`` below ``repeats``.
    """

    layer: str
    repeats: int = 1
    block: int = 1

    def spread(self, per_channel: Tensor) -> Tensor:
        """Return the value of each input channel: ``[channels]`` to ``[channels * repeats]``."""
        blocks = per_channel.reshape(-1, 1, self.block).expand(-1, self.repeats, -1)
        return blocks.reshape(-1)

    def gathered(self, per_input: Tensor) -> Tensor:
        """Return the mean over the input channels of each output channel."""
        return per_input.reshape(-1, self.repeats, self.block).mean(dim=1).reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPair:
    """A producer whose output channels may be scaled, and all layers that read them.

    Attributes:
        weight: Name of the producer's weight: of a layer, or the vector of a norm.
        bias: Name of its bias, if it has one.
        layer: Name of the producer where it is a layer.
        channels: Its output channels.
        readers: What reads them.
    """

    weight: str
    bias: str | None = None
    layer: str | None = None
    channels: int
    readers: tuple[Reader, ...]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Return the pair of ``dataclasses.asdict``; raises ``TypeError`` if it is none."""
        readers = tuple(Reader(**reader) for reader in stored["readers"])
        return cls(**{**stored, "readers": readers})


def channel_pairs(
    module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> list[ChannelPair]:
    """Return every producer of ``module`` whose channels may be scaled, in the order they run.

    Exact for what the samples show: a function that is linear on them and bends elsewhere (a clamp
    that no value comes near to times 2^8) is taken for linear.

    Args:
        module: The model in eval mode, not an ONNX graph.
        inventory: Its layers.
        inputs: Positional arguments of one pass over few samples.

    Cost: one pass, and one for each set of producers that share no reader (three for a decoder).
    """
    flow = Flow(module, inventory)
    with torch.no_grad(), flow:
        result = module(*inputs)
    flow.drop(flow.sources_in(result))
    waiting = {
        name: producer
        for name, producer in flow.producers.items()
        if producer.readers and flow.can_be_scaled(producer)
    }
    found: dict[str, ChannelPair] = {}
    generator = torch.Generator().manual_seed(0)
    while waiting:
        # Producers whose readers nothing else of this pass reaches.
        taken: set[str] = set()
        probed: dict[str, Producer] = {}
        for name, producer in waiting.items():
            if not taken & producer.readers.keys():
                probed[name] = producer
                taken |= producer.readers.keys()
        for name in probed:
            del waiting[name]
        probe = _Scaled(flow, probed, generator)
        with torch.no_grad(), probe:
            module(*inputs)
        found |= probe.pairs()
    return [found[name] for name in flow.producers if name in found]


@dataclass(slots=True, kw_only=True, eq=False)
class Producer:
    """A layer or norm.

    Attributes:
        weight: Name of its weight.
        bias: Its bias, if it has one.
        layer: Name, where it is a layer.
        axis: Axis of its output that counts channels.
        channels: How many.
        readers: What its values reach, in order of execution.
        dropped: Whether they reach something else too.
    """

    weight: str
    bias: Tensor | None
    layer: str | None
    axis: int
    channels: int
    readers: dict[str, None] = field(default_factory=dict)
    dropped: bool = False


class ChannelWatcher(LayerWatcher["Layer"]):
    """Tells layers and norms from all other functions."""

    def __init__(
        self, known: Mapping[tuple[Any, ...], Layer], owners: Mapping[tuple[Any, ...], list[Owner]]
    ) -> None:
        super().__init__(known)
        self.owners = owners

    def elsewhere(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Hand a norm with a parameter for each channel to ``at_norm``, others to ``at_other``."""
        if operator in NORMS:
            vectors = [
                (tensor, self.owners[tensor_key(tensor)][0][2])
                for tensor in tensors_in((args, kwargs))
                if tensor.ndim == 1 and tensor_key(tensor) in self.owners
            ]
            vectors = [(v, n) for v, n in vectors if isinstance(v, torch.nn.Parameter)]
            if vectors:
                return self.at_norm(operator, vectors, func, args, kwargs)
        return self.at_other(operator, func, args, kwargs)

    def at_norm(
        self,
        operator: str,
        vectors: list[tuple[Tensor, str]],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run an operator with a weight for each channel."""
        raise NotImplementedError

    def at_other(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run anything else."""
        del operator
        return func(*args, **kwargs)


class Flow(ChannelWatcher):
    """The first pass: what reaches which layer, and the inputs of all layers."""

    def __init__(self, module: nn.Module, inventory: Inventory) -> None:
        known = {
            tensor_key(tensor_of(module, layer.weight_name)): layer
            for layer in inventory.layers
            if layer.kind is not LayerKind.EXPERTS and layer.kind not in MATRICES
        }
        super().__init__(known, parameter_owners(module))
        self.producers: dict[str, Producer] = {}
        self.inputs: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._elsewhere: set[str] = set()
        self._sources: dict[int, frozenset[str]] = {}
        self._alive: list[Any] = []

    def sources_in(self, value: Any) -> frozenset[str]:  # noqa: ANN401
        """Return the producers whose values a structure of tensors depends on."""
        none: frozenset[str] = frozenset()
        return none.union(*(self._sources.get(id(tensor), none) for tensor in tensors_in(value)))

    def drop(self, names: Iterable[str]) -> None:
        """Take producers from the list."""
        for name in names:
            self.producers[name].dropped = True

    def can_be_scaled(self, producer: Producer) -> bool:
        """Return whether no other place would change with the producer's tensors."""
        held = [self.owners_of(producer.weight)]
        if producer.bias is not None:
            held.append(self.owners.get(tensor_key(producer.bias), []))
        return (
            not producer.dropped
            and len(producer.readers) <= MOST_READERS
            and all(len(owners) == 1 for owners in held)
            and producer.layer not in self._elsewhere
            and all(self.owned_once(reader) for reader in producer.readers)
        )

    def owners_of(self, name: str) -> list[Owner]:
        """Return every place that holds the parameter called ``name``."""
        return next(o for o in self.owners.values() if any(full == name for _, _, full in o))

    def owned_once(self, layer: str) -> bool:
        """Return whether only layers read a layer's weight, under one name."""
        key = next(key for key, known in self.known.items() if known.name == layer)
        return layer not in self._elsewhere and len(self.owners.get(key, [])) == 1

    def around(
        self,
        known: Layer,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Note who reaches the layer; what it puts out is its own."""
        layer = known.name
        sources = self.sources_in(call.inputs)
        for name in sources:
            self.producers[name].readers[layer] = None
        result = func(*args, **kwargs)
        if layer in self._seen:
            self.drop({*sources, *self._readers_of(layer), layer})
        self.inputs[layer] = call.inputs.detach().clone()
        self.produce(
            layer,
            Producer(
                weight=self.owners[tensor_key(call.weight)][0][2],
                bias=call.bias,
                layer=layer,
                axis=call.channel_axis,
                channels=result.shape[call.channel_axis],
            ),
            result,
        )
        return result

    def _readers_of(self, layer: str) -> list[str]:
        return [n for n, producer in self.producers.items() if layer in producer.readers]

    def at_norm(
        self,
        operator: str,
        vectors: list[tuple[Tensor, str]],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Drop what reaches the norm; what it puts out is its own."""
        self.drop(self.sources_in((args, kwargs)))
        result = func(*args, **kwargs)
        output = next(tensors_in(result))
        (weight, name), *rest = vectors
        producer = Producer(
            weight=name,
            bias=rest[0][0] if rest else None,
            layer=None,
            axis=NORMS[operator],
            channels=len(weight),
        )
        producer.dropped = len(rest) > 1 or output.shape[producer.axis] != len(weight)
        self.produce(name, producer, result)
        return result

    def produce(self, name: str, producer: Producer, result: Any) -> None:  # noqa: ANN401
        """Note that a producer put out ``result``."""
        if name in self._seen:
            self.producers[name].dropped = True
        else:
            self.producers[name] = producer
        self._seen.add(name)
        self._keep(result, frozenset({name}))

    def at_other(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Pass on where values come from; drop what is added to something else."""
        own = [self.sources_in(tensor) for tensor in tensors_in((args, kwargs))]
        sources = frozenset[str]().union(*own)
        result = func(*args, **kwargs)
        if next(tensors_in(result), None) is not None:
            # A weight that another operator reads, as an embedding reads that of a tied head.
            keys = [tensor_key(tensor) for tensor in tensors_in((args, kwargs))]
            self._elsewhere.update(self.known[key].name for key in keys if key in self.known)
        if operator in _SUMS or result is None:
            self.drop(name for name in sources if any(name not in part for part in own))
        if result is None:  # written into, as by x[...] = y
            self.drop(sources)
        self._keep(result, sources)
        return result

    def _keep(self, result: Any, sources: frozenset[str]) -> None:  # noqa: ANN401
        for tensor in tensors_in(result):
            self._sources[id(tensor)] = sources
        # An identity is not used again while its tensor lives.
        self._alive.append(result)


class Probe(ChannelWatcher):
    """A later pass: some producers changed, every layer handed its input of the first pass."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.known, flow.owners)
        self.first = flow.inputs

    def look(self, layer: str, call: LayerCall) -> None:
        """Compare the input of a layer with that of the first pass."""
        raise NotImplementedError

    def changed(self, name: str, output: Tensor) -> Tensor:
        """Return what a layer or norm puts out in this pass."""
        raise NotImplementedError

    def around(
        self,
        known: Layer,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Look at the input, and go on with that of the first pass."""
        self.look(known.name, call)
        args, kwargs = with_input(call.operator, args, kwargs, self.first[known.name])
        return self._changed(known.name, func(*args, **kwargs))

    def at_norm(
        self,
        operator: str,
        vectors: list[tuple[Tensor, str]],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Change what a probed norm puts out."""
        del operator
        return self._changed(vectors[0][1], func(*args, **kwargs))

    def _changed(self, name: str, result: Any) -> Any:  # noqa: ANN401
        if isinstance(result, torch.Tensor):
            return self.changed(name, result)
        return (self.changed(name, result[0]), *result[1:])


class _Scaled(Probe):
    """Multiplies what producers put out with powers of two."""

    def __init__(
        self, flow: Flow, probed: Mapping[str, Producer], generator: torch.Generator
    ) -> None:
        super().__init__(flow)
        self._probed = probed
        self._exponents = {
            name: factors_of(producer.channels, generator) for name, producer in probed.items()
        }
        self._reads = {r: name for name, p in probed.items() for r in p.readers}
        self._found: dict[str, Reader | None] = {}

    def pairs(self) -> Iterator[tuple[str, ChannelPair]]:
        """Yield the producers whose readers all get what they got before, times its factors."""
        for name, producer in self._probed.items():
            readers = [found for r in producer.readers if (found := self._found.get(r)) is not None]
            if len(readers) == len(producer.readers):
                bias = None if producer.bias is None else self.owners[tensor_key(producer.bias)]
                yield (
                    name,
                    ChannelPair(
                        weight=producer.weight,
                        bias=None if bias is None else bias[0][2],
                        layer=producer.layer,
                        channels=producer.channels,
                        readers=tuple(readers),
                    ),
                )

    def look(self, layer: str, call: LayerCall) -> None:
        """Find which channel each input of a reader follows."""
        if layer in self._reads:
            exponents = self._exponents[self._reads[layer]]
            self._found[layer] = reader_of(
                layer, self.first[layer], call.inputs, call.channel_axis, exponents
            )

    def changed(self, name: str, output: Tensor) -> Tensor:
        """Scale what a probed producer puts out."""
        if name not in self._probed:
            return output
        shape = [1] * output.ndim
        shape[self._probed[name].axis] = -1
        return output * torch.exp2(self._exponents[name]).to(output).reshape(shape)


def factors_of(n: int, generator: torch.Generator) -> Tensor:
    """Return f32[n] of whole numbers between -FARTHEST and FARTHEST, never 0."""
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return (torch.randint(1, FARTHEST + 1, (n,), generator=generator) * signs).float()


def reader_of(
    layer: str, first: Tensor, now: Tensor, axis: int, exponents: Tensor
) -> Reader | None:
    """Return which channel each input of a layer follows, or ``None`` if one follows none.

    Args:
        layer: Its name.
        first: Its input as it was.
        now: The same when the producer's channels are multiplied by powers of two.
        axis: That counts input channels.
        exponents: Of these powers, by channel of the producer.
    """
    if now.shape != first.shape:
        return None
    before, after = (x.movedim(axis % x.ndim, 0).flatten(1).double().cpu() for x in (first, now))
    n = len(before)
    if n % len(exponents):
        return None
    # The exponent shows where an input is largest; every other value must have the same.
    at = before.abs().argmax(dim=1, keepdim=True)
    largest, moved = before.gather(1, at).squeeze(1), after.gather(1, at).squeeze(1)
    silent = largest == 0
    seen = torch.where(silent, 0.0, torch.log2((moved / torch.where(silent, 1.0, largest)).abs()))
    if not torch.equal(after, before * torch.exp2(seen)[:, None]):
        return None
    repeats = n // len(exponents)
    for block in range(1, len(exponents) + 1):
        if len(exponents) % block:
            continue
        reader = Reader(layer=layer, repeats=repeats, block=block)
        if bool((silent | (reader.spread(exponents) == seen)).all()):
            return reader
    return None
