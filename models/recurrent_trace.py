"""Recurrent modules as operators of ONNX, while torch traces them for an export.

torch's exporter would write out every step, which fixes the length of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

_ORDERS = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX's order of gates, by their places in torch's: iofc of ifgo, zrh of rzn."""

_OPSET = 21


def traced(
    recurrent: nn.RNNBase,
    gates: Callable[[str], Sequence[Tensor]],
    biases: Mapping[str, Tensor | None],
    x: Tensor,
    states: Tensor | tuple[Tensor, ...] | None,
) -> Any:  # noqa: ANN401  # as the module itself
    """Return what ``recurrent`` returns, made of ONNX's operators (layer by layer).

    Args:
        recurrent: Its settings; it has no projection.
        gates: The matrices of a stacked weight, in torch's order.
        biases: Stacked biases by name.
        x: ``[batch, steps, inputs]`` or ``[steps, batch, inputs]``, as the module takes it.
        states: Initial hidden state (and cell state of an LSTM), or ``None``.
    """
    operator = recurrent.mode.partition("_")[0]
    order = _ORDERS[operator]
    ways = ("", "_reverse") if recurrent.bidirectional else ("",)
    n_ways = len(ways)
    n_states = 2 if operator == "LSTM" else 1
    given = () if states is None else (states,) if torch.is_tensor(states) else tuple(states)
    value = x.transpose(0, 1) if recurrent.batch_first else x  # [steps, batch, inputs]
    steps, batch = value.shape[:2]
    last: list[list[Tensor]] = [[] for _ in range(n_states)]

    # Each layer is one operator, which goes over the steps in all of its ways.
    for layer in range(recurrent.num_layers):
        inputs: list[Tensor | None] = [
            value,
            _weight(gates, f"weight_ih_l{layer}", ways, order),
            _weight(gates, f"weight_hh_l{layer}", ways, order),
            _bias(biases, layer, ways, order),
            None,  # lengths of the samples: all have every step
            *(s[layer * n_ways : (layer + 1) * n_ways] for s in given),
        ]
        shape = [n_ways, batch, recurrent.hidden_size]
        while inputs[-1] is None:
            inputs.pop()
        outputs = torch.onnx.ops.symbolic_multi_out(
            operator,
            inputs,
            _attributes(recurrent, operator, n_ways),
            dtypes=[value.dtype] * (1 + n_states),
            shapes=[[steps, *shape], *[shape] * n_states],
            version=_OPSET,
        )
        value = outputs[0].transpose(1, 2).flatten(2)  # [steps, batch, ways x hidden]
        for kept, state in zip(last, outputs[1:], strict=True):
            kept.append(state)

    # Last states of all layers and ways are returned as one tensor for each kind of state.
    joined = tuple(torch.cat(parts) for parts in last)
    result = value.transpose(0, 1) if recurrent.batch_first else value
    return result, joined if operator == "LSTM" else joined[0]


def in_steps(
    lstm: nn.RNNBase,
    tensors: Callable[[str], Tensor | None],
    x: Tensor,
    states: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return what an LSTM with a projection returns, which no operator of ONNX computes.

    Every step is written out, so the number of steps is that of ``x``.

    Args:
        lstm: Its settings.
        tensors: Its weights and biases (``None`` where it has none) by torch's names.
        x: As ``traced`` takes it.
        states: Initial hidden and cell state, or ``None``.
    """
    value = x.transpose(0, 1) if lstm.batch_first else x  # [steps, batch, inputs]
    ways = ("", "_reverse") if lstm.bidirectional else ("",)
    hiddens, cells = [], []
    for layer in range(lstm.num_layers):
        outputs = []
        for k, way in enumerate(ways):
            input_weight, state_weight, input_bias, state_bias, projection = (
                tensors(f"{part}_l{layer}{way}") if lstm.bias or part.startswith("weight") else None
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            )
            assert input_weight is not None  # noqa: S101  # its parameters
            assert state_weight is not None  # noqa: S101
            assert projection is not None  # noqa: S101
            place = layer * len(ways) + k
            if states is None:
                hidden = value.new_zeros(value.shape[1], lstm.proj_size)
                cell = value.new_zeros(value.shape[1], lstm.hidden_size)
            else:
                hidden, cell = states[0][place], states[1][place]
            made = []
            for step in value.flip(0).unbind(0) if way else value.unbind(0):
                gates = linear(step, input_weight, input_bias)
                gates = gates + linear(hidden, state_weight, state_bias)
                enter, forget, new, leave = gates.chunk(4, 1)
                cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
                hidden = linear(leave.sigmoid() * cell.tanh(), projection)
                made.append(hidden)
            outputs.append(torch.stack(made[::-1] if way else made))
            hiddens.append(hidden)
            cells.append(cell)
        value = torch.cat(outputs, 2)
    result = value.transpose(0, 1) if lstm.batch_first else value
    return result, (torch.stack(hiddens), torch.stack(cells))


def _attributes(recurrent: nn.RNNBase, operator: str, n_ways: int) -> dict[str, Any]:
    """Return the attributes of the operator that computes one layer of ``recurrent``."""
    attributes: dict[str, Any] = {"hidden_size": recurrent.hidden_size}
    if recurrent.bidirectional:
        attributes["direction"] = "bidirectional"
    if operator == "GRU":
        attributes["linear_before_reset"] = 1
    if operator == "RNN":
        attributes["activations"] = [recurrent.mode.partition("_")[2].capitalize()] * n_ways
    return attributes


def _weight(
    gates: Callable[[str], Sequence[Tensor]], name: str, ways: Sequence[str], order: Sequence[int]
) -> Tensor:
    """Return ONNX's ``[ways, gates x hidden, inputs]`` of the stacked weight ``name``."""
    rows = [gates(f"{name}{way}") for way in ways]
    return torch.stack([torch.cat([r[k] for k in order]) if len(r) > 1 else r[0] for r in rows])


def _bias(
    biases: Mapping[str, Tensor | None], layer: int, ways: Sequence[str], order: Sequence[int]
) -> Tensor | None:
    """Return ONNX's ``[ways, 2 x gates x hidden]``: what the input gets, then what the state."""
    rows = []
    for way in ways:
        parts = []
        for part in ("bias_ih", "bias_hh"):
            bias = biases.get(f"{part}_l{layer}{way}")
            if bias is None:
                return None
            chunks = bias.chunk(len(order))
            parts += [chunks[k] for k in order]
        rows.append(torch.cat(parts))
    return torch.stack(rows)
