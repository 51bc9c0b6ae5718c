"""Hypothesis strategies that build valid values of the vocabulary; none of them filters."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.candidates.storage import (
    SMALL_SCALES,
    WEIGHT_BITS,
    Granularity,
    Grid,
    Rounding,
    ScaleFormat,
    ScaleRule,
    Scheme,
    StorageSize,
)
from bitquota.candidates.table import enumerate_candidates
from bitquota.matrix import SensitivityMatrix

BITS = st.integers(0, 2**40)
WIDTHS = st.sampled_from(WEIGHT_BITS)
LOSSES = st.floats(-100, 100, allow_subnormal=False)


@st.composite
def schemes(draw):
    """Any scheme; a group size exactly where it belongs."""
    granularity = draw(st.sampled_from(Granularity))
    grouped = granularity is Granularity.GROUP
    return Scheme(
        grid=draw(st.sampled_from((Grid.SYMMETRIC, Grid.ASYMMETRIC))),
        granularity=granularity,
        group_size=draw(st.integers(1, 40)) if grouped else None,
        scale_rule=draw(st.sampled_from(ScaleRule)),
        scale_format=draw(st.sampled_from(sorted(set(ScaleFormat) - SMALL_SCALES))),
        rounding=draw(st.sampled_from(Rounding)),
        row_alignment_bits=draw(st.sampled_from((0, 8, 16, 32, 64))),
    )


def sizes():
    """Any storage size."""
    return st.builds(StorageSize, codes=BITS, scales=BITS, zero_points=BITS, padding=BITS)


@st.composite
def layers(draw, name="layer"):
    """One linear layer called ``name``."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return Layer(
        name=name,
        kind=LayerKind.LINEAR,
        weight_name=f"{name}.weight",
        weight_shape=(rows, columns),
        rows=rows,
        columns=columns,
        n_weights=rows * columns,
        n_macs=draw(st.integers(0, 10**6)),
        n_inputs=draw(st.integers(0, 10**4)),
        weight_format_bits=draw(st.sampled_from((16, 32))),
        aliases=tuple(draw(st.lists(st.just(f"{name}.tied"), max_size=1))),
    )


@st.composite
def inventories(draw, *, most=6):
    """A model of blocks with layers ``a``, ``b``, ``c``; some layers may share a group."""
    n = draw(st.integers(1, most))
    names = [f"block.{i // 3}.{'abc'[i % 3]}" for i in range(n)]
    found = tuple(draw(layers(name)) for name in names)
    rest = tuple(
        UnquantizedTensor(name=f"norm.{k}", shape=(size,), format="fp32", size_bits=32 * size)
        for k, size in enumerate(draw(st.lists(st.integers(1, 64), max_size=2)))
    )
    inventory = Inventory(model_digest="sha256:00", layers=found, unquantized=rest)
    if n > 1 and draw(st.booleans()):
        members = draw(st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True))
        inventory = inventory.tie([members])
    return inventory


@st.composite
def tables(draw, **how):
    """The candidates of any inventory at one to four bit-widths."""
    widths = draw(st.lists(WIDTHS, min_size=1, max_size=4, unique=True))
    return enumerate_candidates(draw(inventories(**how)), widths, scheme=draw(schemes()))


@st.composite
def choices(draw, table):
    """One row within each group of ``table``."""
    return tuple(draw(st.integers(0, int(k) - 1)) for k in np.diff(table.offsets))


@st.composite
def matrices(draw):
    """Any sensitivity matrix: with or without cross-layer terms, errors and a base point."""
    table = draw(tables(most=4))
    n = len(table.rows)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def pairs():
        value = rng.normal(size=(n, n)) * 10.0 ** draw(st.integers(-6, 3))
        value = value + value.T
        value[table.group_of_row[:, None] == table.group_of_row] = 0.0
        return value

    full = draw(st.booleans())
    errors = draw(st.booleans())
    return SensitivityMatrix(
        table=table,
        diagonal=rng.normal(size=n) * 10.0 ** draw(st.integers(-6, 3)),
        cross=pairs() if full else None,
        constant=draw(LOSSES),
        base_point=draw(st.none() | choices(table)),
        diagonal_error=rng.random(n) if errors else None,
        cross_error=np.abs(pairs()) if errors and full else None,
        provenance=draw(st.dictionaries(st.text(max_size=4), st.integers() | LOSSES, max_size=2)),
    )
