"""Choose the fastest runner that can execute a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

from bitquota.context import DEFAULT_MEMORY_BYTES
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.onnx.program import source_of
from bitquota.models.running import (
    DEFAULT_CHUNK,
    inputs_of,
    put_in_eval_mode,
    run_module,
)
from bitquota.sensitivity.runners.eager import EagerRunner
from bitquota.sensitivity.runners.graph import GraphRunner
from bitquota.sensitivity.runners.onnx import OnnxRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.models.calibration import CalibrationSet
    from bitquota.quantizers.fitted import Fitted
    from bitquota.sensitivity.runners.base import BatchNormMode, Precision, Runner
    from bitquota.sensitivity.runners.graph import Graphs


class RunnerOptions(TypedDict):
    """How a runner runs; see ``make_runner``."""

    batch_norm: BatchNormMode
    bias_correction: bool
    precision: Precision
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None
    chunk_size: int
    memory_limit_bytes: int
    origin: str


def make_runner(
    module: nn.Module,
    inventory: Inventory,
    calibration: CalibrationSet,
    *,
    batch_norm: BatchNormMode = "eval",
    bias_correction: bool = False,
    precision: Precision = "fp32",
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None,
    fitted: Fitted | None = None,
    graphs: Graphs | None = None,
    engine: Literal["auto", "graph", "eager", "onnxruntime"] = "auto",
    chunk_size: int | None = None,
    memory_limit_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Runner:
    """Return the fastest runner that can execute ``module``.

    Args:
        module: The model; it is put into eval mode. Its device is where everything runs.
        inventory: Its layers.
        calibration: The samples, on the same device.
        batch_norm: ``moved`` moves every batch norm's statistics by what a change did to its
            input on the chunk at hand, so that a measurement sees what that correction repairs.
        bias_correction: Let every layer's output have its full-precision mean on the chunk at
            hand, so that a measurement sees what corrected biases will repair.
        precision: ``bf16`` runs layers in bfloat16 where that is accurate enough (twice as fast
            or more on a GPU, slower on most CPUs); ONNX files run as they are.
        activations: Input quantizers for candidates with activation bits.
        fitted: Quantizers of ``module``, instead of ``activations``, when weights need more than
            themselves; the digest of the samples is part of every ledger key.
        graphs: Exported graphs of ``module`` to use and to add to, as it is.
        engine: ``graph`` re-executes suffixes of the exported graph, ``onnxruntime`` those of an
            ONNX file, ``eager`` calls the module; ``auto`` takes the graph that there is and
            falls back.
        chunk_size: Samples per execution; by default 64, fewer when activations are large or the
            memory limit needs it.
        memory_limit_bytes: Limit on kept activations.

    Raises:
        InvalidCalibration: The model does not accept the samples.
        InvalidModel: ``engine='graph'`` and the model cannot be exported, or
            ``engine='onnxruntime'`` and it is no ONNX file.
        InvalidInput: A correction that finds nothing to act on in an ONNX file, or ``bf16`` for
            one.
    """
    put_in_eval_mode(module)
    plain = batch_norm == "eval" and not bias_correction
    if chunk_size is None:
        # Statistics of a chunk need enough samples to stand for the whole set.
        chunk_size = inventory.samples_at_once(DEFAULT_CHUNK if plain else 4 * DEFAULT_CHUNK)
    size = min(chunk_size, len(calibration))
    # A clear error about the samples is better than one from deep inside the exporter.
    run_module(module, inputs_of(calibration, range(size)))
    runner: GraphRunner | EagerRunner | OnnxRunner | None = None
    fallback = ""
    is_onnx = source_of(module) is not None
    if is_onnx and precision != "fp32":
        msg = "an ONNX file runs in its own precision; leave out 'bf16', or provide a .pt2"
        raise InvalidInput(msg, precision=precision)
    given = RunnerOptions(
        batch_norm=batch_norm,
        bias_correction=bias_correction,
        precision=precision,
        activations=activations if fitted is None else fitted.activations,
        chunk_size=size,
        memory_limit_bytes=memory_limit_bytes,
        origin="" if fitted is None else fitted.origin,
    )
    if engine == "onnxruntime" or (engine == "auto" and is_onnx):
        runner = OnnxRunner(module, inventory, calibration, **given)
    elif is_onnx and engine == "eager" and not plain:
        msg = "corrections of an ONNX file need the engine 'onnxruntime'; got 'eager'"
        raise InvalidInput(msg, engine=engine)
    elif engine != "eager":
        try:
            known = {} if graphs is None else graphs
            runner = GraphRunner(module, inventory, calibration, graphs=known, **given)
        except InvalidModel as err:
            if engine == "graph":
                raise
            fallback = err.message
    if runner is None:
        runner = EagerRunner(module, inventory, calibration, fallback=fallback, **given)
    if fitted is not None:
        runner.weights = fitted.weights
    return runner
