"""The candidates of a language model's layers, and what their errors do, part by part.

Everything is done for one part of a ``Stack`` after the other, over all samples at once: what a
part is given is kept, the part is run, its layers' inputs are looked at, and it is let go.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import FULL_PRECISION_BITS, Granularity
from bitquota.context import Context
from bitquota.journal import Journal
from bitquota.models.kept import Keeper, Series
from bitquota.models.processes import Processes
from bitquota.models.running import tensor_of
from bitquota.quantizers.gptq import forget_factors
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.part_batches import (
    Batches,
    BatchSizes,
    Lookups,
    Remembering,
    batch_sizes,
    run_through,
    spans_of,
)
from bitquota.quantizers.quantized_model import QuantizedModel, WeightsOnDemand
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.variants import Chosen, Stored, run_variants
from bitquota.quantizers.weights import QuantizedWeight, estimated, finite_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.stack import Part, Stack

STAGE = "candidates"
"""Name of the walk in progress reports."""

SAMPLED_ROWS = 64
"""Rows of a matrix that are rounded to tell what a candidate loses."""

ROWS_AT_ONCE = 1024
"""Rows of a matrix that are in float64 together."""

WHOLE_ROWS = frozenset({LayerKind.LINEAR, LayerKind.LINEAR_TRANSPOSED, LayerKind.EMBEDDING})
"""Kinds whose inputs are multiplied with whole rows of the matrix, if they are multiplied."""

WORKED_ON = 4
"""Copies of the largest layer's weights, in float32, that are there at a time."""

HALF = 0.5
"""Share of the memory of a measurement that activations between parts may take."""


