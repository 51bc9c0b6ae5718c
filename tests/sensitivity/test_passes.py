"""What a measure says that it takes is what it takes: both follow from the same schedule."""

from __future__ import annotations

import pytest

from bitquota.candidates.table import enumerate_candidates
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.registry import measures
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples

FORWARD_ONLY = ("gram", "pairs", "diagonal")
WIDTHS = (2, 3, 4, 8)

LITTLE = {"engine": "graph", "batch_norm": "moved", "memory_limit_bytes": 40_000}
"""So little memory that prefixes are computed again: statistics fix the size of a chunk."""


def prepare(**options):
    """Return a runner on 13 samples in chunks of 5, and a table without full precision."""
    module = build(Residual)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(Residual, n=13), chunk_size=5, **options)
    return runner, enumerate_candidates(inventory, WIDTHS)


def counted(name, **options):
    """Return the passes that a measure declares on one runner and takes on another."""
    measure = measures()[name]
    declared = measure.cost(*prepare(**options))
    runner, table = prepare(**options)
    measure.measure(runner, table, loss_by_name("kl"))
    return declared, runner.passes.passes


@pytest.mark.parametrize("name", sorted(measures()))
def test_declared_passes_are_those_that_are_run(name):
    """Every measure, on the graph of a network with a skip connection."""
    declared, run = counted(name, engine="graph")

    assert run == pytest.approx(declared, rel=1e-9)


@pytest.mark.parametrize("name", FORWARD_ONLY)
@pytest.mark.parametrize(
    "options",
    [
        {"engine": "eager"},
        {"engine": "eager", "batch_norm": "moved"},
        {"engine": "graph", "bias_correction": True},
        LITTLE,
    ],
    ids=["eager", "eager with corrections", "graph with corrections", "little memory"],
)
def test_other_ways_to_run(name, options):
    """Corrections run the model once more; what is not kept is computed again, and is counted."""
    declared, run = counted(name, **options)

    # The last chunk is smaller, so that the same memory keeps more of it.
    slack = 0.05 if "memory_limit_bytes" in options else 1e-9
    assert run == pytest.approx(declared, rel=slack)


def test_little_memory_costs_passes():
    """The case above is one: with all memory fewer passes are declared."""
    assert (
        counted("gram", **LITTLE)[0]
        > 1.05 * (counted("gram", engine="graph", batch_norm="moved")[0])
    )
