"""What is fixed before the first measurement: model, layers, candidates, samples, device."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import bitquota
from bitquota.candidates.architectures import prepare_inventory
from bitquota.candidates.budget import Budget
from bitquota.candidates.offered import offered_candidates, with_caches
from bitquota.candidates.rows import made_up_errors, with_mixes
from bitquota.candidates.targets import target_by_name
from bitquota.canonical import digest_json
from bitquota.context import Context
from bitquota.corrections import BEFORE_QUANTIZING, REWRITTEN, Correction
from bitquota.errors import InvalidInput
from bitquota.evaluate.choice import ChoiceLoss, measure_choice
from bitquota.models.binding import bound
from bitquota.models.image_layout import as_they_are, channels_last, takes_channels_last
from bitquota.models.kv_cache import find_caches, open_caches
from bitquota.models.loaded import inventory_of
from bitquota.models.onnx.program import source_of
from bitquota.models.processes import Processes
from bitquota.models.references import References
from bitquota.models.running import DEFAULT_CHUNK, choose_device, cut
from bitquota.models.samples import check_calibration
from bitquota.models.schedule import schedule_of
from bitquota.models.sharing import sharing_weights
from bitquota.models.stack import stack_of
from bitquota.quantizers.activations import layers_of_one_input
from bitquota.quantizers.apply import apply_plans
from bitquota.quantizers.corrections import fold_batch_norm
from bitquota.quantizers.fitted import BATCH, fit_quantizers
from bitquota.quantizers.imatrix import importance_of
from bitquota.quantizers.kv_cache import put_caches
from bitquota.quantizers.quantized_model import QuantizedModel, changed_tensors
from bitquota.quantizers.rotation import SEED, rotate
from bitquota.quantizers.sequential import LEARNED
from bitquota.quantizers.smoothing import smooth
from bitquota.quantizers.stack_rounding import round_stack
from bitquota.quantizers.stacked import StackedWeights
from bitquota.sensitivity.metrics.gram_weighted import GramWeightedError
from bitquota.sensitivity.metrics.row_errors import row_errors
from bitquota.sensitivity.outputs import read_outputs
from bitquota.sensitivity.runners.base import describe_change
from bitquota.sensitivity.runners.make import make_runner
from bitquota.sensitivity.runners.stack import FOLDS, StackRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.rows import RowErrors
    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.candidates.targets import Target
    from bitquota.canonical import JsonObject
    from bitquota.evaluate.choice import Walked
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.models.stack import Stack
    from bitquota.plan import PlanOutput
    from bitquota.progress import Course
    from bitquota.quantizers.fitted import Fitted
    from bitquota.quantizers.imatrix import Importance
    from bitquota.quantizers.rotation import RotatedModel
    from bitquota.quantizers.smoothing import Smoothing
    from bitquota.quantizers.variants import Chosen
    from bitquota.quantizers.weights import QuantizedWeight
    from bitquota.request import PlanRequest
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner
    from bitquota.sensitivity.runners.graph import Graphs

Choice = tuple[int, ...]

SHOWN_TOKENS = 8
"""Tokens of two samples that show what a model with weights in files returns."""

ROW_SAMPLES = 256
"""Samples at most that show which rows of a layer need more bits."""

MOST_BESIDE = 7
"""Choices at most that are rounded on the way of another one: each holds a copy of the model."""

SPARE_BLOCKS = 2
"""Blocks of further samples at most, beyond those that a request asks for."""


@dataclass(slots=True, eq=False)
class Kept:
    """Quantized models that are asked for again, or next.

    Attributes:
        most: How many of the best choices are kept.
        best: What these cost, and what they ship as.
        coming: Choices that are about to be measured, in order.
        ahead: Those of them that were rounded on the way.
    """

    most: int = 1
    best: dict[Choice, tuple[float, QuantizedModel]] = field(default_factory=dict)
    coming: list[Choice] = field(default_factory=list)
    ahead: dict[Choice, QuantizedModel] = field(default_factory=dict)

    def offer(self, choice: Choice, loss: float, model: QuantizedModel) -> None:
        """Keep a choice if it is better than one that is kept."""
        self.best[choice] = loss, model
        if len(self.best) > self.most:
            del self.best[max(self.best, key=lambda kept: self.best[kept][0])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A request made concrete for one model and one calibration set.

    Attributes:
        request: What was asked for.
        module: Own copy of the model on its device, batch norm folded, values turned and channels
            scaled if that was asked for.
        inventory: Its tensors, exclusions and ties applied.
        table: What may become of each group.
        loss: What is minimised.
        fit: Samples that sensitivities are measured on.
        holdout: Disjoint samples that choices are compared on.
        spare: Further samples, in blocks like ``holdout``, for choices that it cannot tell apart.
        correcting: Samples that corrections see (without labels).
        fitted: Quantizers, fitted to ``fit`` where candidates need that.
        importance: What the columns of weights count for in the fit of scales, if not alike.
        context: Where measurements are kept, whom to tell, when to stop, where to run.
        target: The deployment target that candidates come from, if the request names one.
        graphs: What runners exported of ``module``: they run it on chunks of the same size.
        references: Full-precision outputs on ``holdout``, computed once for all choices.
        kept: What was rounded last, layer after layer.
        outputs: The outputs that the loss is about, and what they were taken for; empty with a
            loss of one's own.
        identity_note: What the model's digest does not cover, if anything.
        rotated: How values were turned, if that was asked for.
        smoothing: How channels were scaled, if that was asked for.
        stacked: The model as a chain of blocks, where it is measured and quantized part by part.
    """

    request: PlanRequest
    module: torch.nn.Module
    inventory: Inventory
    table: CandidateTable
    loss: Loss
    fit: CalibrationSet
    holdout: CalibrationSet
    correcting: CalibrationSet
    fitted: Fitted
    context: Context
    target: Target | None = None
    importance: Importance | None = None
    spare: tuple[CalibrationSet, ...] = ()
    graphs: Graphs = field(default_factory=dict)
    references: References = field(default_factory=References)
    kept: Kept = field(default_factory=Kept)
    outputs: tuple[PlanOutput, ...] = ()
    identity_note: str = ""
    rotated: RotatedModel | None = None
    smoothing: Smoothing | None = None
    stacked: StackedWeights | None = None

    def on_course(self, course: Callable[[], Course]) -> Setup:
        """Return this setup, where whoever is told of the work is told how much of it is done."""
        if self.context.on_progress is None:
            return self
        return replace(self, context=replace(self.context, course=course()))

    def runner(self, samples: CalibrationSet | None = None) -> Runner:
        """Return a runner on ``samples`` (by default ``fit``) that sees what corrections repair."""
        if self.stacked is not None:
            n = len(self.fit) if samples is None else len(samples)
            return StackRunner(
                self.module,
                self.inventory,
                self.fit if samples is None else samples,
                chunk_size=len(self.stacked.folds[0]) if samples is None else n,
                origin=self.fitted.origin,
                known=self.stacked,
            )
        repaired = Correction.BATCH_NORM_STATISTICS in self.request.corrections
        return make_runner(
            self.module,
            self.inventory,
            self.fit if samples is None else samples,
            batch_norm="moved" if repaired else "eval",
            bias_correction=Correction.BIAS_CORRECTION in self.request.corrections,
            fitted=self.fitted,
            graphs=self.graphs,
            engine="eager" if self._runs_whole else "auto",
            precision=self.request.precision,
            memory_limit_bytes=self.context.memory_bytes,
        )

    @property
    def _runs_whole(self) -> bool:
        """Whether the model is called as it is.

        Keys and values are quantized in the model's own attention, which no graph shows. A quick
        search never goes on in the middle of a model, and exporting a graph takes as long as four
        passes of a ResNet-56 over 256 images.
        """
        if self.inventory.caches:
            return True
        return self.request.effort == "quick" and source_of(self.module) is None

    def budgets(self, text: str) -> tuple[Budget, ...]:
        """Return the budgets of one plan, joined by ``+`` in ``text``, each checked alone.

        Raises:
            InvalidBudget: A text that cannot be read.
            BudgetTooSmall: A budget is below the smallest plan.
        """
        tables = self.request.tables
        found = tuple(Budget.parse(part, self.inventory, tables) for part in text.split("+"))
        for budget in found:
            budget.check(self.table)
        return found

    def measure_choice(
        self,
        choice: Sequence[int] | None,
        *,
        stage: str,
        with_outputs: bool = False,
        rounding: Context | None = None,
    ) -> ChoiceLoss:
        """Measure a choice on the hold-out samples, corrections included; two passes.

        ``None`` measures full precision, without corrections: its accuracy, and no increase.
        ``with_outputs`` also says what changes in the outputs, if the setup has any. ``rounding``
        is told of the rounding instead of the setup's own context.
        """
        made: list[QuantizedModel] = []

        def make() -> torch.nn.Module:
            assert choice is not None  # noqa: S101  # nothing is rounded in full precision
            made.append(self.rounded(tuple(choice), rounding))
            quantized = made[0].put_into(copy.deepcopy(self.module), self.inventory)
            return put_caches(quantized, self._cached(choice))

        def walk() -> Iterator[Walked]:
            runner = self.runner(self.holdout)
            assert isinstance(runner, StackRunner)  # noqa: S101  # the setup has a stack
            variant: dict[str, Chosen] = {}
            if choice is not None:
                made.append(self.rounded(tuple(choice), rounding))
                variant |= runner.known.shipped(made[0].weights)
                variant |= runner.known.variant(self._cached(choice))
            return runner.outputs(range(len(self.holdout)), [variant])

        found = measure_choice(
            self.module,
            self.inventory,
            () if choice is None else self.table.decode(choice),
            self.holdout,
            self.loss,
            corrections=() if choice is None else self.request.corrections,
            correction_data=self.correcting,
            fitted=self.fitted,
            context=self.context,
            stage=stage,
            references=self.references,
            outputs=() if choice is None else self.outputs,
            with_outputs=with_outputs and bool(self.outputs),
            make=None if self.fitted.order is None or choice is None else make,
            walk=None if self.stacked is None else walk,
            batch_size=self.inventory.samples_at_once(DEFAULT_CHUNK)
            if self.stacked is None
            else self.stacked.sizes.end,
        )
        if made and choice is not None and tuple(choice) not in self.kept.best:
            self.kept.offer(tuple(choice), found.mean, made[0])
        return found

    def quantized_model(self, choice: Choice) -> QuantizedModel | None:
        """Return what a choice ships as, or ``None`` where its plan has no such file."""
        if self.fitted.order is None and self.smoothing is None and self.rotated is None:
            return None
        return self.rounded(choice)

    def on_samples(self, samples: CalibrationSet) -> Setup:
        """Return this setup, where choices are compared on other samples."""
        return replace(self, holdout=samples, references=References())

    def rounded_to_nearest(self) -> Setup:
        """Return this setup for weights that are rounded to nearest."""
        return replace(self, fitted=self.fitted.nearest(), kept=Kept())

    def learning(self) -> Setup:
        """Return this setup for weights whose rounding is learned at the end."""
        return replace(self, fitted=self.fitted.learning(self.request.iterations), kept=Kept())

    def rounded(self, choice: Choice, context: Context | None = None) -> QuantizedModel:
        """Quantize a choice as its plan says, unless that was done before and is kept.

        Those that are to be measured next are rounded on the way, as many as memory allows: they
        share what is seen of the full-precision model.
        """
        kept = self.kept
        if choice in kept.best:
            return kept.best[choice][1]
        if choice not in kept.ahead:
            coming = [c for c in kept.coming if c != choice and c not in kept.ahead]
            together = [choice, *coming[: self._fits_beside]]
            kept.ahead |= dict(zip(together, self._rounded(together, context), strict=True))
        return kept.ahead.pop(choice)

    @property
    def _fits_beside(self) -> int:
        """How many choices can be rounded on the way of another one."""
        order = self.fitted.order
        if order is None or order.iterations or self.stacked is not None:
            return 0
        n = sum(len(batch[0]) for batch in order.batches)
        moments = max(16 * layer.columns**2 for layer in self.inventory.layers)
        held = n * self.inventory.sample_bytes + moments
        return min(MOST_BESIDE, max(0, self.context.memory_bytes // 2 // held - 2))

    def _rounded(
        self, choices: Sequence[Choice], context: Context | None
    ) -> Iterator[QuantizedModel]:
        """Quantize choices as their plans say; a cache is quantized while the model runs."""
        order = self.fitted.order
        chosen = [[c for c in self.table.decode(choice) if not c.cached] for choice in choices]
        stored: list[dict[str, QuantizedWeight]] = [{} for _ in choices]
        rounding = "nearest" if order is None else order.rounding
        if self.stacked is not None:
            for candidates in chosen:
                weights = round_stack(
                    self.stacked, candidates, rounding=rounding, context=context or self.context
                )
                yield QuantizedModel(
                    model_digest=self.inventory.model_digest,
                    rounding=rounding,
                    weights=weights,
                    **self._rewritten(),
                )
            return
        modules = apply_plans(
            self.module,
            self.inventory,
            chosen,
            corrections=self.request.corrections,
            correction_data=self.correcting,
            fitted=self.fitted,
            references=self.references,
            stored=stored,
            context=context or self.context,
        )
        for module, candidates, weights in zip(modules, chosen, stored, strict=True):
            yield QuantizedModel(
                model_digest=self.inventory.model_digest,
                rounding=rounding if order is None else order.name,
                weights=weights,
                tensors=changed_tensors(self.module, module, self.inventory),
                activations=self.fitted.input_grids(candidates),
                **self._rewritten(),
            )

    def _rewritten(self) -> dict[str, Any]:
        """Return how the quantized model comes about from the one that was loaded."""
        return {
            "rotations": () if self.rotated is None else self.rotated.rotations,
            "scalings": () if self.smoothing is None else self.smoothing.scalings,
        }

    def _cached(self, choice: Sequence[int]) -> list[Candidate]:
        """Return what a choice makes of the KV cache."""
        return [c for c in self.table.decode(choice) if c.cached]

    def measure_choices(
        self, choices: Iterable[Choice], *, stage: str, weight: float | None = None
    ) -> dict[Choice, ChoiceLoss]:
        """Measure every distinct choice on the hold-out samples, as one stage.

        ``weight`` is what the stage takes of the course, by default a whole phase.
        """
        distinct = list(dict.fromkeys(choices))
        # One stage over all choices says more than one for each.
        quiet = replace(self, context=replace(self.context, on_progress=None))
        found: dict[Choice, ChoiceLoss] = {}
        self.kept.coming = list(distinct)
        for choice in distinct:
            self.kept.coming.remove(choice)
            found[choice] = quiet.measure_choice(choice, stage=stage, rounding=self.context)
            self.context.report(stage, len(found), len(distinct), weight=weight)
        return found


def build_setup(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    *,
    context: Context | None = None,
    loss: Loss | None = None,
    fit: bool = True,
) -> Setup:
    """Return the setup of ``request``; draws the samples by its seed.

    ``loss`` takes the place of the one that the request names. Without ``fit`` no quantizer is
    fitted to samples: nothing can be measured that needs one, but everything can be counted.

    Raises:
        InvalidInput: The request does not fit the model or the calibration set.

    Cost: a forward pass or two over single samples; two over the fit samples when inputs
    are to be quantized, one when rounding has feedback.
    """
    context = context or Context()
    where = choose_device(context.device)
    Processes(context.processes).check_device(where)
    calibration = bound(model, calibration)
    model, loss, outputs = _measured_outputs(model, calibration, request, loss)
    few, lay_out = calibration.first(2).to(where), as_they_are
    module = sharing_weights(model.module).eval()
    if model.pages is None:
        module = module.to(where)
        if takes_channels_last(module, few):
            few, lay_out = channels_last(few), channels_last
    if Correction.FOLD_BATCH_NORM in request.corrections:
        module = fold_batch_norm(module, few.inputs)

    # What may become of each layer.
    whole = inventory = inventory_of(module, model, few)
    target = None if request.target is None else target_by_name(request.target)
    inventory = prepare_inventory(inventory, target, exclude=request.exclude, ties=request.ties)
    if len(request.input_widths) > 1:
        if model.pages is not None:
            module, model = module.float().to(where), replace(model, pages=None, outline=None)
        inventory = inventory.join(layers_of_one_input(module, inventory, few.inputs))
    table = offered_candidates(
        inventory,
        target,
        weight_bits=request.weight_bits,
        scheme=request.scheme,
        activation_bits=request.input_widths,
        fixed=request.fixed,
        allow=request.allow,
    )

    if request.kv_bits:
        found = [c.at(request.context, request.sequences) for c in find_caches(model, few.inputs)]
        open_caches(module, [cache.name for cache in found])
        inventory, table = with_caches(
            inventory, table, found, target, bits=request.kv_bits, scales=request.kv_scales
        )

    measured, holdout, spare = _samples(calibration, request, where, lay_out)
    n_correcting = min(request.correction_samples, len(calibration))

    # Values turned, and channels scaled for about the widths that layers will have.
    rotated, smoothing = None, None
    if model.pages is not None and REWRITTEN & set(request.corrections):
        module = module.float().to(where)
        model = replace(model, pages=None, outline=None)
    if fit and Correction.ROTATION in request.corrections:
        if model.imatrix is not None:
            msg = (
                "an importance matrix tells of inputs as they are before the correction "
                "'rotation' mixes them: leave one of the two out"
            )
            raise InvalidInput(msg)
        rotated = rotate(module, whole, few.inputs)
        module = rotated.module
    if fit and Correction.SMOOTHING in request.corrections:
        batches = [b.inputs for b in measured.batches(inventory.samples_at_once(BATCH))]
        typical = _typical(table)
        smoothing = smooth(module, inventory, typical, batches)
        module = smoothing.module

    # Quantizers, fitted where candidates need samples.
    importance = None if model.imatrix is None else importance_of(model.imatrix, inventory)
    stack = _chain(model, module, inventory, request, few)
    if stack is None and context.processes > 1:
        msg = (
            "several processes share the batches of a language model that is measured block by "
            f"block, which this one, or what is asked of it, does not allow; got "
            f"{context.processes} processes: leave --processes out"
        )
        raise InvalidInput(msg, processes=context.processes)
    if stack is None and model.pages is not None:
        # Everything else needs all weights at once.
        module = module.float().to(where)
    everything = tuple(dict.fromkeys(c for row in table.rows for c in row.candidates))
    if any(c.activation_bits is not None for c in everything):
        inventory = replace(inventory, schedule=schedule_of(module, inventory, few.inputs))
    candidates = tuple(c for c in everything if not c.cached)
    fitted = fit_quantizers(
        module,
        inventory,
        candidates if fit else (),
        measured,
        activation_fit=request.activation_fit,
        importance=importance,
        rounding=request.rounding,
        memory_bytes=context.memory_bytes,
        by_parts=stack is not None,
    )
    if stack is not None and model.pages is not None:
        outputs = tuple(replace(output, shape=stack.output_shape) for output in outputs)
    if rotated is not None:
        fitted = _fitted_to(
            fitted, {"rotation": [asdict(r.place) for r in rotated.rotations], "seed": SEED}
        )
    if smoothing is not None:
        # What it was fitted to, not what came out: another machine may round differently.
        made_for = {"smoothing": measured.to_json(), "for": describe_change(typical)}
        fitted = _fitted_to(fitted, made_for)
    setup = Setup(
        request=request,
        module=module,
        inventory=inventory,
        table=table,
        loss=loss,
        outputs=outputs,
        fit=measured,
        holdout=holdout,
        spare=spare,
        correcting=lay_out(calibration.subset(n_correcting, request.seed).to(where)),
        fitted=fitted,
        importance=importance,
        context=context,
        target=target,
        identity_note=model.identity_note,
        rotated=rotated,
        smoothing=smoothing,
        stacked=(
            None
            if stack is None
            else _stacked(stack, inventory, everything, measured, fitted, context, loss.name)
        ),
    )
    return setup if request.row_widths == 1 else _with_rows(setup, fit=fit)


def _with_rows(setup: Setup, *, fit: bool) -> Setup:
    """Return a setup whose table also offers rows of several bit-widths.

    Without ``fit`` it offers as many, which rows they are is then made up.
    """
    if setup.target is not None:
        setup.target.require_rows()
    if fit:
        few = setup.fit.first(min(ROW_SAMPLES, len(setup.fit)))
        errors: RowErrors = row_errors(
            setup.runner(few), setup.table, setup.loss, context=setup.context
        )
    else:
        errors = made_up_errors(setup.table, setup.inventory)
    table = with_mixes(setup.table, setup.inventory, errors, setup.request.row_widths)
    return replace(setup, table=table)


def _samples(
    calibration: CalibrationSet,
    request: PlanRequest,
    where: torch.device,
    lay_out: Callable[[CalibrationSet], CalibrationSet],
) -> tuple[CalibrationSet, CalibrationSet, tuple[CalibrationSet, ...]]:
    """Return disjoint samples: to measure on, to decide on, and blocks of them in reserve."""
    wanted = request.samples + request.holdout_samples
    drawn = calibration.subset(min(wanted, len(calibration)), request.seed)
    parts = drawn.split(request.holdout_samples / wanted, request.seed)
    measured, holdout = (lay_out(part.placed(where)) for part in parts)
    blocks = _blocks(calibration, drawn, len(holdout), request)
    spare = (lay_out(part.placed(where)) for part in blocks)
    return measured, holdout, tuple(spare)


def _fitted_to(fitted: Fitted, made_for: JsonObject) -> Fitted:
    """Return quantizers that say how the model was changed before."""
    return replace(
        fitted,
        origin=digest_json([fitted.origin, made_for]),
        nearest_origin=digest_json([fitted.nearest_origin, made_for]),
    )


def _measured_outputs(
    model: LoadedModel, calibration: CalibrationSet, request: PlanRequest, loss: Loss | None
) -> tuple[LoadedModel, Loss, tuple[PlanOutput, ...]]:
    """Return the model that ends in what the loss is about, that loss, and the outputs."""
    outputs: tuple[PlanOutput, ...] = ()
    # Of weights that stay in files no more than a few tokens are run.
    shown = calibration if model.pages is None else calibration.first(2).begin(SHOWN_TOKENS)
    if loss is None:
        read = read_outputs(model, shown, loss=request.loss, outputs=request.outputs or ())
        model, loss, outputs = read.model, read.loss, read.outputs
    check_calibration(model, shown)
    return model, loss, outputs


def _stacked(
    stack: Stack,
    inventory: Inventory,
    candidates: Sequence[Candidate],
    measured: CalibrationSet,
    fitted: Fitted,
    context: Context,
    loss: str,
) -> StackedWeights:
    """Return the candidates of a stack, to be looked at on the samples of the measurement."""
    about = {
        "model": inventory.model_digest,
        "samples": [measured.digest, list(measured.indices)],
        "candidates": [describe_change({c.layer: c}) for c in candidates],
        "quantizers": fitted.origin,
        "loss": loss,
        "memory": context.memory_bytes,
        "bitquota": bitquota.__version__,
    }
    return StackedWeights(
        stack=stack,
        inventory=inventory,
        candidates=candidates,
        samples=measured,
        folds=cut(len(measured), -(-len(measured) // FOLDS)),
        rounder=fitted.weights.rounding,
        importance=fitted.weights.importance,
        memory_bytes=context.memory_bytes,
        journal=context.journal.of(about),
        processes=Processes(context.processes),
    )


WALKED_MEASURES = frozenset({"auto", GramWeightedError.name})
"""Measures that take a chain of blocks part by part."""


def _chain(
    model: LoadedModel,
    module: torch.nn.Module,
    inventory: Inventory,
    request: PlanRequest,
    few: CalibrationSet,
) -> Stack | None:
    """Return a language model as a chain, if everything that is asked for can be done part by part.

    A language model is what makes a row for each token of its input.
    """
    tokens = few.inputs[0]
    if (
        tokens.is_floating_point()
        or tokens.ndim != 2
        or request.measure not in WALKED_MEASURES
        or request.activation_bits is not None
        or set(request.corrections) - BEFORE_QUANTIZING
        or request.precision != "fp32"
        or request.rounding == LEARNED
        or request.row_widths > 1
    ):
        return None
    layers = {layer.name: layer for layer in inventory.layers}
    stack = stack_of(model, module, layers, few.inputs)
    if stack is None or stack.output_shape[:-1] != tuple(tokens.shape[1:]):
        return None
    stack.caches = tuple(cache.name for cache in inventory.caches)
    if sum(len(stack.caches_in(k)) for k in range(len(stack))) < len(stack.caches):
        return None
    return stack


def _typical(table: CandidateTable) -> dict[str, Candidate]:
    """Return a candidate of each layer in the middle of those that quantize its weights."""
    found: dict[str, list[Candidate]] = {}
    for row in table.rows:
        for candidate in row.candidates:
            if candidate.quantized and not candidate.sparse and not candidate.cached:
                found.setdefault(candidate.layer, []).append(candidate)
    return {
        name: sorted(offered, key=lambda c: c.weight_bits)[(len(offered) - 1) // 2]
        for name, offered in found.items()
    }


def _blocks(
    calibration: CalibrationSet, drawn: CalibrationSet, size: int, request: PlanRequest
) -> list[CalibrationSet]:
    """Cut what was not drawn into blocks of ``size`` samples, ``SPARE_BLOCKS`` at most."""
    taken = set(drawn.indices)
    rest = [k for k, index in enumerate(calibration.indices) if index not in taken]
    order = np.random.default_rng(request.seed).permutation(len(rest)).tolist()
    n = min(SPARE_BLOCKS, len(rest) // size)
    return [
        calibration.take(sorted(rest[k] for k in order[b * size : (b + 1) * size]))
        for b in range(n)
    ]
