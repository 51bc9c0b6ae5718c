"""Torch modules brought to the form in which every weight that is multiplied is a parameter.

Weight and spectral normalisation and pruning masks compute a weight on each pass: they are folded
into it. Recurrent modules stack the matrices of their gates: each gate becomes a matrix of its own,
stacked again on each pass. The outputs stay what they were.

Design: docs/design/models.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from bitquota.candidates.layers import LayerKind
from bitquota.models.layer_calls import MatrixOfOperator
from bitquota.models.recurrent_trace import in_steps, traced

if TYPE_CHECKING:
    from torch import Tensor

_GATES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LSTM: ("i", "f", "g", "o"),
    nn.GRU: ("r", "z", "n"),
    nn.RNN: ("h",),
    nn.LSTMCell: ("i", "f", "g", "o"),
    nn.GRUCell: ("r", "z", "n"),
    nn.RNNCell: ("h",),
}
"""Gates in the order in which torch stacks them."""


def with_plain_weights(module: nn.Module) -> nn.Module:
    """Return ``module`` with computed weights folded and the gates of recurrent modules apart.

    Changed in place, apart from a recurrent module that is ``module`` itself.

    Cost: copies the weights that change; no forward pass.
    """
    for part in list(module.modules()):
        _fold(part)
    replaced: dict[int, nn.Module] = {}
    for owner in list(module.modules()):
        for name, child in list(owner._modules.items()):  # noqa: SLF001  # replaced in place
            if type(child) in _GATES:
                assert child is not None  # noqa: S101  # it has a type of the table
                owner._modules[name] = replaced.setdefault(id(child), GatedRecurrent(child))  # noqa: SLF001
    return GatedRecurrent(module) if type(module) in _GATES else module


def _fold(part: nn.Module) -> None:
    """Replace what computes a weight by the weight that it gives in eval mode."""
    training = part.training
    part.eval()
    if parametrize.is_parametrized(part):
        for name in list(part.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    for hook in list(part._forward_pre_hooks.values()):  # noqa: SLF001  # the old style
        kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]  # noqa: SLF001
        elif kind == "WeightNorm":
            nn.utils.remove_weight_norm(part, hook.name)  # type: ignore[attr-defined]
        elif kind == "SpectralNorm":
            nn.utils.remove_spectral_norm(part, hook.name)  # type: ignore[attr-defined]
    part.training = training


class GatedRecurrent(nn.Module):
    """An LSTM, GRU or RNN (or one cell of such) whose gates have matrices of their own.

    The matrices of ``weight_ih_l0`` are ``weight_ih_l0.i`` and so on, ``[hidden, inputs]`` each.
    """

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        gates = _GATES[type(recurrent)]
        # In a tuple, so that its tensors are not registered twice.
        self._plain = (recurrent,)
        tensors = dict(recurrent._parameters)  # noqa: SLF001  # in the order of its flat weights
        recurrent._parameters.clear()  # noqa: SLF001  # its names are free for this module's
        self._order = list(tensors)
        for name, tensor in tensors.items():
            if tensor is None or tensor.ndim < 2:
                self.register_parameter(name, tensor)
                continue
            # An LSTM's projection has no gates.
            split = gates if tensor.shape[0] % len(gates) == 0 and "_hr" not in name else ("p",)
            holder = nn.Module()
            for gate, values in zip(split, tensor.detach().chunk(len(split)), strict=True):
                matrix = MatrixOfOperator(LayerKind.RECURRENT, 1, 1)
                matrix.in_features, matrix.out_features = values.shape[1], values.shape[0]
                matrix.weight = nn.Parameter(values.clone(), requires_grad=tensor.requires_grad)
                holder.add_module(gate, matrix)
            self.add_module(name, holder)
        self.train(recurrent.training)

    def matrices(self) -> list[MatrixOfOperator]:
        """Return the matrices of all gates."""
        return [part for part in self.modules() if isinstance(part, MatrixOfOperator)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as the module itself
        """Return what the recurrent module returns."""
        (recurrent,) = self._plain
        if torch.onnx.is_in_onnx_export() and isinstance(recurrent, nn.RNNBase):
            x, states = args[0], args[1] if len(args) > 1 else kwargs.get("hx")
            if isinstance(x, torch.Tensor) and x.ndim == 3:
                if recurrent.proj_size:
                    return in_steps(recurrent, self._stacked, x, states)
                return traced(recurrent, self._gates, self._parameters, x, states)
        recurrent.training = self.training
        stacked = {name: self._stacked(name) for name in self._order}
        if isinstance(recurrent, nn.RNNBase):
            # It looks for changes of the weights that it knows by name; here it has none.
            recurrent.__dict__.update(
                _flat_weights=list(stacked.values()), _flat_weights_names=[], _flat_weight_refs=[]
            )
        else:
            recurrent.__dict__.update(stacked)
        try:
            return recurrent(*args, **kwargs)
        finally:
            if isinstance(recurrent, nn.RNNBase):
                recurrent.__dict__["_flat_weights"] = []
            else:
                for name in stacked:
                    del recurrent.__dict__[name]

    def _stacked(self, name: str) -> Tensor | None:
        if name in self._parameters:
            return self._parameters[name]
        parts = self._gates(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gates(self, name: str) -> list[Tensor]:
        holder = self.get_submodule(name)
        return [m.weight for m in holder.children() if isinstance(m, MatrixOfOperator)]

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are stacked on each pass."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # settings such as hidden_size
        """Return a setting of the recurrent module where this one has no attribute ``name``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            plain = self.__dict__.get("_plain")
            if plain is None or name.startswith("_"):
                raise
            return getattr(plain[0], name)
