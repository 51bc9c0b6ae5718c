"""Runners: execute a model with some layers quantized, again and again, as cheaply as possible.

A run starts at a *state*: the model at some base point on one chunk of the calibration set, with
the activations that later runs will read. ``output`` changes some layers on top of a state and
re-executes only what lies behind them; ``extend`` does the same and returns a new state, so that
a pair of layers costs the suffix behind the later one. A chunk is executed with the same batch of
samples whatever is asked for, so a value never depends on what else was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from bitquota.candidates import LayerKind
from bitquota.errors import InvalidCalibration, InvalidInput, InvalidModel, MeasurementFailed
from bitquota.quantizers.weights import fake_quantize
from bitquota.sensitivity.batch_norm import Moments, moved_batch_norms, observed_statistics
from bitquota.sensitivity.losses import primary_output
from bitquota.sensitivity.references import References
from bitquota.storage import FULL_PRECISION_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor, nn

    from bitquota.candidates import Candidate, Inventory, Layer
    from bitquota.canonical import JsonObject
    from bitquota.sensitivity.calibration import CalibrationSet

Change = Mapping[str, "Candidate"]
"""Layer name to the candidate that it takes; layers left out stay as they are."""

BatchNormMode = Literal["eval", "moved"]
"""``eval`` uses the stored statistics, ``moved`` moves them to fit each chunk."""

Precision = Literal["fp32", "bf16"]
"""In which arithmetic layers are run; weights are always quantized in float32."""

ActivationQuantizers = "Callable[[str, int], Callable[[Tensor], Tensor]]"
"""``(layer name, bits) -> fake-quantizer of that layer's input``, ranges calibrated."""

WITHOUT_BIAS = frozenset({LayerKind.EMBEDDING, LayerKind.EXPERTS})
"""Layers whose outputs no bias can correct."""

DEFAULT_CHUNK = 64
DEFAULT_MEMORY_BYTES = 2**30


def describe_change(change: Change) -> list[JsonObject]:
    """Return what a ledger key must know of a change; full precision counts as no change."""
    return [
        {
            "layer": name,
            "bits": change[name].weight_bits,
            "activation_bits": change[name].activation_bits,
            "scheme": change[name].scheme.to_json(),
        }
        for name in sorted(change)
        if change[name].weight_bits != FULL_PRECISION_BITS
        or change[name].activation_bits is not None
    ]


