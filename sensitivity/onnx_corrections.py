"""Corrections of ONNX graphs: the same steps as ``corrections.py``, run by ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.errors import InvalidInput
from bitquota.sensitivity.onnx_program import OnnxSource, source_of
from bitquota.sensitivity.onnx_rewrites import no_shifts
from bitquota.sensitivity.onnx_runner import check_batch
from bitquota.sensitivity.runner import tensor_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.sensitivity.calibration import CalibrationSet
    from bitquota.sensitivity.onnx_program import Arrays, OnnxProgram, Shift


def reestimate_onnx(module: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Replace the stored batch-norm statistics by those of the samples; changes ``module``.

    As ``reestimate_batch_norm``: each batch is normalised with its own statistics, and what is
    stored is mean and unbiased variance over all batches. Within a batch sums are float32.

    Raises:
        InvalidInput: No batch norm with stored statistics, or a small fixed batch.

    Cost: one forward pass over the batches.
    """
    source = _source(module)
    program = source.program("batch")
    feeds = source.feeds(module)
    targets = [v for norm in program.statistics for v in (norm.mean, norm.variance)]
    targets += [norm.inputs for norm in program.statistics if norm.inputs in program.maker]
    nodes = program.needed(targets, ())
    totals: dict[str, tuple[int, NDArray[np.float64], NDArray[np.float64]]] = {}
    for inputs in batches:
        check_batch(source, len(inputs[0]))
        for piece in source.pieces(inputs):
            seen = program.run(nodes, targets, {}, feeds | piece)
            for norm in program.statistics:
                mean = seen[norm.mean].astype(np.float64).reshape(-1)
                n = (seen[norm.inputs] if norm.inputs in seen else piece[norm.inputs]).size
                n //= len(mean)
                squares = seen[norm.variance].astype(np.float64).reshape(-1) * n
                known = totals.get(norm.stored_mean)
                if known is not None:
                    before, old, spread = known
                    delta, total = mean - old, before + n
                    squares = spread + squares + delta**2 * (before * n / total)
                    mean, n = old + delta * (n / total), total
                totals[norm.stored_mean] = (n, mean, squares)
    paths = {fed.name: fed.path for fed in source.fed}
    for norm in program.statistics:
        n, mean, squares = totals[norm.stored_mean]
        for name, value in (
            (norm.stored_mean, mean),
            (norm.stored_variance, squares / max(1, n - 1)),
        ):
            tensor = tensor_of(module, paths[name])
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(value))


def bias_correct_onnx(module: nn.Module, quantized: nn.Module, data: CalibrationSet) -> None:
    """Shift what is added behind each layer so that its mean output is right again.

    As ``bias_correction``, one layer after the other. The shift goes into the layer's bias, into
    what is added behind a MatMul, or into the mean of the batch norm behind a convolution; layers
    with none of these, and layers that run more than once, are left alone.

    Raises:
        InvalidInput: No layer has such a place, or the graph has a fixed batch.

    Cost: one forward pass of each model, in a single batch.
    """
    source = _source(module)
    if not source.shifts or source.fixed_batch is not None:
        got = "has none" if not source.shifts else f"has a fixed batch of {source.fixed_batch}"
        raise InvalidInput(no_shifts(got))
    program = source.program("eval")
    wanted = _Means(program, source, module, data)
    expected = {layer: wanted.next(shift) for layer, shift in wanted.order}
    walk = _Means(program, source, quantized, data)
    for layer, shift in walk.order:
        walk.move(shift, expected[layer] - walk.next(shift))


class _Means:
    """Walks through a graph from layer to layer, every node once."""

    def __init__(
        self,
        program: OnnxProgram,
        source: OnnxSource,
        module: nn.Module,
        data: CalibrationSet,
    ) -> None:
        self._program, self._source, self._module = program, source, module
        (self._piece,) = source.pieces(data.inputs)
        self._known: Arrays = {}
        self._done: frozenset[int] = frozenset()
        self._outputs = {
            source.shifts[layer].node: name for layer, name in source.layer_outputs(program).items()
        }
        self.order = sorted(
            source.shifts.items(),
            key=lambda item: program.maker[self._outputs[item[1].node]].index,
        )

    def next(self, shift: Shift) -> NDArray[np.float64]:
        """Return the mean output per channel of the layer of ``shift``."""
        target = self._outputs[shift.node]
        program = self._program
        nodes = program.needed([target], self._known)
        self._done |= nodes
        # Whatever a later node will read is kept; everything else is forgotten.
        later = [n for n in program.nodes if n.index not in self._done]
        read = {s for n in later for s in n.sources if s in program.kept_types}
        made = {r for k in nodes for r in program.nodes[k].results}
        targets = [target, *sorted((read & made) - {target})]
        feeds = self._source.feeds(self._module) | self._piece
        fresh = program.run(nodes, targets, self._known, feeds)
        self._known = {k: v for k, v in (self._known | fresh).items() if k in read or k == target}
        output = np.moveaxis(self._known[target], shift.channel_axis, 0)
        mean: NDArray[np.float64] = output.reshape(len(output), -1).mean(axis=1, dtype=np.float64)
        return mean

    def move(self, shift: Shift, change: NDArray[np.float64]) -> None:
        """Move the mean output of the layer by ``change``, here and in the module."""
        tensor = tensor_of(self._module, shift.path)
        with torch.no_grad():
            tensor.add_(torch.from_numpy(change * shift.factor).to(tensor.dtype))
        target = self._outputs[shift.node]
        if shift.applies_at_once:
            output = self._known[target]
            shape = [1] * output.ndim
            shape[shift.channel_axis] = -1
            self._known[target] = output + change.astype(output.dtype).reshape(shape)


def refuse_folding(module: nn.Module) -> None:
    """Raise ``InvalidInput`` if an ONNX graph has batch norms: they are not folded here."""
    source = _source(module)
    n = sum(node.op_type == "BatchNormalization" for node in source.model.graph.node)
    if n:
        msg = (
            f"the correction 'fold_batch_norm' does not change ONNX graphs; this one has {n} batch "
            "norms: fold them when exporting (torch.onnx does so in eval mode), or leave it out"
        )
        raise InvalidInput(msg, batch_norms=n)


def _source(module: nn.Module) -> OnnxSource:
    source = source_of(module)
    assert source is not None  # noqa: S101  # callers ask first
    return source
