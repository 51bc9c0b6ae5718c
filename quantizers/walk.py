"""Run models side by side over the same samples, from one layer to the next.

Rounding layer after layer needs, at every layer, its inputs in full precision and its inputs in the
model whose earlier layers are quantized already, or in several such models. Each model runs on each
batch in a thread of its own that stops at every layer; one thread runs at a time, or all of a
batch. So every model runs once, whatever the number of layers, and holds no more than the
activations between two layers.

Design: docs/design/rounding.md
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitquota.models.batch_norm import moved_batch_norms, observed_statistics
from bitquota.models.calls import LayerWatcher, tensor_key
from bitquota.models.heap import share_one_heap
from bitquota.models.onnx.program import source_of
from bitquota.models.onnx.steps import Steps, layer_inputs
from bitquota.models.padding import inputs_that_count, padding_mask
from bitquota.models.running import tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.models.batch_norm import Followed
    from bitquota.models.calls import LayerCall


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Meeting:
    """One layer, and what it is about to be multiplied with in each model.

    Attributes:
        layer: Name of the layer.
        settings: Other arguments of its call, as ``input_moments.call_settings`` reads them.
        inputs: For each batch the layer's input in each model; of padded sequences tokens alone.
    """

    layer: str
    settings: dict[str, Any]
    inputs: tuple[tuple[Tensor, ...], ...]


def walk_layers(
    module: nn.Module,
    quantized: Sequence[nn.Module],
    layers: Mapping[str, Layer],
    batches: Sequence[tuple[Tensor, ...]],
    settings_of: Callable[[str, tuple[Any, ...], dict[str, Any]], dict[str, Any]],
    *,
    abreast: bool = False,
    followed: Sequence[dict[tuple[Any, ...], Followed]] = (),
) -> Iterator[Meeting]:
    """Yield each layer before any of the models runs it; what the caller writes into it counts.

    All models run as they are when the caller goes on: it puts the quantized weight of the layer
    into those of ``quantized`` (in place), and later layers see what it does. A layer that runs
    again later in the pass is not yielded twice.

    Args:
        module: The full-precision model in eval mode.
        quantized: Copies of it.
        layers: Layers to stop at, by name.
        batches: Positional arguments of forward passes.
        settings_of: Reads the other arguments of a layer's call.
        abreast: Let all models run on a batch at the same time, each on a processor; not where
            there is something to follow.
        followed: One for each of ``quantized``, or none. Gets what its batch norms saw, which then
            run with statistics moved to fit each batch (``models.batch_norm``).

    Cost: one forward pass of each model; memory for the activations of all batches between two
    layers, in each model.
    """
    share_one_heap()
    by_batch = []
    for batch in batches:
        within: list[AbstractContextManager[object]] = [nullcontext()] * (1 + len(quantized))
        if followed:
            # The full-precision lane must be ahead of the others.
            abreast = False
            seen = observed_statistics()
            within = [seen, *(moved_batch_norms(seen.calls, each) for each in followed)]
        models = zip((module, *quantized), within, strict=True)
        by_batch.append([_Lane(model, layers, batch, context) for model, context in models])
    lanes = [lane for along in by_batch for lane in along]
    done: set[str] = set()
    try:
        _go_on(by_batch, abreast=abreast)
        while waiting := [lane.stop for lane in lanes if lane.stop is not None]:
            name = waiting[0].layer
            stops = [
                [lane.stop for lane in along if lane.stop is not None and lane.stop.layer == name]
                for along in by_batch
            ]
            together = [there for there in stops if len(there) == 1 + len(quantized)]
            if name not in done and together:
                done.add(name)
                call, args, kwargs = together[0][0].call, together[0][0].args, together[0][0].kwargs
                yield Meeting(
                    layer=name,
                    settings=settings_of(call.operator, args, kwargs),
                    inputs=tuple(tuple(stop.inputs for stop in there) for there in together),
                )
            _go_on(by_batch, name, abreast=abreast)
    finally:
        for lane in lanes:
            lane.end()


def walk_onnx(
    modules: Sequence[nn.Module],
    layers: Mapping[str, Layer],
    batches: Iterable[tuple[Tensor, ...]],
) -> Iterator[Meeting]:
    """Yield each layer of ONNX graphs before any of the models runs it, as ``walk_layers``.

    Args:
        modules: Models of one graph, whose weights may differ.
        layers: Layers to stop at; those that no single product multiplies with are passed over.
        batches: Positional arguments of forward passes.

    Cost: one forward pass of each model; memory for the activations of all batches between two
    layers.
    """
    source = source_of(modules[0])
    assert source is not None  # noqa: S101  # callers ask first
    program = source.program("eval")
    paths = {layer.weight_name: name for name, layer in layers.items()}
    pieces = [piece for batch in batches for piece in source.pieces(batch)]
    runs = [[Steps(program, source, module, piece) for module in modules] for piece in pieces]
    for place in layer_inputs(program, source, paths):
        inputs = []
        for together in runs:
            values = [torch.from_numpy(steps.upto(place.value)).float() for steps in together]
            inputs.append(tuple(v.transpose(-1, -2) if place.turned else v for v in values))
        yield Meeting(
            layer=place.layer,
            settings=place.settings,
            inputs=tuple(inputs),
        )


class _Ended(BaseException):
    """Unwinds a lane that is no longer wanted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stop:
    layer: str
    call: LayerCall
    inputs: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Lane:
    """One model on one batch, in a thread that stops at each layer until it is told to go on."""

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, Layer],
        inputs: tuple[Tensor, ...],
        within: AbstractContextManager[object],
    ) -> None:
        names = {
            tensor_key(tensor_of(module, layer.weight_name)): name for name, layer in layers.items()
        }
        self.stop: _Stop | None = None
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._ended = False
        self._within = within
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(module, names, inputs), name="rounding lane", daemon=True
        )
        self._thread.start()

    def start(self) -> None:
        """Begin to run to the next layer."""
        self.stop = None
        self._turn.release()

    def arrive(self) -> None:
        """Wait until it is there, or at the end: then ``stop`` is ``None``."""
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Give up what is left of the pass."""
        self._ended = True
        self._turn.release()
        self._thread.join()

    def _run(
        self, module: nn.Module, names: dict[tuple[Any, ...], str], inputs: tuple[Tensor, ...]
    ) -> None:
        self._turn.acquire()
        try:
            if not self._ended:
                mask = padding_mask(module, inputs)
                with torch.no_grad(), self._within, _Stopping(names, mask, self._wait):
                    module(*inputs)
        except _Ended:
            pass
        except BaseException as err:  # noqa: BLE001  # raised again where the walk is
            self._error = err
        finally:
            self.stop = None
            self._back.release()

    def _wait(self, stop: _Stop) -> None:
        self.stop = stop
        self._back.release()
        self._turn.acquire()
        if self._ended:
            raise _Ended


def _go_on(by_batch: Sequence[Sequence[_Lane]], name: str | None = None, *, abreast: bool) -> None:
    """Run all lanes that wait at a layer, or all for a start, to the next layer."""
    for along in by_batch:
        moving = [one for one in along if name is None or (one.stop and one.stop.layer == name)]
        for together in (moving,) if abreast else [[one] for one in moving]:
            for lane in together:
                lane.start()
            for lane in together:
                lane.arrive()


class _Stopping(LayerWatcher[str]):
    def __init__(
        self,
        names: dict[tuple[Any, ...], str],
        mask: Tensor | None,
        wait: Callable[[_Stop], None],
    ) -> None:
        super().__init__(names)
        self._mask = mask
        self._wait = wait

    def around(
        self,
        known: str,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Stop, then run the call with what the weight is by then."""
        inputs = inputs_that_count(call, self._mask)
        self._wait(_Stop(layer=known, call=call, inputs=inputs, args=args, kwargs=kwargs))
        return func(*args, **kwargs)
