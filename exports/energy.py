"""A table of energies from counts of operations and bytes, at published energies for each.

Nothing is measured: a processor without a meter does not say what it takes. One run takes for each
layer its multiply-accumulates, its weights once from memory, and its inputs once from a cache.

References:
    [Horowitz] M. Horowitz. Computing's energy problem (and what we can do about it). ISSCC 2014,
    pages 10-14 (45 nm, 0.9 V). doi:10.1109/ISSCC.2014.6757323.

Design: docs/design/latency.md
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from bitquota.candidates.architectures import prepare_inventory
from bitquota.candidates.cost_table import ENERGY, CostTable, LayerCost
from bitquota.candidates.offered import offered_candidates
from bitquota.candidates.storage import FULL_PRECISION_BITS, Scheme
from bitquota.exports.profile_order import tokens_of
from bitquota.models.binding import bound
from bitquota.models.loaded import inventory_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate
    from bitquota.candidates.targets import Target
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

PICOJOULES = {
    "int8 multiply": Fraction("0.2"),
    "int32 add": Fraction("0.1"),
    "fp32 multiply": Fraction("3.7"),
    "fp32 add": Fraction("0.9"),
    # 64 bits from a cache of 1 MB take 100 pJ; from DRAM 1.3 to 2.6 nJ, of which the least.
    "cache bit": Fraction(100, 64),
    "memory bit": Fraction(1300, 64),
}
"""[Horowitz], figure 1.1.9: energies of operations and of 64 bits moved."""


def energy_table(
    model: LoadedModel,
    target: Target,
    samples: CalibrationSet,
    *,
    weight_bits: Sequence[int] = (),
    batch: int = 1,
) -> CostTable:
    """Return the energies of each layer of ``model`` in each format of ``target``.

    Args:
        model: Of which.
        target: Its formats; one that quantizes activations computes in integers, the others in
            floating point.
        samples: Two of them are run to count operations.
        weight_bits: Bit-widths to price; all of the target's if empty.
        batch: Samples of one run, in which weights are read once.

    Cost: a forward pass of two samples.
    """
    samples = bound(model, samples)
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
    return CostTable(
        resource=ENERGY,
        model_digest=inventory.model_digest,
        constant=round(inventory.unquantized_bits * PICOJOULES["memory bit"]),
        layers=tuple(
            LayerCost(
                layer=c.layer,
                candidate=c.label,
                cost=round(picojoules(layers[c.layer], c, batch)),
            )
            for row in table.rows
            for c in row.candidates
        ),
        target=target.name,
        device="45 nm, 0.9 V, computed",
        batch=batch,
        length=tokens_of(samples.inputs),
        source={
            "method": "operations and bits at published energies",
            "reference": "Horowitz, ISSCC 2014, doi:10.1109/ISSCC.2014.6757323",
            "picojoules": {name: float(value) for name, value in PICOJOULES.items()},
        },
    )


def picojoules(layer: Layer, candidate: Candidate, batch: int) -> Fraction:
    """Return what one run takes for a layer.

    ``e = batch (macs e_mac + inputs b_a e_cache) + size e_memory``. An integer multiplier grows
    with the product of its widths: ``e_mac = 0.2 pJ b_w b_a / 64 + 0.1 pJ``. In floating point the
    width of the weights changes what is read, and no operation.
    """
    activation = candidate.activation_bits or FULL_PRECISION_BITS
    if FULL_PRECISION_BITS in {candidate.weight_bits, activation}:
        multiply = PICOJOULES["fp32 multiply"] + PICOJOULES["fp32 add"]
    else:
        share = Fraction(candidate.weight_bits * activation, 64)
        multiply = PICOJOULES["int8 multiply"] * share + PICOJOULES["int32 add"]
    work = layer.n_macs * multiply + layer.n_inputs * activation * PICOJOULES["cache bit"]
    return batch * work + candidate.size_bits * PICOJOULES["memory bit"]
