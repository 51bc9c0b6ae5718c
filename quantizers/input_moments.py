"""Second moments of layer inputs: what error-feedback rounding and importances are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from bitquota.candidates.layers import MATRICES, LayerKind
from bitquota.models.calls import Given, LayerWatcher, tensor_key
from bitquota.models.onnx.program import source_of
from bitquota.models.padding import inputs_that_count, padding_mask
from bitquota.models.running import tensor_of
from bitquota.quantizers.part_batches import Remembering
from bitquota.quantizers.product_moments import indices_of, product_grams
from bitquota.quantizers.shrinkage import shrink
from bitquota.quantizers.walk import walk_onnx

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.models.calls import LayerCall
    from bitquota.models.processes import Processes

POSITIONS = 2**15
"""Positions of a convolution's input whose moments are taken, shared by its groups, or 32 for each
column if that is more: drawn at random where there are more."""

LEAST_POSITIONS = 2**12
"""Those of each group, at least."""

BLOCK = 128
"""Columns at least whose products with themselves and all later ones are taken at once."""


def input_grams(
    module: nn.Module,
    inventory: Inventory,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    layers: Collection[str] | None = None,
    shrunk: bool = False,
    processes: Processes | None = None,
) -> dict[str, Tensor]:
    """Return ``X^T X`` of every layer's inputs, summed over samples and positions but padded ones.

    A column of ``X`` is one column of the layer's weight matrix (see ``quantizers.layout``): for a
    convolution ``X`` holds the patches that each output is computed from; for a transposed one,
    those of the equal convolution over the input spread out with zeros. Of a convolution with very
    many positions, ``POSITIONS`` or 32 for each column are drawn at random.

    Args:
        module: The full-precision model, or one whose earlier layers are quantized already.
        inventory: Its layers.
        batches: Positional arguments of forward passes; a sequence is gone through twice at most.
        layers: Only these; all by default. A Gram takes ``groups x columns^2`` float64.
        shrunk: Allow for how few the positions are (``shrink``); the Grams are sums no longer.
        processes: Share the batches of a ``Remembering``; by default this process runs all.

    Returns:
        f64[groups, columns, columns] by layer name. Embeddings are missing: their rows are looked
        up, so no error of one column can be repaid by another.

    Cost: one forward pass over the batches (two where there are experts, recurrent layers,
    contractions or torch's attention, see ``product_moments``), and O(positions columns^2) for each
    layer.
    """
    asked = [la for la in inventory.layers if layers is None or la.name in layers]
    if source_of(module) is not None:
        return _onnx_grams(module, asked, batches).found(shrunk=shrunk)
    inside = [la for la in asked if la.kind is LayerKind.EXPERTS or la.kind in MATRICES]
    wanted = {
        tensor_key(tensor_of(module, layer.weight_name)): layer
        for layer in asked
        if layer not in inside and layer.kind is not LayerKind.EMBEDDING
    }
    batches = batches if isinstance(batches, Sequence) else list(batches)
    grams = _Grams()
    watcher = _GramWatcher(wanted, grams, len(batches))
    if wanted and processes is not None and processes.count > 1 and isinstance(module, Remembering):
        _shared_grams(module, list(wanted.values()), batches, watcher, processes)
    elif wanted:
        with torch.no_grad(), watcher:
            for inputs in batches:
                watcher.mask = padding_mask(module, inputs)
                module(*inputs)
    # Functions that call others inside, as torch's attention, show their layers to products only.
    inside += [
        layer
        for layer in wanted.values()
        if layer.name not in grams.of and not layer.kind.name.startswith("CONV")
    ]
    found = grams.found(shrunk=shrunk)
    return found | (product_grams(module, inside, batches, shrunk=shrunk) if inside else {})


def moment_bytes(inventory: Inventory, candidates: Iterable[Candidate]) -> int:
    """Return the bytes of the Grams that ``input_grams`` takes of the candidates' layers.

    Those of grouped convolutions, whose columns are few, count as one.
    """
    layers = [inventory.layer(name) for name in {candidate.layer for candidate in candidates}]
    return sum(
        8 * layer.columns**2 * (layer.weight_shape[0] if layer.kind is LayerKind.EXPERTS else 1)
        for layer in layers
        if layer.kind is not LayerKind.EMBEDDING
    )


@dataclass(slots=True, eq=False)
class _Sum:
    """A Gram, the positions that it is a sum over, and how many layers it is of."""

    gram: Tensor
    positions: int
    layers: int = 1


class _Grams:
    """Grams of layers; those that were given the same tensors, such as q, k and v, share one."""

    def __init__(self) -> None:
        self.of: dict[str, _Sum] = {}
        self._given = Given()
        self._source: int | None = None
        self._after: dict[_Sum | None, _Sum] = {}

    def add(
        self,
        layer: Layer,
        inputs: Tensor,
        settings: dict[str, Any],
        limit: int,
        given: Tensor | None = None,
    ) -> None:
        """Add the Gram of one batch of a layer's inputs.

        ``given`` is the tensor that they were taken from, if other layers may be given it, too.
        """

        def made() -> tuple[Tensor, int]:
            rows = patches(inputs, layer, settings, limit)  # [groups, positions, columns]
            return moment(rows, rows, layer), rows.shape[1]

        source = None
        if given is not None and not layer.kind.name.startswith("CONV"):
            source = self._given.number(given)
        self.put(layer.name, made, source)

    def put(self, name: str, made: Callable[[], tuple[Tensor, int]], source: int | None) -> None:
        """Add the Gram of one batch.

        Args:
            name: Of the layer.
            made: Returns the Gram, and the number of positions that it is a sum over.
            source: Tells what it is made of from what the Gram before was; ``None`` never does.
        """
        before = self.of.get(name)
        if source is not None and source != self._source:
            self._source, self._after = source, {}
        if source is not None and before in self._after:
            # Another layer with the same sum so far has added it.
            after = self._after[before]
            after.layers += 1
        else:
            gram, n = made()
            if before is not None and before.layers == 1:
                before.gram += gram
                before.positions += n
                return
            after = _Sum(
                gram.double() if before is None else before.gram + gram,
                n if before is None else before.positions + n,
            )
            if source is not None:
                self._after[before] = after
        if before is not None:
            before.layers -= 1
        self.of[name] = after

    def found(self, *, shrunk: bool) -> dict[str, Tensor]:
        """Return the Grams by layer name."""
        if shrunk:
            for own in set(self.of.values()):
                shrink(own.gram, own.positions)
        return {name: own.gram for name, own in self.of.items()}


class _BatchGrams(_Grams):
    """Grams of one batch, to be added elsewhere.

    Attributes:
        made: Each with the number of positions that it is a sum over.
        order: Name of a layer and where in ``made`` its Gram is, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, int]] = []
        self.order: list[tuple[str, int]] = []
        self._at = 0

    def put(self, name: str, made: Callable[[], tuple[Tensor, int]], source: int | None) -> None:
        """Note the Gram of one call."""
        if source is None or source != self._source:
            self.made.append(made())
        if source is None:
            self.order.append((name, len(self.made) - 1))
            return
        if source != self._source:
            self._source, self._at = source, len(self.made) - 1
        self.order.append((name, self._at))


