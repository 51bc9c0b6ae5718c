"""Quantize a model part by part: candidates of all layers, and the weights that ship.

Everything is done for one part of a ``Stack`` after the other, over all samples at once: what a
part is given is kept, the part is run, its layers' inputs are looked at, and it is let go.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitquota.candidates.layers import MATRICES, LayerKind
from bitquota.candidates.storage import FULL_PRECISION_BITS, Granularity
from bitquota.context import Context
from bitquota.models.calls import operator_name, tensor_key
from bitquota.models.kept import Keeper, Series
from bitquota.models.layout import from_matrix
from bitquota.models.running import inputs_of, tensor_of
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import round_in_sequence
from bitquota.quantizers.weights import QuantizedWeight, finite_matrix, quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.stack import Part, Stack

STAGE = "candidates"
"""Name of the walk in progress reports."""

SAMPLED_ROWS = 64
"""Rows of a matrix that are rounded to tell what a candidate loses."""

AT_ONCE = frozenset({LayerKind.EXPERTS, *MATRICES})
"""Kinds whose inputs are looked at on all samples at once."""

HALF = 0.5
"""Share of the memory of a measurement that activations between parts may take."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """A quantized weight that is read when it is needed.

    Attributes:
        layer: Whose weight it is.
        read: Returns it.
    """

    layer: Layer
    read: Callable[[], QuantizedWeight]

    def weight(self) -> Tensor:
        """Return the weight in the shape of the layer's own."""
        return from_matrix(self.read().dequantize(), self.layer)


