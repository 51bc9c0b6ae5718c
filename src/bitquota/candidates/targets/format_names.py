"""Names of formats where bit-widths are asked for: ``int4``, ``nvfp4``, ``Q4_K``, ``w8a8``.

A target stores each bit-width of a layer in one way, so the name of one of its formats stands for
its bit-width.

Design: docs/design/targets.md
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from bitquota.candidates.targets.storage_format import StorageFormat
    from bitquota.candidates.targets.target import Target
    from bitquota.codec import OneOrMore

FULL_ACTIVATIONS = 16
"""``w4a16`` leaves activations as they are, whatever type the model computes in."""

_GROUPS = re.compile(r"-[bg][0-9]+$")
_INTEGER = re.compile(r"(?:int|w)?([0-9]{1,2})")
_BOTH = re.compile(r"w([0-9]{1,2})a([0-9]{1,2})")


def short_name(storage: StorageFormat) -> str:
    """Return the name of a format without the size of its groups: ``int4`` of ``int4-b32``."""
    return _GROUPS.sub("", storage.name)


def menu(target: Target) -> list[str]:
    """Return the short names of a target's formats but full precision, in its order."""
    own = [f for f in target.formats if f.weight_bits != FULL_PRECISION_BITS]
    return list(dict.fromkeys(short_name(f) for f in own))


def bits_of_names(
    names: list[str], target: Target | None, option: str = "--bits"
) -> tuple[tuple[int, ...], int | None]:
    """Return the bit-widths of weights that names stand for, and that of inputs, if they say one.

    Args:
        names: Bit-widths (``4``, ``int4``), those of weights and inputs (``w8a8``), or formats.
        target: Whose formats, if one is asked for.
        option: Where they were given.

    Raises:
        InvalidInput: A name that stands for nothing here, or different bit-widths for inputs.
    """
    widths: dict[int, None] = {}
    inputs: dict[int | None, str] = {}
    for name in names:
        bits, activations = _meaning(name.strip(), target, option)
        widths[bits] = None
        if activations != 0:
            inputs[activations] = name.strip()
    if len(inputs) > 1:
        msg = (
            f"{option} must name one bit-width for the inputs of all layers; got "
            f"{' and '.join(inputs.values())}: name one of them, or weights alone (w4) and the "
            "bit-widths of inputs beside them (--activations 4,8, activation_bits in REST)"
        )
        raise InvalidInput(msg, bits=names)
    return tuple(widths), next(iter(inputs), None)


def agreed_bits(
    names: list[str],
    target: Target | None,
    activation_bits: OneOrMore | None,
    option: str,
    other: str,
) -> tuple[tuple[int, ...], OneOrMore | None]:
    """Return the bit-widths of weights and of inputs, where the latter may be given twice.

    Args:
        names: See ``bits_of_names``.
        target: Whose formats, if one is asked for.
        activation_bits: Of inputs, where they are asked for beside the names.
        option: Where the names were given.
        other: Where ``activation_bits`` was.

    Raises:
        InvalidInput: As ``bits_of_names``; or the two bit-widths of inputs differ.
    """
    widths, named = bits_of_names(names, target, option)
    if None not in (activation_bits, named) and activation_bits != named:
        several = activation_bits if isinstance(activation_bits, tuple) else (activation_bits,)
        given = ", ".join(map(str, several))
        msg = (
            f"{option} and {other} must agree on the bit-width of inputs; got {named} in "
            f"'{','.join(names)}' and {given}: leave {other} out, or name weights alone (w4)"
        )
        raise InvalidInput(msg, bits=names, activations=activation_bits)
    return widths, activation_bits if named is None else named


def _meaning(name: str, target: Target | None, option: str) -> tuple[int, int | None]:
    """Return bits of weights and of inputs; 0 if nothing is said of them, ``None`` for full."""
    wanted = name.lower()
    formats = () if target is None else target.formats
    found = {f.weight_bits for f in formats if wanted in (f.name.lower(), short_name(f).lower())}
    if len(found) == 1:
        return found.pop(), 0
    both = _BOTH.fullmatch(wanted)
    if both is not None:
        activations = int(both[2])
        return int(both[1]), None if activations >= FULL_ACTIVATIONS else activations
    # Integers by name are not what a target of floating-point numbers stores.
    plain = _INTEGER.fullmatch(wanted)
    if plain is not None and (not wanted.startswith("int") or _has_integers(target, int(plain[1]))):
        return int(plain[1]), 0
    offered = "" if target is None else f", or formats of {target.name} ({', '.join(menu(target))})"
    advice = "" if target is not None else "; formats such as nvfp4 need a --target that has them"
    msg = (
        f"{option} must be bit-widths separated by commas, such as 2,4,8, int4 or w8a8{offered}; "
        f"got '{name}'{advice}"
    )
    raise InvalidInput(msg, bits=name)


def _has_integers(target: Target | None, bits: int) -> bool:
    own = [] if target is None else [f for f in target.formats if f.weight_bits == bits]
    return not own or any(f.scheme.grid.is_integer for f in own)