def _shared_grams(
    run: Remembering,
    layers: Sequence[Layer],
    batches: Sequence[tuple[Tensor, ...]],
    watcher: _GramWatcher,
    processes: Processes,
) -> None:
    """Have several processes run the batches; add their Grams in the order of the batches."""
    total, names = watcher.grams, [layer.name for layer in layers]

    def look(b: int) -> dict[str, Tensor]:
        inputs, own = batches[b], _BatchGrams()
        watcher.grams, watcher.mask = own, padding_mask(run, inputs)
        with torch.no_grad(), watcher:
            output = run.run(*inputs)
        order = torch.tensor([(names.index(name), k) for name, k in own.order]).reshape(-1, 2)
        counts = torch.tensor([n for _, n in own.made])
        found = {"order": order, "counts": counts} | ({"output": output} if run.remembers else {})
        return found | {str(k): gram for k, (gram, _) in enumerate(own.made)}

    sources = count(1)
    for found in processes.map(look, len(batches)):
        if "output" in found:
            run.remember(found["output"])
        numbers = [next(sources) for _ in found["counts"]]
        for n, k in found["order"].tolist():
            made = partial(_pair, found[str(k)], int(found["counts"][k]))
            total.put(names[n], made, numbers[k])


def _pair(gram: Tensor, positions: int) -> tuple[Tensor, int]:
    return gram, positions


