"""Problems and certificates as files, so that anyone can check a proof elsewhere, later.

Both are ``.npz`` archives without pickle, byte-stable: equal values give equal bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput
from bitquota.solver.problem import Problem
from bitquota.solver.solution import Certificate, Convexification

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

    Arrays = dict[str, NDArray[Any]]

_PROBLEM = "bitquota/problem/1"
_CERTIFICATE = "bitquota/certificate/1"
_NAMES = ("resources", "groups", "labels")
_PROBLEM_ARRAYS = (
    "diagonal",
    "cross",
    "offsets",
    "costs",
    "limits",
    "allowed",
    "forbidden_pairs",
    "required_pairs",
)
_CERTIFICATE_ARRAYS = ("parent", "allowed", "convexification", "point", "multipliers")


def problem_to_bytes(problem: Problem) -> bytes:
    """Return ``problem`` as archive bytes."""
    arrays = {
        name: array for name in _PROBLEM_ARRAYS if (array := getattr(problem, name)) is not None
    }
    meta = {"format": _PROBLEM, "constant": problem.constant}
    return _pack(meta | {name: list(getattr(problem, name)) for name in _NAMES}, arrays)


def problem_from_bytes(data: bytes) -> Problem:
    """Rebuild from ``problem_to_bytes``.

    Raises:
        InvalidInput: Not such an archive (``InvalidProblem`` where an invariant does not hold).
    """
    meta, arrays = _unpack(data, _PROBLEM)
    try:
        given: dict[str, Any] = {name: arrays[name] for name in _PROBLEM_ARRAYS if name != "cross"}
        given |= {name: tuple(map(str, meta[name])) for name in _NAMES}
        return Problem(cross=arrays.get("cross"), constant=float(meta["constant"]), **given)
    except (KeyError, TypeError) as err:
        raise _unreadable(_PROBLEM, err) from err


def certificate_to_bytes(certificate: Certificate) -> bytes:
    """Return ``certificate`` as archive bytes."""
    arrays = {name: getattr(certificate, name) for name in _CERTIFICATE_ARRAYS}
    for index, shape in enumerate(certificate.convexifications):
        for name in Convexification.__slots__:
            arrays[f"convexification{index}_{name}"] = getattr(shape, name)
    # In hexadecimal, so that infinities have a name and every bit survives.
    meta: JsonObject = {"format": _CERTIFICATE, "bound": float(certificate.bound).hex()}
    meta |= {"recursion": certificate.recursion}
    return _pack(meta | {"convexifications": len(certificate.convexifications)}, arrays)


def certificate_from_bytes(data: bytes) -> Certificate:
    """Rebuild from ``certificate_to_bytes``. What it says is for the checker to judge.

    Raises:
        InvalidInput: Not such an archive.
    """
    meta, arrays = _unpack(data, _CERTIFICATE)
    try:
        shapes = tuple(
            Convexification(
                **{
                    name: arrays[f"convexification{index}_{name}"]
                    for name in Convexification.__slots__
                }
            )
            for index in range(int(meta["convexifications"]))
        )
        return Certificate(
            bound=float.fromhex(meta["bound"]),
            convexifications=shapes,
            recursion=bool(meta["recursion"]),
            **{name: arrays[name] for name in _CERTIFICATE_ARRAYS},
        )
    except (KeyError, TypeError, ValueError) as err:
        raise _unreadable(_CERTIFICATE, err) from err


def _pack(meta: JsonObject, arrays: Arrays) -> bytes:
    text = np.frombuffer(canonical_json(meta).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"meta": text, **arrays}.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")  # its default date is a fixed one
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _unpack(data: bytes, wanted: str) -> tuple[JsonObject, Arrays]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["format"] != wanted:
            msg = f"a file of format '{wanted}' is wanted; this one says '{meta['format']}'"
            raise InvalidInput(msg)
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as err:
        if isinstance(err, InvalidInput):
            raise
        raise _unreadable(wanted, err) from err
    return meta, arrays


def _unreadable(wanted: str, err: Exception) -> InvalidInput:
    got = f"{type(err).__name__}: {err}"
    msg = f"a file of format '{wanted}' must be readable and complete; got {got}"
    return InvalidInput(msg)
