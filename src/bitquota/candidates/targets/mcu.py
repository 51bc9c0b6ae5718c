"""Microcontroller kernels: 2, 4 and 8 bits per channel, activations of 8 bits everywhere."""

from __future__ import annotations

from bitquota.candidates.storage import Scheme
from bitquota.candidates.targets.storage_format import CONVOLUTIONS, LINEAR, per_width
from bitquota.candidates.targets.target import Target

TARGET = Target(
    name="mcu",
    summary="Packed integers for mixed-precision kernels on microcontrollers.",
    versions={},
    formats=per_width(
        (2, 4, 8), Scheme(row_alignment_bits=8), name="int{bits}", kinds=CONVOLUTIONS | LINEAR
    ),
    exporter="ref-int",
    refuses=("2:4",),
    not_run="its kernels need a microcontroller; bitquota reads the codes back and runs them",
    activation_bits=8,
)
