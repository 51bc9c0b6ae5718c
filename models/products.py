"""Which parameters a model multiplies with, whatever function does it.

``x @ w``, ``torch.bmm``, ``torch.einsum`` or ``F.linear`` of a module's own parameter end in a few
matrix products of torch's dispatcher. They are watched while the model runs once. What a product
reads is traced back to the parameter by where it lies in memory, so that transposes, reshapes,
slices and copies on the way do not matter.

Design: docs/design/models.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bitquota.models.calls import tensor_key, tensors_in
from bitquota.models.outlines import OperatorWatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1)}
"""Positions of the factors of each product."""

_COPIES = frozenset({"clone", "_to_copy", "contiguous"})

_PASSING = frozenset({"copy_", "detach", "detach_"})
"""Functions that hand values on without using them."""

TABLE_OF = "embedding"
"""The operator that looks rows of a parameter up; the table is its first argument."""


@dataclass(slots=True, eq=False)
class Use:
    """How a model uses one parameter.

    Attributes:
        parameter: It.
        rows: Axes that some product keeps.
        columns: Axes that some product sums over.
        n_macs: Multiply-accumulates of all products with it.
        n_inputs: Elements of what is multiplied with it.
        looked_up: Whether rows of it are looked up.
        others: Other operators that read its values.
    """

    parameter: Tensor
    rows: set[int] = field(default_factory=set)
    columns: set[int] = field(default_factory=set)
    n_macs: int = 0
    n_inputs: int = 0
    looked_up: bool = False
    others: set[str] = field(default_factory=set)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The axes of the parameter, those of its rows first; ``None`` if it is no matrix.

        It is one if every product sums over the same axes. Axes that a slice fixed are rows.
        """
        if not self.columns or self.rows & self.columns:
            return None
        rows = [k for k in range(self.parameter.ndim) if k not in self.columns]
        return (*rows, *sorted(self.columns)) if rows else None

    @property
    def n_columns(self) -> int:
        """Weights per row."""
        return math.prod(self.parameter.shape[k] for k in self.columns)

    @property
    def is_unread(self) -> bool:
        """Whether nothing read its values."""
        return not (self.rows or self.columns or self.looked_up or self.others)

    @property
    def reason(self) -> str:
        """Why it is no layer, for a person."""
        if self.columns:
            return "summed over different axes by different products"
        if self.others:
            return f"read by {', '.join(sorted(self.others)[:3])}, not by a matrix product"
        return "not used by the sample that was run"


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """A contiguous tensor that holds a parameter's values, and the axes that each axis stands for.

    ``alive`` keeps the memory of a copy from being given to another tensor.
    """

    use: Use
    start: int
    end: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    stands_for: tuple[frozenset[int], ...]
    alive: Tensor

    def axes_of(self, view: Tensor) -> tuple[frozenset[int], ...]:
        """Return the parameter's axes that each axis of ``view`` moves along.

        An axis of a view with stride t and size s reaches over distances from t to t x s, one of
        the stored tensor likewise; where these overlap, the view moves along the stored axis.
        """
        found = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            axes: frozenset[int] = frozenset()
            for n, step, meant in zip(self.shape, self.strides, self.stands_for, strict=True):
                if stride and size > 1 and stride < step * n and step < stride * size:
                    axes |= meant
            found.append(axes)
        return tuple(found)


class ProductWatcher(OperatorWatcher):
    """Within the context, every use of ``parameters`` is written down.

    Args:
        parameters: Contiguous ones are watched; others are rare and left alone.

    Attributes:
        uses: By ``tensor_key``.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[tuple[Any, ...], Use] = {}
        self._stored: list[_Stored] = []
        for parameter in parameters:
            key = tensor_key(parameter)
            if parameter.is_contiguous() and parameter.numel() and key not in self.uses:
                use = self.uses[key] = Use(parameter)
                self._keep(use, parameter, tuple(frozenset({k}) for k in range(parameter.ndim)))

    def _keep(self, use: Use, tensor: Tensor, stands_for: tuple[frozenset[int], ...]) -> None:
        start = tensor.data_ptr()
        end, shape = start + tensor.nbytes, tuple(tensor.shape)
        self._stored.append(_Stored(use, start, end, shape, tensor.stride(), stands_for, tensor))

    def _find(self, tensor: object) -> _Stored | None:
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            return None
        at = tensor.data_ptr()
        return next((s for s in self._stored if s.start <= at < s.end), None)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run ``func`` and write down what it reads of the parameters."""
        del types
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001  # no public name
        if name in _PRODUCTS:
            self._product(args, _PRODUCTS[name])
        elif name == TABLE_OF:
            if (stored := self._find(args[0])) is not None:
                stored.use.looked_up = True
        elif name in _COPIES:
            stored = self._find(args[0])
            if stored is not None and isinstance(result, torch.Tensor) and self._is_copy(result):
                self._keep(stored.use, result, stored.axes_of(args[0]))
        elif name not in _PASSING and not _is_view(func):
            for tensor in tensors_in((args, kwargs or {})):
                if (stored := self._find(tensor)) is not None:
                    stored.use.others.add(name)
        return result

    def _is_copy(self, result: Tensor) -> bool:
        return result.is_contiguous() and self._find(result) is None

    def _product(self, args: tuple[Any, ...], places: tuple[int, int]) -> None:
        factors = [args[place] for place in places]
        for side, (tensor, other) in enumerate((factors, factors[::-1])):
            stored = self._find(tensor)
            if stored is None:
                continue
            *kept, last = stored.axes_of(tensor)
            # The first factor is summed over its last axis, the second over the one before it.
            summed = last if side == 0 or tensor.ndim == 1 else kept.pop()
            rows = frozenset().union(*kept) | (frozenset() if summed is last else last)
            use = stored.use
            use.rows |= rows
            use.columns |= summed
            use.n_macs += (
                tensor.numel()
                * (other.numel() // _n_summed(tensor, side))
                // (tensor.shape[0] if tensor.ndim == 3 else 1)
            )
            use.n_inputs += other.numel()


def _n_summed(tensor: Tensor, side: int) -> int:
    """Return the length of the axis that a product sums over."""
    return int(tensor.shape[-1] if side == 0 or tensor.ndim == 1 else tensor.shape[-2])


def _is_view(func: Any) -> bool:  # noqa: ANN401  # an operator
    """Whether what an operator returns is another look at what it is given."""
    return any(result.alias_info is not None for result in func._schema.returns)  # noqa: SLF001


def watch_products(run: Callable[[], object], parameters: Iterable[Tensor]) -> ProductWatcher:
    """Return what ``run`` does with ``parameters``.

    Cost: one call of ``run``.
    """
    watcher = ProductWatcher(parameters)
    with torch.no_grad(), watcher:
        run()
    return watcher