def as_change(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Return candidates by layer name."""
    return {candidate.layer: candidate for candidate in candidates}


@dataclass(slots=True)
class PassCounter:
    """Work done by a runner, in full passes over the calibration set.

    Attributes:
        macs: Multiply-accumulates executed (forward; a backward pass counts twice its forward).
        macs_per_pass: Those of one full-precision pass over the whole calibration set.
        calls: Executions of the model or of a part of it.
    """

    macs_per_pass: float = 0.0
    macs: float = 0.0
    calls: int = 0

    @property
    def passes(self) -> float:
        """Forward-equivalents: how many full passes the executed work amounts to."""
        return self.macs / self.macs_per_pass if self.macs_per_pass else 0.0


class State(Protocol):
    """A model at some point on one chunk, with activations kept for later runs."""

    @property
    def chunk(self) -> int:
        """Which chunk."""
        ...

    @property
    def change(self) -> Change:
        """What is changed against full precision."""
        ...

    @property
    def output(self) -> Tensor:
        """The model's primary output, ``[n, ...]``."""
        ...


class Runner(Protocol):
    """Executes one model on one calibration set.

    Attributes:
        inventory: The model's layers.
        calibration: The samples.
        batch_norm: Which statistics batch normalisation uses.
        bias_correction: Whether the means of layers' outputs are put right.
        precision: In which arithmetic layers are run.
        engine: Name of the implementation; part of ledger keys.
        origin: Digest of the samples that quantizers were fitted on, or empty.
        chunks: Positions of the samples of each chunk.
        passes: The work done so far.
    """

    inventory: Inventory
    calibration: CalibrationSet
    batch_norm: BatchNormMode
    bias_correction: bool
    precision: Precision
    engine: str
    origin: str
    chunks: tuple[range, ...]
    passes: PassCounter

    def start(self, chunk: int, change: Change) -> State:
        """Run the whole model with ``change`` and keep what later runs need."""
        ...

    def extend(self, state: State, change: Change, *, keep_for: Collection[str] = ()) -> State:
        """Apply ``change`` on top of ``state``; keep activations for changes of ``keep_for``."""
        ...

    def output(self, state: State, change: Change) -> Tensor:
        """Return the primary output with ``change`` on top of ``state``."""
        ...

    def reference(self, chunk: int) -> Tensor:
        """Return the full-precision output with stored batch-norm statistics."""
        ...

    def labels(self, chunk: int) -> Tensor | None:
        """Return the labels of a chunk, if there are any."""
        ...

    def share(self, layers: Collection[str]) -> float:
        """Return what re-running behind ``layers`` costs, as a share of a full pass."""
        ...

    def describe(self) -> JsonObject:
        """Return what a ledger key must know of the runner (not of the samples)."""
        ...


class QuantizedWeights:
    """The fake-quantized weight of every candidate, computed once each.

    Args:
        module: The full-precision model.
        inventory: Its layers.
        grams: Second moments of layer inputs by layer name (see ``input_grams``), for schemes
            that round with error feedback.
        importance: Weight of each column's squared error in the fit of scales, f64[columns] by
            layer name (see ``foreign.importance_of``).
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        grams: Mapping[str, Tensor] | None = None,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._module = module
        self._grams = grams or {}
        self._importance = importance or {}
        self._layers = {layer.name: layer for layer in inventory.layers}
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def layer(self, name: str) -> Layer:
        """Return the layer; raises ``InvalidInput`` for a name that the inventory lacks."""
        if name not in self._layers:
            msg = f"a change must name layers of the inventory; got '{name}'"
            raise InvalidInput(msg, layer=name)
        return self._layers[name]

    def original(self, name: str) -> Tensor:
        """Return the full-precision weight."""
        return tensor_of(self._module, self.layer(name).weight_name)

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the weight of ``candidate``'s layer as that candidate stores it."""
        original = self.original(candidate.layer)
        if candidate.weight_bits == FULL_PRECISION_BITS:
            return original
        key = (candidate.layer, candidate.weight_bits, candidate.scheme)
        if key not in self._cache:
            with torch.no_grad():
                quantized = fake_quantize(
                    original.detach(),
                    self.layer(candidate.layer),
                    candidate.weight_bits,
                    candidate.scheme,
                    inputs_gram=self._grams.get(candidate.layer),
                    importance=self._importance.get(candidate.layer),
                )
            if not bool(torch.isfinite(quantized).all()):
                msg = (
                    f"the weights of layer '{candidate.layer}' must be finite after quantization "
                    f"to {candidate.label}; they are not: check the layer's weights"
                )
                raise MeasurementFailed(msg, layer=candidate.layer)
            self._cache[key] = quantized.to(original.dtype)
        return self._cache[key]


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called ``name``.

    Raises:
        InvalidModel: The model has no such tensor: the inventory is of another model.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        value = getattr(module.get_submodule(owner), leaf)
    except AttributeError as err:
        msg = f"the model must have the weight '{name}' of its inventory; it does not"
        raise InvalidModel(msg, weight=name) from err
    if not isinstance(value, torch.Tensor):
        msg = f"'{name}' must be a tensor; got {type(value).__name__}"
        raise InvalidModel(msg, weight=name)
    return value


def checked_output(value: Any, n_samples: int) -> Tensor:  # noqa: ANN401  # whatever a model returns
    """Return the primary output, one row per sample.

    Raises:
        MeasurementFailed: The output does not have one row per sample.
    """
    output = primary_output(value)
    if output.ndim == 0 or len(output) != n_samples:
        msg = (
            f"the model's output must have one row per sample; for {n_samples} samples it has "
            f"shape {list(output.shape)}: wrap the model so that it returns [N, ...]"
        )
        raise MeasurementFailed(msg, shape=list(output.shape))
    return output.float() if output.dtype in {torch.bfloat16, torch.float16} else output


def put_in_eval_mode(module: nn.Module) -> nn.Module:
    """Put ``module`` in eval mode and return it; an exported one is in the mode it was saved in."""
    with contextlib.suppress(NotImplementedError):
        module.eval()
    return module


def run_module(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Call ``module`` on ``inputs`` without gradients and return its primary output.

    Raises:
        InvalidCalibration: The model does not accept the samples.
    """
    try:
        with torch.no_grad():
            value = module(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as err:
        shapes = ", ".join(f"{list(t.shape[1:])} {t.dtype}".replace("torch.", "") for t in inputs)
        msg = (
            f"the model must accept the calibration samples; for samples of shape {shapes} it "
            f"failed: {str(err).splitlines()[0] if str(err) else type(err).__name__}; check shape "
            "and type of the calibration set"
        )
        raise InvalidCalibration(msg, error=str(err)) from err
    return checked_output(value, len(inputs[0]))


@dataclass(slots=True)
class EagerState:
    """What is changed, and the output."""

    chunk: int
    change: dict[str, Candidate]
    output: Tensor


@dataclass(slots=True)
class EagerRunner:
    """Calls the module itself with replaced weights: any model, no reuse of prefixes."""

    module: nn.Module
    inventory: Inventory
    calibration: CalibrationSet
    batch_norm: BatchNormMode = "eval"
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None
    bias_correction: bool = False
    """Whether the mean of every layer's output is put right, as corrected biases will."""
    precision: Precision = "fp32"
    chunk_size: int = DEFAULT_CHUNK
    engine: str = "eager"
    fallback: str = ""
    """Why this runner was taken where the graph runner was asked for first."""
    chunks: tuple[range, ...] = ()
    passes: PassCounter = field(default_factory=PassCounter)
    weights: QuantizedWeights = field(init=False)
    origin: str = ""
    _references: References = field(default_factory=References)
    _seen: dict[int, tuple[dict[str, Tensor], list[Moments | None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut the samples into chunks."""
        put_in_eval_mode(self.module)
        self.weights = QuantizedWeights(self.module, self.inventory)
        n = len(self.calibration)
        self.chunks = cut(n, self.chunk_size)
        self.passes.macs_per_pass = float(n)

    def start(self, chunk: int, change: Change) -> EagerState:
        """Run the whole model."""
        return EagerState(chunk, dict(change), self._run(chunk, change))

    def extend(self, state: State, change: Change, *, keep_for: Collection[str] = ()) -> EagerState:
        """Run the whole model with both changes."""
        del keep_for
        both = {**state.change, **change}
        return EagerState(state.chunk, both, self._run(state.chunk, both))

    def output(self, state: State, change: Change) -> Tensor:
        """Run the whole model with both changes."""
        return self._run(state.chunk, {**state.change, **change})

    def reference(self, chunk: int) -> Tensor:
        """Return the full-precision output."""
        return self._references.get(chunk, lambda: self._run(chunk, {}))

    def labels(self, chunk: int) -> Tensor | None:
        """Return the labels of a chunk."""
        return labels_of(self.calibration, self.chunks[chunk])

    def share(self, layers: Collection[str]) -> float:
        """Every run is a full pass."""
        del layers
        return 1.0

    def describe(self) -> JsonObject:
        """Return engine, corrections and what quantizers were fitted on."""
        return describe_runner(self)

    def _observed(self, chunk: int) -> tuple[dict[str, Tensor], list[Moments | None]]:
        """Return what corrections compare with: means of layers, moments of batch norms' inputs.

        Cost: a pass over the chunk in full precision, once.
        """
        from bitquota.sensitivity.corrections import output_means

        if chunk not in self._seen:
            with (
                output_means(self.module, self.inventory) as means,
                observed_statistics() as statistics,
            ):
                self._run(chunk, {})
            self._seen[chunk] = means.means, statistics.calls
        return self._seen[chunk]

    def _run(self, chunk: int, change: Change) -> Tensor:
        from bitquota.sensitivity.corrections import output_means

        moved = self.batch_norm == "moved"
        # Without a change there is nothing to correct.
        corrected = bool(change) and (moved or self.bias_correction)
        means, statistics = self._observed(chunk) if corrected else ({}, [])
        inputs = inputs_of(self.calibration, self.chunks[chunk])
        self.passes.macs += len(inputs[0])
        self.passes.calls += 1
        with contextlib.ExitStack() as within:
            within.enter_context(
                replaced_weights(self.module, self.weights, change, self.activations)
            )
            if corrected and moved:
                within.enter_context(moved_batch_norms(statistics))
            if corrected and self.bias_correction:
                within.enter_context(output_means(self.module, self.inventory, means))
            within.enter_context(in_precision(self.precision, inputs[0].device))
            return run_module(self.module, inputs)


class replaced_weights:  # noqa: N801  # used as a context manager
    """Within the context the module has the weights and input quantizers of ``change``."""

    def __init__(
        self,
        module: nn.Module,
        weights: QuantizedWeights,
        change: Change,
        activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None,
    ) -> None:
        self._module, self._weights, self._change = module, weights, change
        self._activations = activations
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        """Put the weights in place."""
        for name, candidate in self._change.items():
            parameter = self._weights.original(name)
            quantized = self._weights(candidate)
            if quantized is not parameter:
                self._saved.append((parameter, parameter.data))
                parameter.data = quantized
            if candidate.activation_bits is not None:
                quantizer = input_quantizer(self._activations, name, candidate.activation_bits)
                self._hooks.append(
                    self._module.get_submodule(name).register_forward_pre_hook(
                        lambda _, args, q=quantizer: (q(args[0]), *args[1:])
                    )
                )

    def __exit__(self, *_: object) -> None:
        """Put the original weights back."""
        for parameter, data in reversed(self._saved):
            parameter.data = data
        for hook in self._hooks:
            hook.remove()
        self._saved, self._hooks = [], []


def in_precision(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a runner executes: nothing, or autocast to bfloat16.

    Matrix products and convolutions take bfloat16, what sums over many values stays in float32.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def describe_runner(runner: Runner) -> JsonObject:
    """Return what ledger keys must know of a runner: engine, corrections, what it was fitted on."""
    described = {"engine": runner.engine, "batch_norm": runner.batch_norm, "origin": runner.origin}
    if runner.precision != "fp32":
        described["precision"] = runner.precision
    return described | ({"bias_correction": True} if runner.bias_correction else {})


def input_quantizer(
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None, layer: str, bits: int
) -> Callable[[Tensor], Tensor]:
    """Return the input quantizer of a layer.

    Raises:
        InvalidInput: A candidate quantizes activations and no quantizers were given.
    """
    if activations is None:
        msg = (
            f"layer '{layer}' has a candidate with {bits}-bit activations: give the runner "
            "'activations', the calibrated input quantizers"
        )
        raise InvalidInput(msg, layer=layer)
    return activations(layer, bits)


def cut(n_samples: int, size: int) -> tuple[range, ...]:
    """Return consecutive chunks of at most ``size`` samples."""
    if size < 1:
        msg = f"a chunk must have at least one sample; got {size}"
        raise InvalidInput(msg)
    return tuple(range(a, min(a + size, n_samples)) for a in range(0, n_samples, size))


def inputs_of(calibration: CalibrationSet, chunk: range) -> tuple[Tensor, ...]:
    """Return the inputs of one chunk on the device that uses them."""
    return calibration.chunk(chunk)[0]


def labels_of(calibration: CalibrationSet, chunk: range) -> Tensor | None:
    """Return the labels of one chunk on the device that uses them, if there are any."""
    return calibration.chunk(chunk)[1]


def make_runner(
    module: nn.Module,
    inventory: Inventory,
    calibration: CalibrationSet,
    *,
    batch_norm: BatchNormMode = "eval",
    bias_correction: bool = False,
    precision: Precision = "fp32",
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None,
    weights: QuantizedWeights | None = None,
    origin: str = "",
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
        weights: Quantized weights of ``module``, when they need more than the weights themselves.
        origin: Digest of the samples that ``activations`` and ``weights`` were fitted on; part of
            every ledger key.
        engine: ``graph`` re-executes suffixes of the exported graph, ``onnxruntime`` those of an
            ONNX file, ``eager`` calls the module; ``auto`` takes the graph that there is and
            falls back.
        chunk_size: Samples per execution; by default 64, fewer when the memory limit needs it.
        memory_limit_bytes: Limit on kept activations.

    Raises:
        InvalidCalibration: The model does not accept the samples.
        InvalidModel: ``engine='graph'`` and the model cannot be exported, or
            ``engine='onnxruntime'`` and it is no ONNX file.
        InvalidInput: A correction that finds nothing to act on in an ONNX file, or ``bf16`` for
            one.
    """
    from bitquota.sensitivity.graph import GraphRunner
    from bitquota.sensitivity.onnx_program import source_of
    from bitquota.sensitivity.onnx_runner import OnnxRunner

    put_in_eval_mode(module)
    plain = batch_norm == "eval" and not bias_correction
    if chunk_size is None:
        # Statistics of a chunk need enough samples to stand for the whole set.
        chunk_size = DEFAULT_CHUNK if plain else 4 * DEFAULT_CHUNK
    size = min(chunk_size, len(calibration))
    # A clear error about the samples is better than one from deep inside the exporter.
    run_module(module, inputs_of(calibration, range(size)))
    runner: GraphRunner | EagerRunner | OnnxRunner | None = None
    fallback = ""
    is_onnx = source_of(module) is not None
    if is_onnx and precision != "fp32":
        msg = "an ONNX file runs in its own precision; leave 'bf16' out, or hand in a .pt2"
        raise InvalidInput(msg, precision=precision)
    if engine == "onnxruntime" or (engine == "auto" and is_onnx):
        runner = OnnxRunner(
            module=module,
            inventory=inventory,
            calibration=calibration,
            batch_norm=batch_norm,
            bias_correction=bias_correction,
            activations=activations,
            chunk_size=size,
            memory_limit_bytes=memory_limit_bytes,
        )
    elif is_onnx and engine == "eager" and not plain:
        msg = "corrections of an ONNX file need the engine 'onnxruntime'; got 'eager'"
        raise InvalidInput(msg, engine=engine)
    elif engine != "eager":
        try:
            runner = GraphRunner(
                module=module,
                inventory=inventory,
                calibration=calibration,
                batch_norm=batch_norm,
                bias_correction=bias_correction,
                precision=precision,
                activations=activations,
                chunk_size=size,
                memory_limit_bytes=memory_limit_bytes,
            )
        except InvalidModel as err:
            if engine == "graph":
                raise
            fallback = err.message
    if runner is None:
        runner = EagerRunner(
            module=module,
            inventory=inventory,
            calibration=calibration,
            batch_norm=batch_norm,
            bias_correction=bias_correction,
            precision=precision,
            activations=activations,
            chunk_size=size,
            fallback=fallback,
        )
    runner.origin = origin
    if weights is not None:
        runner.weights = weights
    return runner
