"""Bitquota's own packed integers: any width, any kind of layer, read back by torch."""

from __future__ import annotations

from bitquota.candidates.storage import ScaleFormat, Scheme
from bitquota.candidates.targets.storage_format import full_precision, per_width
from bitquota.candidates.targets.target import Target

TARGET = Target(
    name="ref-int",
    summary="Packed integers in safetensors, read back by bitquota itself: the reference.",
    versions={"safetensors": "0.8"},
    formats=(
        *per_width((2, 3, 4, 5, 6, 7, 8), Scheme(scale_format=ScaleFormat.FP16)),
        full_precision(),
    ),
    exporter="ref-int",
    verified="run",
)
