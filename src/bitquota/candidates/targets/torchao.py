"""torchao: one configuration per module name, integers kept in bytes."""

from __future__ import annotations

from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.targets.storage_format import LINEAR, StorageFormat, full_precision
from bitquota.candidates.targets.target import Target

_GROUPS = Scheme(granularity=Granularity.GROUP, group_size=32)

TARGET = Target(
    name="torchao",
    summary="A torchao FqnToConfig; every width below 8 bits is still stored in a byte.",
    versions={"torchao": "0.18"},
    formats=(
        *(
            StorageFormat(
                name=f"intx{bits}-g32",
                weight_bits=bits,
                scheme=_GROUPS,
                kinds=LINEAR,
                column_multiple=32,
                note="torchao stores a byte per weight and fits its scales in its own way",
            )
            for bits in (2, 3, 4, 5, 6, 7, 8)
        ),
        full_precision(),
    ),
    exporter="torchao-config",
    verified="run",
)
