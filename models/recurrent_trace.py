"""Recurrent modules as operators of ONNX, while torch traces them for an export.

torch's exporter would write out every step, which fixes the length of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
    hidden, n_ways = recurrent.hidden_size, len(ways)
    settings: dict[str, Any] = {"hidden_size": hidden}
    if recurrent.bidirectional:
        settings["direction"] = "bidirectional"
    if operator == "GRU":
        settings["linear_before_reset"] = 1
    if operator == "RNN":
        settings["activations"] = [recurrent.mode.partition("_")[2].capitalize()] * n_ways
    given = () if states is None else (states,) if torch.is_tensor(states) else tuple(states)
    n_states = 2 if operator == "LSTM" else 1
    value = x.transpose(0, 1) if recurrent.batch_first else x  # [steps, batch, inputs]
    steps, batch = value.shape[:2]
    last: list[list[Tensor]] = [[] for _ in range(n_states)]
    for layer in range(recurrent.num_layers):
        inputs: list[Tensor | None] = [value]
        for part in ("weight_ih", "weight_hh"):
            rows = [gates(f"{part}_l{layer}{way}") for way in ways]
            stacked = [torch.cat([r[k] for k in order]) if len(r) > 1 else r[0] for r in rows]
            inputs.append(torch.stack(stacked))
        inputs += [_bias(biases, layer, ways, order), None]
        inputs += [s[layer * n_ways : (layer + 1) * n_ways] for s in given]
        shape = [n_ways, batch, hidden]
        while inputs[-1] is None:
            inputs.pop()
        outputs = torch.onnx.ops.symbolic_multi_out(
            operator,
            inputs,
            settings,
            dtypes=[value.dtype] * (1 + n_states),
            shapes=[[steps, *shape], *[shape] * n_states],
            version=_OPSET,
        )
        value = outputs[0].transpose(1, 2).flatten(2)  # [steps, batch, ways x hidden]
        for kept, state in zip(last, outputs[1:], strict=True):
            kept.append(state)
    joined = tuple(torch.cat(parts) for parts in last)
    result = value.transpose(0, 1) if recurrent.batch_first else value
    return result, joined if operator == "LSTM" else joined[0]


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
