"""Corrections of ONNX graphs: the same steps as ``corrections.py``, run by ONNX Runtime.

Design: docs/design/corrections.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.errors import InvalidInput
from bitquota.models.batch_norm import Followed, Moments
from bitquota.models.onnx.program import OnnxSource, check_batch, source_of
from bitquota.models.onnx.rewrites import no_shifts
from bitquota.models.onnx.steps import Steps
from bitquota.models.running import tensor_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.onnx.layers import Shift
    from bitquota.models.onnx.program import OnnxProgram


def reestimate_onnx(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    reference: nn.Module,
    known: dict[int, Any],
) -> None:
    """Move the stored batch-norm statistics as quantization moved the inputs; changes ``module``.

    As ``reestimate_batch_norm``: each batch runs with statistics moved to fit itself. Within a
    batch sums are float32.

    Raises:
        InvalidInput: No batch norm with stored statistics, or a small fixed batch.

    Cost: one forward pass of ``module`` over the batches, and one of ``reference``.
    """
    source = _source(module)
    program = source.program("moved")
    feeds = source.feeds(module)
    targets = [v for norm in program.statistics for v in (norm.mean, norm.variance)]
    nodes = program.needed(targets, ())
    paths = {fed.name: fed.path for fed in source.fed}
    followed: dict[str, Followed] = {}
    for k, inputs in enumerate(batches):
        check_batch(source, len(inputs[0]))
        pieces = source.pieces(inputs)
        if k not in known:
            known[k] = [source.moments(reference, piece) for piece in pieces]
        for piece, moments in zip(pieces, known[k], strict=True):
            seen = program.run(nodes, targets, {}, feeds | piece | moments)
            n = len(next(iter(piece.values())))
            for norm in program.statistics:
                new = Followed(
                    tensor_of(module, paths[norm.stored_mean]),
                    tensor_of(module, paths[norm.stored_variance]),
                    norm.epsilon,
                    after=_moments(seen[norm.mean], seen[norm.variance], n),
                    before=_moments(moments[norm.before_mean], moments[norm.before_variance], n),
                )
                new.join(followed, norm.stored_mean)
    with torch.no_grad():
        for statistics in followed.values():
            statistics.store()


def _moments(mean: NDArray[Any], variance: NDArray[Any], n_samples: int) -> Moments:
    # Positions per sample are the same for all batches: samples are weight enough.
    first, second = (torch.from_numpy(a.astype(np.float64).reshape(-1)) for a in (mean, variance))
    return Moments(first, second, n_samples)


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
        (piece,) = source.pieces(data.inputs)
        self._module = module
        self._steps = Steps(program, source, module, piece)
        self._outputs = {
            source.shifts[layer].node: name for layer, name in source.layer_outputs(program).items()
        }
        self.order = sorted(
            source.shifts.items(),
            key=lambda item: program.maker[self._outputs[item[1].node]].index,
        )

    def next(self, shift: Shift) -> NDArray[np.float64]:
        """Return the mean output per channel of the layer of ``shift``."""
        output = np.moveaxis(self._steps.upto(self._outputs[shift.node]), shift.channel_axis, 0)
        mean: NDArray[np.float64] = output.reshape(len(output), -1).mean(axis=1, dtype=np.float64)
        return mean

    def move(self, shift: Shift, change: NDArray[np.float64]) -> None:
        """Move the mean output of the layer by ``change``, here and in the module."""
        tensor = tensor_of(self._module, shift.path)
        with torch.no_grad():
            tensor.add_(torch.from_numpy(change * shift.factor).to(tensor.dtype))
        target = self._outputs[shift.node]
        if shift.applies_at_once:
            output = self._steps.upto(target)
            shape = [1] * output.ndim
            shape[shift.channel_axis] = -1
            self._steps.replace(target, output + change.astype(output.dtype).reshape(shape))


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
