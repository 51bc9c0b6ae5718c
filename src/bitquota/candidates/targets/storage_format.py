"""Ways in which targets store weights, and families of the kinds of layer that have them.

Design: docs/design/targets.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import FULL_PRECISION_BITS, Scheme, storage_size
from bitquota.codec import Document, Form

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.candidates.layers import Layer

CONVOLUTIONS = frozenset(
    {
        LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D,
        LayerKind.CONV_TRANSPOSE1D, LayerKind.CONV_TRANSPOSE2D, LayerKind.CONV_TRANSPOSE3D,
    }
)  # fmt: skip
LINEAR = frozenset({LayerKind.LINEAR, LayerKind.LINEAR_TRANSPOSED})
EMBEDDINGS = frozenset({LayerKind.EMBEDDING})
ALL_KINDS = frozenset(LayerKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageFormat(Document):
    """One way in which a target can store a weight.

    Attributes:
        name: The target's name for it, such as ``Q4_0`` or ``int4-g128``.
        weight_bits: Bits of one code; 32 leaves the weight as it is.
        scheme: The target's own quantizer.
        kinds: Kinds of layer that can have it.
        column_multiple: The weights per output channel must be a multiple of this.
        row_multiple: The output channels must be a multiple of this.
        note: What a user should know before choosing it, such as that it saves no time.
    """

    FORM: ClassVar[Form] = Form(derived=("bits_per_weight",))

    name: str
    weight_bits: int
    scheme: Scheme = field(default_factory=Scheme)
    kinds: frozenset[LayerKind] = ALL_KINDS
    column_multiple: int = 1
    row_multiple: int = 1
    note: str = ""

    def refusal(self, layer: Layer) -> str | None:
        """Return why ``layer`` cannot have this format, or ``None``."""
        if layer.kind not in self.kinds:
            return f"{self.name} is not for layers of kind {layer.kind}"
        if layer.columns % self.column_multiple:
            return (
                f"{self.name} needs {self.column_multiple} to divide the {layer.columns} weights "
                "per output channel"
            )
        if layer.rows % self.row_multiple:
            return f"{self.name} needs {self.row_multiple} to divide the {layer.rows} rows"
        return None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a row of 4,096 weights, scales and zero points included."""
        return storage_size(1, 4096, self.weight_bits, self.scheme).total / 4096


def per_width(
    widths: Sequence[int],
    scheme: Callable[[int], Scheme] | Scheme,
    *,
    name: str = "int{bits}",
    kinds: frozenset[LayerKind] = ALL_KINDS,
    column_multiple: int = 1,
) -> tuple[StorageFormat, ...]:
    """Return one format for each bit-width."""
    return tuple(
        StorageFormat(
            name=name.format(bits=bits),
            weight_bits=bits,
            scheme=scheme if isinstance(scheme, Scheme) else scheme(bits),
            kinds=kinds,
            column_multiple=column_multiple,
        )
        for bits in widths
    )


def full_precision(name: str = "as it is") -> StorageFormat:
    """Return the format of a layer that is not quantized."""
    return StorageFormat(name=name, weight_bits=FULL_PRECISION_BITS)
