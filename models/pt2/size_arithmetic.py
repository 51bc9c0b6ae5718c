"""Arithmetic on sizes that graphs of ``.pt2`` files do while they run, with bounded results.

Operands are numbers or torch's symbolic ones (while a rebuilt graph is traced again). An int must
fit into 64 bits, as torch's own sizes must, so that ``9 ** (10 ** 9)`` is an error and no freeze.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch

from bitquota.errors import InvalidModel
from bitquota.models.pt2.operators import SIZE_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_EXPONENT = 64
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_operator.add": operator.add,
    "_operator.sub": operator.sub,
    "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv,
    "_operator.truediv": operator.truediv,
    "_operator.mod": operator.mod,
    "_operator.pow": operator.pow,
    "_operator.eq": operator.eq,
    "_operator.ne": operator.ne,
    "_operator.lt": operator.lt,
    "_operator.le": operator.le,
    "_operator.gt": operator.gt,
    "_operator.ge": operator.ge,
    "_operator.and_": operator.and_,
    "_operator.or_": operator.or_,
    "_operator.neg": operator.neg,
    "_operator.pos": operator.pos,
    "_operator.not_": operator.not_,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "math.sqrt": math.sqrt,
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_not": torch.sym_not,
    "torch.sym_sqrt": math.sqrt,
    "torch.sym_sum": torch.sym_sum,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_ite": torch.sym_ite,
}


def size_function(target: str) -> Callable[..., Any]:
    """Return the bounded function of one of ``SIZE_OPERATORS``."""
    return _BOUNDED[target]


def _bounded(target: str) -> Callable[..., Any]:
    def compute(*operands: Any) -> Any:  # noqa: ANN401  # numbers, symbolic or not
        return _compute(target, *operands)

    return compute


def _compute(target: str, *operands: Any) -> Any:  # noqa: ANN401  # numbers, symbolic or not
    values = operands[0] if target == "torch.sym_sum" else operands
    if not all(isinstance(value, _NUMBERS) for value in values):
        got = ", ".join(type(value).__name__ for value in values)
        msg = f"sizes must be computed from numbers; '{target}' got {got}: export the model again"
        raise InvalidModel(msg, operator=target)
    try:
        if target == "_operator.pow" and type(values[1]) is int and abs(values[1]) > MAX_EXPONENT:
            raise OverflowError
        result = _FUNCTIONS[target](*operands)
        if isinstance(result, int) and not -(2**63) <= result < 2**63:
            raise OverflowError
    except (ArithmeticError, ValueError, TypeError, AssertionError) as err:
        shown = ", ".join(map(str, values))
        msg = f"sizes must stay within 64 bits; '{target}' of {shown:.100} does not: {err!r:.100}"
        raise InvalidModel(msg, operator=target) from err
    return result


_BOUNDED = {target: _bounded(target) for target in SIZE_OPERATORS}
