"""Second moments of what is multiplied with experts, gates and weights of contractions.

Such weights reach the products of torch's dispatcher as slices, transposes, or stacked copies. Each
product's factor is traced back to the weight that it lies in, element by element, so that every
output row gets the Gram of the inputs that it was multiplied with: of an expert the tokens routed
to it, of a gate the inputs or states of all steps.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from bitquota.candidates.layers import LayerKind
from bitquota.models.calls import tensors_in
from bitquota.models.outlines import OperatorWatcher
from bitquota.quantizers.shrinkage import shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer

_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1)}
"""Positions of the factors of each product."""

_MOVES = frozenset(
    {"clone", "contiguous", "_to_copy", "cat", "stack", "index_select", "index", "gather", "repeat"}
)
"""Operators whose result holds elements of their arguments, in another place."""


def product_grams(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[tuple[Tensor, ...]],
    *,
    shrunk: bool = False,
) -> dict[str, Tensor]:
    """Return ``X^T X`` of what each layer's rows are multiplied with, summed over the batches.

    Args:
        module: The model in eval mode.
        layers: Experts, gates of recurrent layers, contractions, linear layers of any kind.
        batches: Positional arguments of forward passes.
        shrunk: Allow for how few the positions are, as in ``input_grams``.

    Returns:
        f64[groups, columns, columns] by layer name, a group for each expert (or whatever block of
        rows has inputs of its own). Inputs of experts that saw fewer tokens than the weight has
        columns are filled up with the mean over all of the layer's. Layers that no product reads
        in a way that fits their matrix are missing.

    Cost: one forward pass over the batches without fused kernels, and O(positions columns^2) for
    each layer.
    """
    watcher = _ProductMoments(module, layers)
    # Fused kernels of recurrent layers and of attention would hide their products.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    (enabled, *_) = torch.backends.mkldnn.set_flags(_enabled=False)  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            for inputs in batches:
                with watcher:
                    module(*inputs)
                watcher.forget_copies()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.mkldnn.set_flags(_enabled=enabled)  # type: ignore[no-untyped-call]
    return {
        layer.name: gram
        for k, layer in enumerate(layers)
        if (gram := _grouped(layer, watcher.moments[k], shrunk=shrunk)) is not None
    }


@dataclass(slots=True, eq=False)
class _Moment:
    """Gram and number of the inputs of some rows."""

    gram: Tensor
    count: int


def _grouped(
    layer: Layer, moments: dict[tuple[int, int], _Moment], *, shrunk: bool
) -> Tensor | None:
    """Return f64[groups, columns, columns] out of moments by first and last row."""
    if not moments:
        return None
    pooled = sum(m.gram for m in moments.values())
    assert isinstance(pooled, torch.Tensor)  # noqa: S101  # there is one
    seen = sum(m.count for m in moments.values())
    sizes = {last - first + 1 for first, last in moments}
    size = sizes.pop()
    different = sizes or layer.rows % size or any(first % size for first, _ in moments)
    if different or size == layer.rows:
        # One kind of rows, or several: what all of them saw.
        if shrunk:
            shrink(pooled[None], seen)
        return pooled[None]
    mean = pooled / seen
    grams = []
    for first in range(0, layer.rows, size):
        own = moments.get((first, first + size - 1))
        count = 0 if own is None else own.count
        filled = max(0, layer.columns - count) * mean
        gram = filled if own is None else own.gram + filled
        if shrunk:
            shrink(gram[None], max(count, layer.columns))
        grams.append(gram)
    return torch.stack(grams)


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A tensor that holds elements of weights.

    Attributes:
        tensor: It; kept alive, so that its memory is given to no other tensor.
        base: Where the index of the weight starts, of a weight itself.
        index: i64, one for each element of the tensor's memory, of a copy: which weight's element
            it is, all weights counted through, or -1.
    """

    tensor: Tensor
    base: int = 0
    index: Tensor | None = None

    def indices(self, view: Tensor) -> Tensor:
        """Return i64 shaped like ``view``, which lies in the tensor's memory."""
        start = (view.data_ptr() - self.tensor.data_ptr()) // view.element_size()
        if self.index is not None:
            return torch.as_strided(self.index, view.shape, view.stride(), start)
        found = torch.tensor(self.base + start)
        for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
            shape = [1] * view.ndim
            shape[axis] = size
            found = found + (torch.arange(size) * stride).reshape(shape)
        return found.expand(view.shape)


