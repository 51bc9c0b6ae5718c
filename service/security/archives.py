"""Zip archives and ``.npz`` files, checked by their directory and headers, never unpacked."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidCalibration, InvalidInput, TooLarge

if TYPE_CHECKING:
    from pathlib import Path

MAX_MEMBERS = 100_000
_MAX_DIRECTORY_BYTES = 32 * 2**20
_LONGEST_END = 2**16 + 22
_END, _END64_LOCATOR = b"PK\x05\x06", b"PK\x06\x07"
_END_FIELDS = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64_FIELDS = struct.Struct("<4sQ2H2L4Q")

# numpy reads a header with Python's own parser, which has errors of its own.
_UNREADABLE = (
    ValueError, KeyError, TypeError, OSError, EOFError, SyntaxError, tokenize.TokenError,
    RecursionError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError,
)  # fmt: skip


def check_zip(path: Path, *, max_ratio: int, error: type[InvalidInput]) -> list[str]:
    """Return the member names of a zip whose directory holds nothing dangerous.

    Raises:
        InvalidInput: As ``error``: torn, a name that leaves its folder, a link, encrypted.
        TooLarge: It unpacks to more than ``max_ratio`` times its size.
    """
    _check_directory(path, error)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as err:
        msg = f"a zip file must be whole and readable; this one is not: {err}"
        raise error(msg) from err
    _check_count(len(members), error)
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        msg = "the members of a zip file must have different names; one appears twice"
        raise error(msg)
    for member in members:
        parts = PurePosixPath(member.filename).parts
        unix_type = member.external_attr >> 28
        if ".." in parts or member.filename.startswith(("/", "\\")) or "\\" in member.filename:
            msg = f"a zip member must stay inside its folder; got '{member.filename}'"
            raise error(msg, member=member.filename)
        if unix_type == 0o12 or member.flag_bits & 0x1:
            msg = f"a zip member must be a plain file; '{member.filename}' is a link or encrypted"
            raise error(msg, member=member.filename)
    stored = max(path.stat().st_size, 1)
    unpacked = sum(member.file_size for member in members)
    if unpacked > max_ratio * stored:
        msg = (
            f"an archive must unpack to at most {max_ratio} times its {stored:,} bytes; this one "
            f"says {unpacked:,}"
        )
        raise TooLarge(msg, stored=stored, unpacked=unpacked)
    return names


def _check_count(members: int, error: type[InvalidInput]) -> None:
    if not 1 <= members <= MAX_MEMBERS:
        msg = f"a zip file must have between 1 and {MAX_MEMBERS:,} members; got {members:,}"
        raise error(msg)


def _check_directory(path: Path, error: type[InvalidInput]) -> None:
    """Raise if a zip says that its directory is larger than any that is taken.

    ``zipfile`` makes an object of every member before it can be asked how many there are. A file
    without an end, or with one that lies, is left to it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _LONGEST_END))
        end = file.read()
        at = end.rfind(_END)
        if at < 0 or len(end) < at + _END_FIELDS.size:
            return
        members, length = _END_FIELDS.unpack_from(end, at)[4:6]
        before = end[max(0, at - _LOCATOR.size) : at]
        if len(before) == _LOCATOR.size and before.startswith(_END64_LOCATOR):
            file.seek(min(size, _LOCATOR.unpack(before)[2]))
            large = file.read(_END64_FIELDS.size)
            if len(large) == _END64_FIELDS.size:
                members, length = _END64_FIELDS.unpack(large)[7:9]
    _check_count(members or 1, error)
    if length > _MAX_DIRECTORY_BYTES:
        msg = (
            f"the directory of a zip file must have at most {_MAX_DIRECTORY_BYTES:,} bytes; got "
            f"{length:,}: use fewer members with shorter names"
        )
        raise error(msg)


def check_npz(path: Path, *, max_ratio: int, max_bytes: int) -> None:
    """Raise unless all arrays of an ``.npz`` hold and have as many samples; as ``check_arrays``."""
    shapes = check_arrays(path, max_ratio=max_ratio, max_bytes=max_bytes, what="a calibration set")
    lengths = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        said = ", ".join(f"{name.removesuffix('.npy')}: {n}" for name, n in lengths.items())
        msg = f"all arrays of a calibration set must have the same number of samples; got {said}"
        raise InvalidCalibration(msg)


def check_arrays(
    path: Path, *, max_ratio: int, max_bytes: int, what: str, kinds: str = "biuf"
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an ``.npz`` whose headers all hold, without unpacking it."""
    names = check_zip(path, max_ratio=max_ratio, error=InvalidCalibration)
    wrong = [name for name in names if not name.endswith(".npy")]
    if wrong:
        msg = f"an .npz must hold .npy arrays only, as numpy.savez writes; got '{wrong[0]}'"
        raise InvalidCalibration(msg, member=wrong[0])
    total = 0
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in names:
            shape, dtype = _npy_header(archive, name, kinds)
            claimed = math.prod(shape) * dtype.itemsize
            total += claimed
            if total > max_bytes:
                msg = (
                    f"{what} must unpack to at most {max_bytes:,} bytes; "
                    f"'{name}' claims shape {list(shape)} of {dtype}"
                )
                raise TooLarge(msg, member=name, bytes=total)
            present = archive.getinfo(name).file_size
            if claimed > present:
                msg = (
                    f"array '{name}' must hold the {claimed:,} bytes of its shape {list(shape)}; "
                    f"the archive has {present:,}: it is truncated, write it again"
                )
                raise InvalidCalibration(msg, member=name)
            shapes[name] = shape
    return shapes


def _npy_header(
    archive: zipfile.ZipFile, name: str, kinds: str
) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    try:
        with archive.open(name) as member:
            head = io.BytesIO(member.read(2**16))
        version = np.lib.format.read_magic(head)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = reader(head)
    except _UNREADABLE as err:
        msg = f"'{name}' must be a .npy array with a readable header; got: {err}"
        raise InvalidCalibration(msg, member=name) from err
    if dtype.hasobject:
        msg = (
            f"array '{name}' must hold numbers; it holds Python objects, which are pickled and "
            "run code when read: convert it to a numeric array"
        )
        raise InvalidCalibration(msg, member=name, dtype=str(dtype))
    if dtype.kind not in kinds:
        msg = f"array '{name}' must hold numbers; it is of type {dtype}"
        raise InvalidCalibration(msg, member=name, dtype=str(dtype))
    if any(n < 0 for n in shape):
        msg = f"array '{name}' must have a shape without negative sizes; got {list(shape)}"
        raise InvalidCalibration(msg, member=name)
    return shape, dtype