def _onnx_grams(
    module: nn.Module, layers: Iterable[Layer], batches: Iterable[tuple[Tensor, ...]]
) -> _Grams:
    grams = _Grams()
    by_name = {layer.name: layer for layer in layers}
    for meeting in walk_onnx([module], by_name, batches):
        layer = by_name[meeting.layer]
        limit = positions_of(layer, meeting.settings, len(meeting.inputs))
        for (inputs,) in meeting.inputs:
            grams.add(layer, inputs, meeting.settings, limit)
    return grams


class _GramWatcher(LayerWatcher["Layer"]):
    def __init__(self, wanted: dict[tuple[Any, ...], Layer], grams: _Grams, n_batches: int) -> None:
        super().__init__(wanted)
        self.n_batches = n_batches
        self.grams = grams
        self.mask: Tensor | None = None

    def around(
        self,
        known: Layer,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        settings = call_settings(call.operator, args, kwargs)
        limit = positions_of(known, settings, self.n_batches)
        inputs = inputs_that_count(call, self.mask)
        self.grams.add(known, inputs, settings, limit, call.inputs)
        return func(*args, **kwargs)


def positions_of(layer: Layer, settings: dict[str, Any], n_batches: int) -> int:
    """Return at how many positions of each batch a layer's input is looked at, at most."""
    shared = POSITIONS // int(settings.get("groups", 1))
    return -(-max(shared, LEAST_POSITIONS, 32 * layer.columns) // n_batches)


def call_settings(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return stride, padding and the like of a convolution's call; nothing of other operators."""
    if not name.startswith("conv"):
        return {}
    order = ["stride", "padding", "dilation", "groups"]
    if name.startswith("conv_transpose"):
        order = ["stride", "padding", "output_padding", "groups", "dilation"]
    given = dict(zip(order, args[3:], strict=False))
    return given | {k: v for k, v in kwargs.items() if k in order}


def moment(first: Tensor, second: Tensor, layer: Layer) -> Tensor:
    """Return ``first^T second`` of two sets of ``patches``, columns in the order of the weight's.

    ``[groups, columns, columns]``.
    """
    product = _square(first) if first is second else first.transpose(1, 2) @ second
    if not layer.kind.name.startswith("CONV"):
        return product
    taps = math.prod(layer.weight_shape[2:])
    apart = product.reshape(len(product), *(taps, layer.columns // taps) * 2)
    return apart.permute(0, 2, 1, 4, 3).reshape(product.shape)


def _square(x: Tensor) -> Tensor:
    """Return ``x^T x`` of ``[groups, positions, columns]``; below the diagonal it is copied."""
    columns = x.shape[2]
    size = max(BLOCK, -(-columns // 4))
    found = x.new_empty(len(x), columns, columns)
    for first in range(0, columns, size):
        here, rest = slice(first, first + size), slice(first + size, None)
        torch.matmul(x[:, :, here].transpose(1, 2), x[:, :, first:], out=found[:, here, first:])
        found[:, rest, here] = found[:, here, rest].transpose(1, 2)
    return found


def patches(
    inputs: Tensor, layer: Layer, settings: dict[str, Any], limit: int | None = None
) -> Tensor:
    """Return ``[groups, positions, columns]``: what each output of the layer is a product with.

    Of a convolution columns are all channels at the first place of the kernel, then those at the
    next: channels are copied together, in a third of the time. ``moment`` orders them as weights.

    Args:
        inputs: The layer's input.
        layer: The layer.
        settings: Stride, padding, dilation, groups and output padding of a convolution; also
            ``padding_after``, where that differs.
        limit: Of a convolution with more positions, so many drawn at random, the same for equal
            shapes.
    """
    if not layer.kind.name.startswith("CONV"):
        return inputs.reshape(1, -1, inputs.shape[-1])
    n_axes = int(layer.kind.value[-2])
    kernel = layer.weight_shape[2:]
    stride = _spread(settings.get("stride", 1), n_axes)
    dilation = _spread(settings.get("dilation", 1), n_axes)
    groups = int(settings.get("groups", 1))
    transposed = "TRANSPOSE" in layer.kind.name
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = settings.get("padding", 0)
    if padding == "same":
        before = [r // 2 for r in reach]
        after = [r - r // 2 for r in reach]
    else:
        before = list(_spread(0 if padding == "valid" else padding, n_axes))
        after = list(_spread(settings.get("padding_after", tuple(before)), n_axes))
    x = inputs if inputs.ndim == n_axes + 2 else inputs[None]
    if transposed:
        extra = _spread(settings.get("output_padding", 0), n_axes)
        x = _spread_out(x, stride)
        after = [r - b + e for r, b, e in zip(reach, after, extra, strict=True)]
        before = [r - b for r, b in zip(reach, before, strict=True)]
        stride = (1,) * n_axes
    # functional.pad lists the last axis first; negative padding crops.
    pads = [p for b, a in zip(reversed(before), reversed(after), strict=True) for p in (b, a)]
    x = functional.pad(x.movedim(1, -1), (0, 0, *pads)).contiguous()  # [n, places..., channels]
    where = _places_read(tuple(x.shape[:-1]), kernel, stride, dilation, transposed, limit, x.device)
    channels = x.shape[-1]
    found = x.reshape(-1, channels).index_select(0, where.reshape(-1))  # [positions taps, channels]
    found = found.reshape(len(where), -1, groups, channels // groups)
    return found.movedim(2, 0).reshape(groups, len(where), layer.columns)


@lru_cache(maxsize=4)
def _places_read(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    backwards: bool,  # noqa: FBT001  # a cache wants positions
    limit: int | None,
    device: torch.device,
) -> Tensor:
    """Return i64[positions, taps...]: where in samples of ``shape``, padded, each output reads.

    A transposed convolution reads its kernel ``backwards``. Batches and both models follow each
    other with equal shapes, so the last answers are kept.
    """
    windows = []  # i64[positions, taps] of each axis
    for axis, (taps, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        reach = apart * (taps - 1)
        offsets = torch.arange(0, reach + 1, apart, device=device)
        starts = torch.arange(0, shape[1 + axis] - reach, step, device=device)
        windows.append(starts[:, None] + (offsets.flip(0) if backwards else offsets))
    places = [shape[0], *(len(w) for w in windows)]
    wanted = torch.arange(math.prod(places))
    if limit is not None and len(wanted) > limit:
        drawn = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))
        wanted = drawn[:limit].sort().values
    sample, *positions = indices_of(wanted.to(device), places)
    where = sample.reshape(-1, *[1] * len(kernel))
    for axis, (window, position) in enumerate(zip(windows, positions, strict=True)):
        along = [1] * len(kernel)
        along[axis] = window.shape[1]
        where = where * shape[1 + axis] + window[position].reshape(-1, *along)
    return where


def _spread_out(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return ``x`` with ``stride - 1`` zeros between neighbours."""
    sizes = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, t) for t in stride))] = x
    return wide


def _spread(value: Any, n_axes: int) -> tuple[int, ...]:  # noqa: ANN401
    if isinstance(value, int):
        return (value,) * n_axes
    values = tuple(int(v) for v in value)
    return values * n_axes if len(values) == 1 else values