class _ProductMoments(OperatorWatcher):
    def __init__(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: list[dict[tuple[int, int], _Moment]] = [{} for _ in layers]
        self._layers = layers
        self._bases = [0]
        self._held = []
        for layer in layers:
            weight = module.get_parameter(layer.weight_name)
            if weight.is_contiguous():
                self._held.append(_Held(weight, self._bases[-1]))
            self._bases.append(self._bases[-1] + weight.numel())
        self._n_weights = len(self._held)

    def forget_copies(self) -> None:
        """Let go of copies that a pass made."""
        del self._held[self._n_weights :]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run ``func``, follow the weights that it moves, and add up what it multiplies them by."""
        del types
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001  # no public name
        if name in _PRODUCTS:
            first, second = (args[place] for place in _PRODUCTS[name])
            if (held := self._find(first)) is not None:
                self._add(held, first, second.transpose(-1, -2) if second.ndim > 1 else second)
            if second.ndim > 1 and (held := self._find(second)) is not None:
                self._add(held, second.transpose(-1, -2), first)
        elif name in _MOVES and any(self._find(t) is not None for t in tensors_in(args)):
            self._follow(name, func, args, kwargs or {}, result)
        return result

    def _find(self, tensor: Tensor) -> _Held | None:
        if not tensor.is_floating_point() or not tensor.numel():
            return None
        at = tensor.data_ptr()
        for held in self._held:
            start = held.tensor.data_ptr()
            if start <= at < start + held.tensor.nbytes:
                return held
        return None

    def _follow(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
    ) -> None:
        """Do to the indices what was done to the elements."""

        def indices(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor  # an index of the operator itself
            held = self._find(tensor)
            return torch.full(tensor.shape, -1) if held is None else held.indices(tensor).cpu()

        given = tree_map_only(torch.Tensor, indices, args)
        # A change of type or layout leaves the order of elements alone.
        moved = given[0] if name in {"clone", "contiguous", "_to_copy"} else func(*given, **kwargs)
        if self._find(result) is None and result.is_contiguous():
            self._held.append(_Held(result, index=moved.contiguous().reshape(-1)))

    def _add(self, held: _Held, weight: Tensor, inputs: Tensor) -> None:
        """Add the moments of a product: ``weight`` [..., rows, k] by ``inputs`` [..., n, k]."""
        inputs = inputs.detach().float() if inputs.element_size() < 4 else inputs.detach()
        inputs = inputs[None] if inputs.ndim == 1 else inputs
        if weight.ndim == 3 and weight.stride(0) == 0:
            weight = weight[0]  # one matrix for all samples
        if weight.ndim == 2:
            weight, inputs = weight[None], inputs.reshape(1, -1, inputs.shape[-1])
        where = held.indices(weight)
        for matrix, x in zip(where, inputs, strict=True):
            first = matrix[:, 0].contiguous()
            owners = torch.bucketize(first, torch.tensor(self._bases), right=True) - 1
            owners = torch.where(first < 0, -1, owners)
            # Runs of rows of one weight: a stacked copy holds several.
            changes = [0, *(torch.nonzero(owners.diff())[:, 0] + 1).tolist(), len(owners)]
            for start, stop in itertools.pairwise(changes):
                owner = int(owners[start])
                if owner >= 0:
                    self._add_rows(owner, matrix[start], matrix[start:stop, 0], x)

    def _add_rows(self, owner: int, along: Tensor, down: Tensor, x: Tensor) -> None:
        layer = self._layers[owner]
        rows, columns = _places(layer, along - self._bases[owner])
        if bool((rows != rows[0]).any()) or bool((columns.sort().values.diff() == 0).any()):
            return  # summed over another axis than the layer's matrix has columns
        taken, _ = _places(layer, down - self._bases[owner])
        key = (int(taken.min()), int(taken.max()))
        moment = self.moments[owner].setdefault(
            key,
            _Moment(
                torch.zeros(layer.columns, layer.columns, dtype=torch.float64, device=x.device), 0
            ),
        )
        columns = columns.to(x.device)
        moment.gram[columns[:, None], columns] += (x.t() @ x).double()
        moment.count += len(x)


def indices_of(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Return the index along each axis of flat indices into an array of ``shape``.

    ``torch.unravel_index`` does the same, but its checks import sympy: .7 CPU s once a process.
    """
    found = []
    for size in reversed(shape):
        found.append(flat % size)
        flat = torch.div(flat, size, rounding_mode="floor")
    return found[::-1]


def _places(layer: Layer, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column, in the layer's matrix, of elements of its stored weight."""
    shape = layer.weight_shape
    axes = layer.axes or tuple(range(len(shape)))
    if layer.kind is LayerKind.EXPERTS and layer.columns != shape[2]:
        axes = (0, 2, 1)
    elif layer.kind is LayerKind.LINEAR_TRANSPOSED:
        axes = (1, 0)
    at = indices_of(flat, shape)
    position = torch.zeros_like(flat)
    for axis in axes:
        position = position * shape[axis] + at[axis]
    return torch.div(position, layer.columns, rounding_mode="floor"), position % layer.columns