@dataclass(slots=True, kw_only=True, eq=False)
class StackedWeights:
    """The candidates of a stack's layers, and what their errors do to the layers' outputs.

    Attributes:
        stack: The model.
        inventory: Its layers.
        candidates: What layers, and KV caches, may become.
        samples: What layers' inputs are looked at on.
        folds: Consecutive samples whose gradients are kept apart.
        rounder: How candidates are rounded.
        importance: What the columns of weights count for in the fit of scales, if not alike.
        memory_bytes: What may be kept in memory.
        energies: f64[rows] by part and candidate: the squared change of each output channel of
            the layer, summed over samples and positions.
        sampled: By part and layer some rows of its matrix, if a plain product shows them.
        errors: By part and candidate where in ``kept_errors`` the change of those rows is.
        kept_errors: f16[rows, columns] each.
        squares: Squared change of the weights by candidate; as the energies estimated from some
            rows of large matrices.
        given: What each part is given in full precision, batch after batch (nothing for part 0).
        spans: The batches.
        sizes: How large they are.
        journal: Where what was done is kept until the work ends.
        processes: Share the batches; what they find is added in the order of the batches.
    """

    stack: Stack
    inventory: Inventory
    candidates: Sequence[Candidate]
    samples: CalibrationSet
    folds: tuple[range, ...]
    rounder: Rounder
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    memory_bytes: int = 2**30
    journal: Journal = field(default_factory=Journal)
    processes: Processes = field(default_factory=Processes)
    energies: dict[tuple[int, Candidate], Tensor] = field(default_factory=dict)
    sampled: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    errors: dict[tuple[int, Candidate], int] = field(default_factory=dict)
    kept_errors: Series = field(init=False)
    squares: dict[Candidate, float] = field(default_factory=dict)
    given: list[Series] = field(default_factory=list)
    spans: list[range] = field(init=False)
    sizes: BatchSizes = field(init=False)
    keeper: Keeper = field(init=False)
    layers: dict[str, Layer] = field(init=False)
    _stored: dict[Candidate, Stored] = field(default_factory=dict)
    _names: dict[Candidate, str] = field(init=False)
    _kept: dict[str, PutAway] = field(default_factory=dict)
    _asked: dict[Candidate, None] = field(default_factory=dict)
    _codes: Series = field(init=False)
    _cached: dict[Candidate, Candidate] = field(default_factory=dict)
    _references: dict[tuple[object, ...], Series] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut the samples into batches."""
        self.layers = {layer.name: layer for layer in self.inventory.layers}
        # The largest layer is there as floats, changed, and once more while it is worked on.
        largest = max(layer.rows * layer.columns for layer in self.layers.values())
        room = max(self.memory_bytes // 4, self.memory_bytes - WORKED_ON * 4 * largest)
        limit = room // 8
        self.sizes = batch_sizes(self.stack, self.layers, self.samples, limit)
        self.spans = spans_of(self.sizes.block, self.folds)
        self._names = {c: f"candidate-{n}" for n, c in enumerate(self.candidates)}
        # Every further process has a batch of its own, which takes as much as that of this one.
        kept = int(HALF * room) - (self.processes.count - 1) * limit
        self.keeper = Keeper(limit_bytes=kept)
        self.kept_errors = self.keeper.series()
        self._codes = Keeper(limit_bytes=room // 4).series()

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.samples.inputs[0].device

    def fold_of(self, span: range) -> int:
        """Return the number of the fold that a batch is in."""
        return next(f for f, fold in enumerate(self.folds) if span.start in fold)

    def stored(self, candidate: Candidate) -> Stored:
        """Return a candidate's weight; it is rounded when it is read for the first time.

        Candidates of a part that were asked for before are rounded with it.
        """
        if self._names[candidate] not in self._kept:
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
                self.stack, samples, spans, [{}], self.keeper, on_part, processes=self.processes
            )
        return self._references[key]

    def variant(self, candidates: Iterable[Candidate]) -> dict[str, Chosen]:
        """Return the weights and caches of a choice; those in full precision are left out."""
        return {
            c.layer: self._cached.setdefault(c, c) if c.cached else self.stored(c)
            for c in candidates
            if c.weight_bits != FULL_PRECISION_BITS
        }

    def shipped(self, weights: Mapping[str, QuantizedWeight]) -> dict[str, Stored]:
        """Return weights that were quantized elsewhere."""
        return {
            name: Stored(layer=self.layers[name], read=partial(weights.__getitem__, name))
            for name in weights
        }

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
            if self._recall(k):
                self._run(k, part, given[k], following)
            else:
                grams, counts = self._look(k, part, given[k], following)
                held = self._estimate(k, part, grams, counts)
                del grams
                self._note(k, held)
                self._write_down(k, held)
                del held
            given.append(following)
            del part
            context.report(STAGE, k + 1, len(self.stack), weight=float(len(self.samples)))
        given.pop().drop()  # what the model returns
        self.given = given

    def _look(
        self, k: int, part: Part, given: Series, following: Series | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run a part, and return Grams of its layers' inputs, and how often rows are looked up."""
        forget_factors()
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
        run, batches = self._remembering(k, part, given, following)
        grams: dict[str, Tensor] = {}
        if names:
            grams = input_grams(
                run, multiplied, batches, layers=names, shrunk=True, processes=self.processes
            )
        counts: dict[str, Tensor] = {}
        if looked_up or not names:
            with Lookups(part, looked_up, counts) as lookups, torch.no_grad():
                for batch in batches:
                    lookups.samples = len(batch[0])
                    run(*batch)
        return grams, counts

    def _run(self, k: int, part: Part, given: Series, following: Series) -> None:
        """Run a part of which everything else is known; nothing follows the last."""
        if k < len(self.stack) - 1:
            run_through(*self._remembering(k, part, given, following), self.processes)

    def _remembering(
        self, k: int, part: Part, given: Series, following: Series | None
    ) -> tuple[Remembering, Batches]:
        """Return a part that remembers what it returns, unless that is the output, and batches."""
        last = k == len(self.stack) - 1
        batches = Batches(
            spans=self.spans,
            samples=self.samples,
            given=(given,) if k else (),
            # The output of the model is large.
            size=self.sizes.end if last else None,
        )
        return Remembering(part, None if last else following, len(batches)), batches

    def _candidates_in(self, k: int) -> dict[str, Candidate]:
        """Return the candidates of a part that change weights, by their names in the journal."""
        return {
            str(n): candidate
            for n, candidate in enumerate(self.candidates)
            if candidate.weight_bits != FULL_PRECISION_BITS
            and candidate.layer in self.stack.layers[k]
        }

    def _write_down(self, k: int, held: dict[str, Tensor]) -> None:
        """Keep what ``_estimate`` found of a part."""
        self.journal.write(f"estimates-{k}", lambda: save(held))

    def _recall(self, k: int) -> bool:
        """Note what was kept of a part; return whether anything was."""
        content = self.journal.read(f"estimates-{k}")
        if content is not None:
            self._note(k, load(content))
        return content is not None

    def _note(self, k: int, held: Mapping[str, Tensor]) -> None:
        """Note what ``_estimate`` found of candidates of a part."""
        for n, candidate in self._candidates_in(k).items():
            if f"square:{n}" not in held:
                continue
            self.squares[candidate] = float(held[f"square:{n}"])
            if f"energy:{n}" in held:
                self.energies[k, candidate] = held[f"energy:{n}"].to(self.device)
            if f"error:{n}" in held:
                self.sampled[k, candidate.layer] = held[f"rows:{n}"].to(self.device)
                self.errors[k, candidate] = len(self.kept_errors)
                self.kept_errors.append(held[f"error:{n}"].to(self.device))

    def _estimate(
        self, k: int, part: Part, grams: Mapping[str, Tensor], counts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what the errors of a part's candidates do to their layers' outputs."""
        by_layer: dict[str, dict[str, Candidate]] = {}
        for n, candidate in self._candidates_in(k).items():
            by_layer.setdefault(candidate.layer, {})[n] = candidate
        names = list(by_layer)

        def look(number: int) -> dict[str, Tensor]:
            name, candidates = names[number], by_layer[names[number]]
            layer = self.layers[name]
            matrix = finite_matrix(tensor_of(part, layer.weight_name), layer)
            own = _Matrix(matrix, grams.get(name), counts.get(name))
            tensors = {
                n: c for n, c in candidates.items() if c.scheme.granularity is Granularity.TENSOR
            }
            others = {n: c for n, c in candidates.items() if n not in tensors}
            found: dict[str, Tensor] = {}
            for together, apart in ((tensors, False), (others, True)):
                if together:
                    found |= self._estimate_layer(together, own, apart=apart)
            return found

        held: dict[str, Tensor] = {}
        for found in self.processes.map(look, len(names)):
            held |= found
        return held

    def _estimate_layer(
        self, candidates: Mapping[str, Candidate], own: _Matrix, *, apart: bool
    ) -> dict[str, Tensor]:
        """Return the squared change of a weight, and of each output channel of its layer.

        Of a matrix of many rows some are rounded. What the others lose is taken to be in proportion
        to their own energy, which is a ratio estimate: exact where rows differ by a factor.

        ``apart``: whether rows can be rounded apart from each other.
        """
        matrix, gram, count = own.values, own.gram, own.count
        name = next(iter(candidates.values())).layer
        rows = torch.arange(len(matrix), device=matrix.device)
        if count is not None and apart:
            # Rows that are never looked up do nothing.
            rows = count.nonzero()[:, 0]
        if apart and len(rows) > SAMPLED_ROWS and (gram is None or len(gram) == 1):
            rows = rows[_spread(len(rows), SAMPLED_ROWS)]
        sample = matrix[rows].double()
        rounder = Rounder.NEAREST if gram is None else self.rounder
        found = estimated(
            sample,
            [(candidate.weight_bits, candidate.scheme) for candidate in candidates.values()],
            importance=self.importance.get(name),
            inputs_gram=gram,
            rounding=None if rounder is Rounder.NEAREST else rounder,
        )
        held: dict[str, Tensor] = {}
        for n, values in zip(candidates, found, strict=True):
            error = values - sample
            square = float(error.square().sum() / sample.square().sum().clamp_min(1e-300))
            held[f"square:{n}"] = torch.tensor(square * own.square, dtype=torch.float64)
            if count is not None:
                seen = count[rows]
                share = count.sum() / seen.sum().clamp_min(1.0)
                held[f"energy:{n}"] = share * (seen @ error.square())
            elif gram is not None:
                energy = _energy(error, gram)
                if len(rows) < len(matrix):
                    energy = own.energy * (energy.sum() / own.energy[rows].sum().clamp_min(1e-300))
                held[f"energy:{n}"] = energy
                if self.layers[name].kind in WHOLE_ROWS:
                    few = _spread(len(rows), SAMPLED_ROWS)
                    held[f"rows:{n}"], held[f"error:{n}"] = rows[few], error[few].half()
        return held

    def _read(self, candidate: Candidate) -> QuantizedWeight:
        """Return a candidate's codes and scales; round those of its part that were asked for."""
        name = self._names[candidate]
        if name not in self._kept:
            self.prepare(Context())
            k = next(k for k, names in enumerate(self.stack.layers) if candidate.layer in names)
            self._round(k)
        return self._kept[name][candidate.layer]

    def _round(self, k: int) -> None:
        """Round the candidates of a part that were asked for, and keep their codes."""
        weights: QuantizedWeights | None = None
        for candidate in self._candidates_in(k).values():
            if candidate not in self._asked:
                continue
            if self.recall_rounded(self._names[candidate]) is None:
                weights = weights or self._quantizers(k)
                found = {candidate.layer: weights.quantized(candidate)}
                self.write_down_rounded(self._names[candidate], found)
            del self._asked[candidate]

    def _quantizers(self, k: int) -> QuantizedWeights:
        """Return what rounds the layers of a part, each by itself."""
        part = self.stack.part(k)
        grams: Mapping[str, Tensor] = {}
        if self.rounder is not Rounder.NEAREST:
            grams, _ = self._look(k, part, self.given[k], None)
        return QuantizedWeights(part, self.inventory, lambda: grams, self.importance, self.rounder)

    def write_down_rounded(self, name: str, weights: Mapping[str, QuantizedWeight]) -> PutAway:
        """Keep codes and scales of layers, in the journal too; returns them as they are kept."""
        self._kept[name] = self.put_away(weights)
        made = QuantizedModel(
            model_digest=self.inventory.model_digest, rounding=str(self.rounder), weights=weights
        )
        self.journal.write(name, made.to_bytes)
        return self._kept[name]

    def recall_rounded(self, name: str) -> PutAway | None:
        """Return codes and scales that were kept under a name, or ``None``."""
        if name not in self._kept:
            content = self.journal.read(name)
            if content is None:
                return None
            weights = QuantizedModel.load(content).weights
            self._kept[name] = self.put_away({k: w.to(self.device) for k, w in weights.items()})
        return self._kept[name]

    def put_away(self, weights: Mapping[str, QuantizedWeight]) -> PutAway:
        """Return the same weights, beyond the limit of memory in a file until they are read."""
        found = PutAway(self._codes)
        for name, weight in weights.items():
            found.add(name, weight)
        return found


class PutAway(WeightsOnDemand):
    """Quantized weights in a series of tensors."""

    def __init__(self, series: Series) -> None:
        self._held: dict[str, tuple[QuantizedWeight, range]] = {}
        super().__init__(self._held)
        self._series = series

    def add(self, name: str, weight: QuantizedWeight) -> None:
        """Put one more away."""
        codes, start = weight.compact().codes, len(self._series)
        for tensor in (codes, weight.scales, weight.zero_points):
            if tensor is not None:
                self._series.append(tensor)
        # An empty slice would hold on to the whole tensor.
        empty = codes.new_empty(0)
        about = replace(weight, codes=empty, scales=empty, zero_points=None)
        self._held[name] = about, range(start, len(self._series))

    def join(self, other: PutAway) -> None:
        """Also hold what another one does, in the same series."""
        self._held.update(other._held)

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read the weight of a layer, with codes of a small type."""
        about, places = self._held[name]
        codes, scales, *zeros = (self._series[place] for place in places)
        return replace(about, codes=codes, scales=scales, zero_points=zeros[0] if zeros else None)


def _spread(n: int, most: int) -> Tensor:
    """Return at most so many of the first ``n`` numbers, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


class _Matrix:
    """The weight of a layer as ``[rows, columns]``, and what its rows are multiplied with.

    Attributes:
        values: The weight.
        gram: f64[groups, columns, columns] of its inputs, if they are multiplied with.
        count: f64[rows]: how often each row is looked up, if they are.
        square: Sum of the squared weights.
        energy: f64[rows]: ``Σ w² diag(G)`` of each row, of the first Gram.
    """

    def __init__(self, values: Tensor, gram: Tensor | None, count: Tensor | None) -> None:
        self.values, self.gram, self.count = values, gram, count
        ones = torch.ones(values.shape[1], dtype=torch.float64, device=values.device)
        weights = torch.stack([ones, ones if gram is None else gram[0].diagonal()], dim=1)
        # A few rows at a time: in float64 the matrix would take several times its own memory.
        sums = torch.cat(
            [rows.double().square() @ weights for rows in torch.split(values, ROWS_AT_ONCE)]
        )
        self.square = float(sums[:, 0].sum())
        self.energy = sums[:, 1]


def _energy(error: Tensor, gram: Tensor) -> Tensor:
    """Return f64[rows]: ``e G e^T`` of each row, ``gram`` being one for each group of rows."""
    grouped = error.reshape(len(gram), -1, error.shape[1])
    found: Tensor = ((grouped @ gram) * grouped).sum(dim=2).reshape(-1)
    return found