def spans_of(size: int, folds: Sequence[range]) -> list[range]:
    """Return the batches in which samples run: at most ``size`` each, none across two folds."""
    return [
        range(a, min(a + size, fold.stop))
        for fold in folds
        for a in range(fold.start, fold.stop, size)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """How many samples run at once.

    Attributes:
        block: Through a block.
        end: Through the last part, whose output may be a row for each token of a vocabulary.
    """

    block: int
    end: int


def batch_sizes(
    stack: Stack, layers: Mapping[str, Layer], samples: CalibrationSet, limit_bytes: int
) -> BatchSizes:
    """Return how many samples may run at once within a limit, at least one.

    Input and output of each layer of a block are counted three times: as such, as what is made of
    them on the way, and as gradients; outputs of the model in float32 and in float64 beside.
    """
    positions = math.prod(samples.inputs[0].shape[1:])
    wide = max(
        sum(layers[name].rows + layers[name].columns for name in part)
        for part in stack.layers[1:-1]
    )
    block = limit_bytes // (12 * positions * max(1, wide))
    end = limit_bytes // (24 * math.prod(stack.output_shape))
    end = max(1, min(64, block, end))
    # A batch of a block is cut into whole batches of the end.
    return BatchSizes(block=max(1, min(64, block) // end) * end, end=end)


def pieces(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut a batch into smaller ones of at most ``size`` samples."""
    for a in range(0, len(values[0]), size):
        yield tuple(value[a : a + size] for value in values)


def run_variants(
    stack: Stack,
    samples: CalibrationSet,
    spans: Sequence[range],
    variants: Sequence[Mapping[str, Stored]],
    keeper: Keeper,
    on_part: Callable[[int, int], None],
) -> list[Series]:
    """Return for each variant what its last part is given, batch after batch.

    Variants that are equal up to a part run together up to there.

    Args:
        stack: The model.
        samples: What to run on.
        spans: Batches of them.
        variants: Weights by layer name.
        keeper: Keeps activations.
        on_part: Called with the number of a part and how many different variants of it ran.

    Cost: one pass for each variant, less what they share; every weight is read once.
    """
    groups: list[tuple[list[int], Series | None]] = [(list(range(len(variants))), None)]
    for k in range(len(stack) - 1):
        # Those that stay together: equal so far, and equal weights here.
        apart: list[tuple[list[int], Series | None, tuple[Stored | None, ...]]] = []
        for members, given in groups:
            own: dict[tuple[int, ...], list[int]] = {}
            for v in members:
                key = tuple(id(variants[v].get(name)) for name in stack.layers[k])
                own.setdefault(key, []).append(v)
            apart += [
                (together, given, tuple(variants[together[0]].get(n) for n in stack.layers[k]))
                for together in own.values()
            ]
        after: list[tuple[list[int], Series | None]] = []
        weights: dict[int, Tensor] = {}
        for position, (together, given, chosen) in enumerate(apart):
            part = stack.part(k)
            for stored in chosen:
                if stored is not None:
                    if id(stored) not in weights:
                        weights[id(stored)] = stored.weight()
                    part.put(stored.layer, weights[id(stored)])
            following = keeper.series()
            with torch.no_grad():
                for b, span in enumerate(spans):
                    before = () if given is None else (given[b],)
                    following.append(part(*before, *inputs_of(samples, span)))
            after.append((together, following))
            if given is not None and all(
                other is not given for _, other, _ in apart[position + 1 :]
            ):
                given.drop()
        groups = after
        on_part(k, len(groups))
    found: dict[int, Series] = {}
    for members, given in groups:
        assert given is not None  # noqa: S101  # part 0 made it
        found |= dict.fromkeys(members, given)
    return [found[v] for v in range(len(variants))]


def ending_in(stack: Stack, layers: Iterable[Layer], variant: Mapping[str, Stored]) -> Part:
    """Return the last part with the weights of a variant."""
    part = stack.part(len(stack) - 1)
    for layer in layers:
        if layer.name in variant and layer.name in stack.layers[-1]:
            part.put(layer, variant[layer.name].weight())
    return part


@dataclass(slots=True, kw_only=True, eq=False)
class StackedWeights:
    """The candidates of a stack's layers, and what their errors do to the layers' outputs.

    Attributes:
        stack: The model.
        inventory: Its layers.
        candidates: What layers may become.
        samples: What layers' inputs are looked at on.
        folds: Consecutive samples whose gradients are kept apart.
        rounder: How candidates are rounded.
        importance: What the columns of weights count for in the fit of scales, if not alike.
        memory_bytes: What may be kept in memory.
        energies: f64[rows] by part and candidate: the squared change of each output channel of
            the layer, summed over samples and positions.
        squares: Squared change of the weights by candidate; as the energies estimated from some
            rows of large matrices.
        given: What each part is given in full precision, batch after batch (nothing for part 0).
        spans: The batches.
        sizes: How large they are.
    """

    stack: Stack
    inventory: Inventory
    candidates: Sequence[Candidate]
    samples: CalibrationSet
    folds: tuple[range, ...]
    rounder: Rounder
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    memory_bytes: int = 2**30
    energies: dict[tuple[int, Candidate], Tensor] = field(default_factory=dict)
    squares: dict[Candidate, float] = field(default_factory=dict)
    given: list[Series] = field(default_factory=list)
    spans: list[range] = field(init=False)
    sizes: BatchSizes = field(init=False)
    keeper: Keeper = field(init=False)
    layers: dict[str, Layer] = field(init=False)
    _stored: dict[Candidate, Stored] = field(default_factory=dict)
    _kept: dict[Candidate, tuple[QuantizedWeight, range]] = field(default_factory=dict)
    _asked: dict[Candidate, None] = field(default_factory=dict)
    _codes: Series = field(init=False)
    _references: dict[tuple[object, ...], Series] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut the samples into batches."""
        self.layers = {layer.name: layer for layer in self.inventory.layers}
        limit = self.memory_bytes // 8
        self.sizes = batch_sizes(self.stack, self.layers, self.samples, limit)
        self.spans = spans_of(self.sizes.block, self.folds)
        self.keeper = Keeper(limit_bytes=int(HALF * self.memory_bytes))
        self._codes = Keeper(limit_bytes=self.memory_bytes // 4).series()

    def fold_of(self, span: range) -> int:
        """Return the number of the fold that a batch is in."""
        return next(f for f, fold in enumerate(self.folds) if span.start in fold)

    def stored(self, candidate: Candidate) -> Stored:
        """Return a candidate's weight; it is rounded when it is read for the first time.

        Candidates of a part that were asked for before are rounded with it.
        """
        if candidate not in self._kept:
            self._asked.setdefault(candidate, None)
        return self._stored.setdefault(
            candidate,
            Stored(layer=self.layers[candidate.layer], read=partial(self._read, candidate)),
        )

    def reference(
        self, samples: CalibrationSet, spans: Sequence[range], on_part: Callable[[int, int], None]
    ) -> Series:
        """Return what the last part is given in full precision; it is run once for the same."""
        key = samples.digest, samples.indices, tuple(spans)
        if key not in self._references:
            (self._references[key],) = run_variants(
                self.stack, samples, spans, [{}], self.keeper, on_part
            )
        return self._references[key]

    def variant(self, candidates: Iterable[Candidate]) -> dict[str, Stored]:
        """Return the weights of a choice; layers in full precision are left out."""
        self.prepare(Context())
        return {c.layer: self.stored(c) for c in candidates if c.weight_bits != FULL_PRECISION_BITS}

    def shipped(self, weights: Mapping[str, QuantizedWeight]) -> dict[str, Stored]:
        """Return weights that were quantized elsewhere."""

        def held(name: str, weight: QuantizedWeight) -> Stored:
            return Stored(layer=self.layers[name], read=lambda: weight)

        return {name: held(name, weight) for name, weight in weights.items()}

    def prepare(self, context: Context) -> None:
        """Run full precision, and tell what the errors of all candidates do there.

        Cost: one pass over the samples, the Grams of all inputs, and the rounding of at most
        ``SAMPLED_ROWS`` rows for every candidate.
        """
        if self.given:
            return
        before = self.keeper.series()
        given = [before]
        for k in range(len(self.stack)):
            context.check(STAGE)
            part = self.stack.part(k)
            following = self.keeper.series()
            grams, counts = self._look(k, part, given[k], following)
            given.append(following)
            self._estimate(k, part, grams, counts)
            context.report(STAGE, k + 1, len(self.stack))
        given.pop().drop()  # what the model returns
        self.given = given

    def _look(
        self, k: int, part: Part, given: Series, following: Series | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run a part, and return Grams of its layers' inputs, and how often rows are looked up."""
        looked_up = {
            name: self.layers[name]
            for name in self.stack.layers[k]
            if k == 0 and self.layers[name].kind is LayerKind.EMBEDDING
        }
        # A tied head multiplies as any linear layer does.
        multiplied = replace(
            self.inventory,
            layers=tuple(
                replace(self.layers[name], kind=LayerKind.LINEAR)
                if self.layers[name].kind is LayerKind.EMBEDDING
                else self.layers[name]
                for name in self.stack.layers[k]
                if name not in looked_up
            )
            or self.inventory.layers[:1],
        )
        names = {layer.name for layer in multiplied.layers} & set(self.stack.layers[k])
        last = k == len(self.stack) - 1
        batches = _Batches(
            spans=self.spans,
            samples=self.samples,
            given=(given,) if k else (),
            # The output of the model is large.
            size=self.sizes.end if last else None,
        )
        run = Remembering(part, None if last else following, len(batches))
        grams: dict[str, Tensor] = {}
        if names:
            grams = input_grams(run, multiplied, batches, layers=names, shrunk=True)
        counts: dict[str, Tensor] = {}
        if looked_up or not names:
            with _Lookups(part, looked_up, counts) as lookups, torch.no_grad():
                for batch in batches:
                    lookups.samples = len(batch[0])
                    run(*batch)
        return grams, counts

    def _estimate(
        self, k: int, part: Part, grams: Mapping[str, Tensor], counts: Mapping[str, Tensor]
    ) -> None:
        """Note what the errors of a part's candidates do to their layers' outputs."""
        matrices: dict[str, Tensor] = {}
        for candidate in self.candidates:
            name = candidate.layer
            if candidate.weight_bits == FULL_PRECISION_BITS or name not in self.stack.layers[k]:
                continue
            layer = self.layers[name]
            if name not in matrices:
                original = tensor_of(part, layer.weight_name).detach()
                matrices = {name: finite_matrix(original, layer).double()}
            found = self._errors(candidate, matrices[name], grams.get(name), counts.get(name))
            self.squares[candidate], energy = found
            if energy is not None:
                self.energies[k, candidate] = energy

    def _errors(
        self, candidate: Candidate, matrix: Tensor, gram: Tensor | None, count: Tensor | None
    ) -> tuple[float, Tensor | None]:
        """Return the squared change of a weight, and of each output channel of its layer.

        Of a matrix of many rows some are rounded. What the others lose is taken to be in proportion
        to their own energy, which is a ratio estimate: exact where rows differ by a factor.
        """
        rows = torch.arange(len(matrix), device=matrix.device)
        apart = candidate.scheme.granularity is not Granularity.TENSOR
        if count is not None and apart:
            # Rows that are never looked up do nothing.
            rows = count.nonzero()[:, 0]
        if apart and len(rows) > SAMPLED_ROWS and (gram is None or len(gram) == 1):
            rows = rows[torch.linspace(0, len(rows) - 1, SAMPLED_ROWS).round().long()]
        sample = matrix[rows]
        rounder = Rounder.NEAREST if gram is None else self.rounder
        found = quantize(
            sample,
            candidate.weight_bits,
            candidate.scheme,
            importance=self.importance.get(candidate.layer),
            inputs_gram=gram,
            rounding=None if rounder is Rounder.NEAREST else rounder,
        )
        error = found.dequantize().double() - sample
        square = float(error.square().sum() / sample.square().sum().clamp_min(1e-300))
        square *= float(matrix.square().sum())
        if count is not None:
            seen = count[rows]
            share = count.sum() / seen.sum().clamp_min(1.0)
            return square, share * (seen @ error.square())
        if gram is None:
            return square, None
        energy = _energy(error, gram)
        if len(rows) < len(matrix):
            weight = gram[0].diagonal()
            own = matrix.square() @ weight
            energy = own * (energy.sum() / own[rows].sum().clamp_min(1e-300))
        return square, energy

    def _read(self, candidate: Candidate) -> QuantizedWeight:
        """Return a candidate's codes and scales; round those of its part that were asked for."""
        if candidate not in self._kept:
            self.prepare(Context())
            k = next(k for k, names in enumerate(self.stack.layers) if candidate.layer in names)
            part = self.stack.part(k)
            asked = [c for c in self._asked if c.layer in self.stack.layers[k]]
            grams: Mapping[str, Tensor] = {}
            if self.rounder is not Rounder.NEAREST:
                grams, _ = self._look(k, part, self.given[k], None)
            weights = QuantizedWeights(
                part, self.inventory, lambda: grams, self.importance, self.rounder
            )
            for other in asked:
                self._keep(other, weights.stored(other))
                weights.forget()
                del self._asked[other]
        about, places = self._kept[candidate]
        codes, scales, *zeros = (self._codes[place] for place in places)
        return replace(
            about, codes=codes.int(), scales=scales, zero_points=zeros[0] if zeros else None
        )

    def _keep(self, candidate: Candidate, found: QuantizedWeight) -> None:
        codes, start = found.codes, len(self._codes)
        if found.bits <= 8:
            codes = codes.to(torch.int8 if int(codes.amin()) < 0 else torch.uint8)
        for tensor in (codes, found.scales, found.zero_points):
            if tensor is not None:
                self._codes.append(tensor)
        # An empty slice would hold on to the whole tensor.
        empty = codes.new_empty(0)
        about = replace(found, codes=empty, scales=empty, zero_points=None)
        self._kept[candidate] = about, range(start, len(self._codes))


class _Lookups(TorchFunctionMode):
    """Counts how often each row of embeddings is looked up.

    Args:
        part: The part that looks up.
        layers: Embeddings by name.
        counts: Takes f64[rows] by name.
    """

    def __init__(self, part: Part, layers: Mapping[str, Layer], counts: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {
            tensor_key(tensor_of(part, layer.weight_name)): name for name, layer in layers.items()
        }
        self._counts = counts
        self.samples = 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Count the rows of a known embedding."""
        del types
        named = kwargs or {}
        if operator_name(func) == "embedding":
            ids, weight = (args + tuple(named.values()))[:2]
            name = self._names.get(tensor_key(weight))
            if name is not None:
                count = torch.bincount(ids.reshape(-1), minlength=len(weight)).double()
                # Positions are looked up once for all samples of a batch.
                count *= self.samples if len(ids) == 1 else 1
                self._counts[name] = self._counts.get(name, torch.zeros_like(count)) + count
        return func(*args, **named)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batches(Sequence[tuple[Tensor, ...]]):
    """What a part is called with, batch after batch, none of which is kept.

    Attributes:
        spans: Samples of each batch.
        samples: Where the inputs of the model come from.
        given: What stands before them, batch after batch.
        size: Samples of a smaller batch, where batches are cut into such.
    """

    spans: Sequence[range]
    samples: CalibrationSet
    given: tuple[Series, ...] = ()
    size: int | None = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._places())

    def __getitem__(self, k: Any) -> Any:  # noqa: ANN401  # one batch for one number
        """Return a batch."""
        b, start = self._places()[k]
        span = self.spans[b]
        values = (*(series[b] for series in self.given), *inputs_of(self.samples, span))
        if self.size is None:
            return values
        return tuple(value[start : start + self.size] for value in values)

    def _places(self) -> list[tuple[int, int]]:
        size = self.size
        return [
            (b, start)
            for b, span in enumerate(self.spans)
            for start in range(0, len(span), len(span) if size is None else size)
        ]


class Remembering(nn.Module):
    """A part that keeps what it returns for the first ``count`` batches.

    Args:
        part: The part.
        outputs: Where that is kept, if anywhere.
        count: The number of batches.
        side: Where batches begin with what the part is given in full precision and with what it is
            given in the quantized model: which of the two it reads.
    """

    def __init__(
        self, part: Part, outputs: Series | None, count: int, side: int | None = None
    ) -> None:
        super().__init__()
        self.part, self._outputs, self._count, self._side = part, outputs, count, side
        self.takes_padding = part.takes_padding
        self.mask_at = part.mask_at + (0 if side is None else 1)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its name in the model."""
        return self.part.get_submodule(target)

    def forward(self, *values: Tensor) -> Tensor:
        """Run the part."""
        own = values if self._side is None else (values[self._side], *values[2:])
        output: Tensor = self.part(*own)
        if self._outputs is not None and len(self._outputs) < self._count:
            self._outputs.append(output)
        return output


def _energy(error: Tensor, gram: Tensor) -> Tensor:
    """Return f64[rows]: ``e G e^T`` of each row, ``gram`` being one for each group of rows."""
    grouped = error.reshape(len(gram), -1, error.shape[1])
    found: Tensor = ((grouped @ gram) * grouped).sum(dim=2).reshape(-1)
    return found


def round_stack(
    known: StackedWeights,
    candidates: Sequence[Candidate],
    *,
    rounding: str,
    context: Context,
) -> dict[str, QuantizedWeight]:
    """Return codes and scales of a choice by layer name, rounded layer after layer.

    As ``round_in_sequence`` rounds a whole model, part by part.

    Cost: two passes over the samples (full precision, whose activations between parts are known,
    and quantized), the moments of all inputs, and the rounding of every layer.
    """
    chosen = {c.layer: c for c in candidates if c.weight_bits != FULL_PRECISION_BITS}
    if rounding == Rounder.NEAREST:
        return _to_nearest(known, chosen)
    known.prepare(context)
    stack, found = known.stack, dict[str, QuantizedWeight]()
    given: Series | None = None
    for k in range(len(stack)):
        context.check(STAGE)
        last = k == len(stack) - 1
        full, part = stack.part(k), stack.part(k)
        names = stack.layers[k]
        for name in names:
            # What the rounding writes into must not be the model's own memory.
            place = tensor_of(part, known.layers[name].weight_name)
            place.data = place.data.clone()
            if name in found:
                part.put(
                    known.layers[name], from_matrix(found[name].dequantize(), known.layers[name])
                )
        own = {name: chosen[name] for name in names if name in chosen and name not in found}
        if last and not own:
            break
        batches = _Batches(
            spans=known.spans,
            samples=known.samples,
            given=() if given is None else (known.given[k], given),
            size=known.sizes.end if last else None,
        )
        following = known.keeper.series()
        side = None if given is None else 1
        quantized = Remembering(part, None if last else following, len(batches), side)
        found |= round_in_sequence(
            Remembering(full, None, 0, None if given is None else 0),
            quantized,
            own,
            batches,
            _Candidates(full, known),
            rounding=rounding,
        )
        if given is not None:
            given.drop()
        given = following
    if given is not None:
        given.drop()
    return found


def _to_nearest(
    known: StackedWeights, chosen: Mapping[str, Candidate]
) -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    for k, names in enumerate(known.stack.layers):
        own = [name for name in names if name in chosen and name not in found]
        if not own:
            continue
        part = known.stack.part(k)
        nearest = QuantizedWeights(part, known.inventory, None, known.importance)
        for name in own:
            found[name] = nearest.stored(chosen[name])
            nearest.forget()
    return found


class _Candidates(QuantizedWeights):
    """The quantized weights of a part, each rounded by itself."""

    def __init__(self, part: Part, known: StackedWeights) -> None:
        super().__init__(part, known.inventory, importance=known.importance)
        self._known = known

    def stored(self, candidate: Candidate) -> QuantizedWeight:
        """Return codes and scales of a candidate."""
        return self._known.stored(candidate).read()
