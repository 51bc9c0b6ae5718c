"""Files to time: plans of one model that differ in their bit-widths, written as a target has them.

A layer is not timed alone: what it takes depends on what a runtime fuses around it and on what
caches hold. Whole models are timed instead, and differences between them are the costs
(``profile_fit``). Layers of the same kind, shape and work are taken to need the same time; in about
half of the plans all such layers have one width, which makes differences large.

Design: docs/design/latency.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.architectures import prepare_inventory
from bitquota.candidates.offered import offered_candidates
from bitquota.candidates.storage import Scheme
from bitquota.candidates.targets import TARGETS
from bitquota.errors import InvalidInput
from bitquota.exports.export import exporter_by_name
from bitquota.exports.prepared import prepare_export
from bitquota.exports.profile_order import FILES, RUNTIMES, Order, tokens_of
from bitquota.models.binding import bound
from bitquota.models.loaded import inventory_of
from bitquota.plan import Assignment, Plan, PlanTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.candidates.targets import Target
    from bitquota.exports.prepared import PreparedExport
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.quantizers.activations import InputGrid
    from bitquota.quantizers.weights import QuantizedWeight

CHECKED = 8
"""Random plans that are timed too, and that no cost is fitted to."""

LARGEST_BYTES = 2**34
"""Bytes that all files together may take."""

Choice = tuple[int, ...]
Kind = tuple[object, ...]


def require_timed(target: Target) -> str:
    """Return the runtime of a target; raises ``InvalidInput`` where its files cannot be timed."""
    if target.exporter not in RUNTIMES:
        able = sorted(n for n, t in TARGETS.items() if t.exporter in RUNTIMES)
        msg = (
            f"a profile needs a target whose runtime it can time, {' or '.join(able)}; got "
            f"'{target.name}': write the table yourself (docs/reference/costs.schema.json)"
        )
        raise InvalidInput(msg, target=target.name)
    return RUNTIMES[target.exporter]


def write_files(
    model: LoadedModel,
    target: Target,
    samples: CalibrationSet,
    folder: Path,
    *,
    weight_bits: Sequence[int] = (),
    batch: int = 1,
    threads: int = 1,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda _done, _total: None,
) -> Order:
    """Write the files that a profile of ``model`` times, and the script that times them.

    Args:
        model: Of which.
        target: Whose formats and runtime.
        samples: The first ``batch`` of them are run.
        folder: An empty one.
        weight_bits: Bit-widths to time; all of the target's if empty.
        batch: Samples of one run.
        threads: For the runtime.
        seed: Of the plans.
        tell: Called with the number of written files and of all.

    Raises:
        InvalidInput: The target has no runtime to time, there are too few samples, or the files
            would take too many bytes.

    Cost: an export for each file, about 20 and 1.5 for each kind of layer and width.
    """
    runtime = require_timed(target)
    samples = bound(model, samples).first(max(batch, 2))
    if len(samples) < batch:
        msg = f"a batch of {batch} needs as many samples; got {len(samples)}: give more, or --batch"
        raise InvalidInput(msg)
    inventory = prepare_inventory(inventory_of(model.module, model, samples), target)
    table = offered_candidates(
        inventory,
        target,
        weight_bits=weight_bits,
        scheme=Scheme(),
        activation_bits=(None,),
        fixed={},
    )
    layers = {layer.name: layer for layer in inventory.layers}
    offsets, counts = table.offsets, np.diff(table.offsets).tolist()
    groups = [
        kind_of([layers[c.layer] for c in table.rows[start].candidates]) for start in offsets[:-1]
    ]
    choices = designed_choices(groups, counts, seed)
    plans = [_plan_of(inventory, table, target, choice) for choice in choices]

    held = sum(plan.model_bits for plan in plans) // 8
    if held > LARGEST_BYTES:
        msg = (
            f"the {len(plans)} files of a profile must take at most {LARGEST_BYTES / 2**30:.3g} "
            f"GiB; they would take {held / 2**30:.3g}: time fewer widths (--bits), or a model of "
            "the same layers with fewer blocks"
        )
        raise InvalidInput(msg, files=len(plans), bytes=held)

    # One file for each, of weights that are quantized once for each width.
    made = _Maker.of(model, target, samples, plans[: max(counts)])
    exporter = exporter_by_name(target.exporter)
    files = []
    for k, plan in enumerate(plans):
        place = folder / f"{k:03}"
        place.mkdir()
        exporter.export(made.prepared(plan), place)
        files.append(f"{place.name}/{FILES[runtime]}")
        tell(k + 1, len(plans))
    inputs = [t[:batch] for t in samples.inputs]
    numbers: dict[Kind, int] = {}
    kinds = [numbers.setdefault(kind_of([la]), len(numbers)) for la in inventory.layers]
    order = Order(
        runtime=runtime,
        options={key: str(value) for key, value in target.runtime_options.items()},
        threads=threads,
        batch=batch,
        length=tokens_of(inputs),
        model_digest=inventory.model_digest,
        target=target.name,
        layers=tuple(layers),
        kinds=tuple(kinds),
        files=tuple(files),
        labels=tuple(tuple(a.candidate.label for a in plan.assignments) for plan in plans),
        checked=CHECKED,
    )
    order.save(folder, inputs)
    return order


def kind_of(layers: Sequence[Layer]) -> Kind:
    """Return what decides the time of layers: kind, shape and work of each."""
    return tuple((la.kind, la.weight_shape, la.n_macs, la.n_inputs) for la in layers)


def designed_choices(kinds: Sequence[Kind], counts: Sequence[int], seed: int) -> list[Choice]:
    """Return choices whose times tell the costs: uniform ones, designed ones, and random ones.

    Args:
        kinds: Of each group.
        counts: Candidates of each group.
        seed: Of the draws.
    """
    widest = max(counts)
    distinct = list(dict.fromkeys(kinds))
    effects = sum(max(c for k, c in zip(kinds, counts, strict=True) if k == kind) - 1
                  for kind in distinct)  # fmt: skip
    rng = np.random.default_rng(seed)
    found = [tuple(min(k, c - 1) for c in counts) for k in range(widest)]
    for _ in range(effects + effects // 2 + 4):
        alike = {
            kind: int(rng.integers(2**31)) if rng.random() < 0.5 else None for kind in distinct
        }
        found.append(
            tuple(
                int(rng.integers(c)) if (same := alike[kind]) is None else same % c
                for kind, c in zip(kinds, counts, strict=True)
            )
        )
    return found + [tuple(int(rng.integers(c)) for c in counts) for _ in range(CHECKED)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Maker:
    """What files are made of: each layer at each width, quantized once; the graph, traced once."""

    first: PreparedExport
    weights: dict[Candidate, QuantizedWeight]
    grids: dict[Candidate, InputGrid]

    @classmethod
    def of(
        cls, model: LoadedModel, target: Target, samples: CalibrationSet, uniform: Sequence[Plan]
    ) -> _Maker:
        """Quantize every layer, and its inputs, as the uniform plans have it."""
        weights: dict[Candidate, QuantizedWeight] = {}
        grids: dict[Candidate, InputGrid] = {}
        holds = getattr(exporter_by_name(target.exporter), "holds_inputs", None)
        for plan in uniform:
            made = prepare_export(model, plan, target=target, samples=samples, holds_inputs=holds)
            own = {candidate.layer: candidate for candidate in plan.candidates}
            weights |= {own[name]: weight for name, weight in made.weights.items()}
            grids |= {own[name]: grid for name, grid in made.activations.items()}
        # Of the widest, so that layers in full precision have their own weights.
        return cls(first=replace(made, reference=None, traced={}), weights=weights, grids=grids)

    def prepared(self, plan: Plan) -> PreparedExport:
        """Return a plan, ready to be written."""
        chosen = {candidate.layer: candidate for candidate in plan.candidates}
        return replace(
            self.first,
            plan=plan,
            candidates=chosen,
            weights={n: self.weights[c] for n, c in chosen.items() if c in self.weights},
            activations={n: self.grids[c] for n, c in chosen.items() if c in self.grids},
        )


def _plan_of(inventory: Inventory, table: CandidateTable, target: Target, choice: Choice) -> Plan:
    by_layer = {candidate.layer: candidate for candidate in table.decode(choice)}
    return Plan(
        model_digest=inventory.model_digest,
        assignments=tuple(
            Assignment(layer=layer, candidate=by_layer[layer.name]) for layer in inventory.layers
        ),
        unquantized=inventory.unquantized,
        target=PlanTarget.of(target),
    )
