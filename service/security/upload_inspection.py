"""What an uploaded file is, told from its bytes without running or unpacking any of it.

Here a file is refused that could run code when read, that is torn, or that unpacks to more than
is allowed. Reading it for real happens in the evaluator.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bitquota.errors import (
    InvalidCalibration,
    InvalidInput,
    InvalidMatrix,
    InvalidModel,
    InvalidPlan,
    TooLarge,
    UnsafeModel,
)
from bitquota.models.pt2.vetting import vet_pt2
from bitquota.plan import Plan
from bitquota.service.security.archives import check_arrays, check_npz, check_zip
from bitquota.service.security.json_limits import DOCUMENT, check_json, parse_json
from bitquota.service.security.onnx_fields import check_onnx
from bitquota.service.store.formats import (
    FORMATS_OF_RESULTS,
    ArtifactKind,
    DatasetFormat,
    ModelFormat,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject

SAFE_WAYS = (
    "export it with torch.export.save (.pt2) or to ONNX, or upload a zip of config.json and "
    "safetensors files"
)
MAX_PLAN_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = DOCUMENT.size
_PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(1, 6))
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def inspect_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return the format of the upload at ``path`` that is to be of ``kind``, or raise."""
    path = Path(arguments["path"])
    limits = {"max_ratio": arguments["max_ratio"], "max_bytes": arguments["max_bytes"]}
    kind = ArtifactKind(arguments["kind"])
    inspect: dict[ArtifactKind, Callable[[], Any]] = {
        ArtifactKind.MODEL: lambda: inspect_model(path, max_ratio=arguments["max_ratio"]),
        ArtifactKind.DATASET: lambda: inspect_dataset(path, **limits),
        ArtifactKind.PLAN: lambda: inspect_plan(path),
        ArtifactKind.MATRIX: lambda: inspect_matrix(path, **limits),
        ArtifactKind.QUANTIZED: lambda: check_safetensors(path, InvalidPlan),
    }
    found = inspect[kind]()
    return {"format": FORMATS_OF_RESULTS[kind] if found is None else str(found)}, b""


def inspect_model(path: Path, *, max_ratio: int) -> ModelFormat:
    """Return what kind of model lies at ``path``.

    Raises:
        UnsafeModel: It could run code when read.
        InvalidModel: It is no model file, or torn.
        TooLarge: It unpacks to more than ``max_ratio`` times its size.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(_LEGACY_TORCH) or start.startswith(_PICKLE_STARTS):
        msg = (
            "a model must be data, never code; this file is a pickle, which runs code when it "
            f"is read: {SAFE_WAYS}"
        )
        raise UnsafeModel(msg, format="pickle")
    if start.startswith(b"PK"):
        return _inspect_model_zip(path, max_ratio)
    if _looks_like_safetensors(start, path):
        check_safetensors(path, InvalidModel)
        msg = (
            "weights must come with the network they belong to; got a safetensors file alone: "
            "upload a zip of the folder with its config.json, or a .pt2"
        )
        raise InvalidModel(msg, format="safetensors")
    if _looks_like_onnx(start):
        check_onnx(path)
        return ModelFormat.ONNX
    msg = f"a model must be a .pt2, an ONNX file or a zip of a Hugging Face folder: {SAFE_WAYS}"
    raise InvalidModel(msg)


def _inspect_model_zip(path: Path, max_ratio: int) -> ModelFormat:
    names = check_zip(path, max_ratio=max_ratio, error=InvalidModel)
    leaves = {PurePosixPath(name).name for name in names}
    tops = {PurePosixPath(name).parts[-2:] for name in names}
    if "constants.pkl" in leaves and "data.pkl" in leaves:
        msg = f"a model must be data, never code; this file is TorchScript: {SAFE_WAYS}"
        raise UnsafeModel(msg, format="torchscript")
    if "archive_format" in leaves or "serialized_exported_program.json" in leaves:
        _check_json_members(path)
        vet_pt2(path)
        return ModelFormat.PT2
    if "data.pkl" in leaves:
        msg = (
            "a model must be data, never code; this file was written by torch.save and holds a "
            f"pickle: {SAFE_WAYS}"
        )
        raise UnsafeModel(msg, format="torch.save")
    unsafe = sorted(
        name
        for name in names
        if PurePosixPath(name).suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py", ".so"}
    )
    if unsafe:
        msg = (
            "a model folder must hold data only; this zip holds "
            f"{', '.join(unsafe[:3])}, which can run code: leave it out and keep config.json and "
            "the safetensors files"
        )
        raise UnsafeModel(msg, members=unsafe[:20])
    if "config.json" in leaves and any(name.endswith(".safetensors") for name in names):
        if any(len(parts) > 1 for parts in tops):
            msg = "the files of a model folder must lie at the top of the zip, in no folder"
            raise InvalidModel(msg)
        return ModelFormat.HUGGING_FACE
    msg = (
        "a zipped model must be a .pt2 or hold config.json beside safetensors files; got members "
        f"{', '.join(sorted(leaves)[:5])}"
    )
    raise InvalidModel(msg)


def _check_json_members(path: Path) -> None:
    """Raise unless the graph and the configs of a ``.pt2`` are JSON that may be parsed."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".json") and "/extra/" not in member.filename:
                    _check_member(archive, member)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as err:
        msg = f"a .pt2 must be whole and readable; this one is not: {err}"
        raise InvalidModel(msg) from err


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    _within(member.file_size, DOCUMENT.size, f"'{member.filename}'")
    if member.compress_type != zipfile.ZIP_STORED:
        msg = f"members of a .pt2 must be stored as they are; '{member.filename}' is compressed"
        raise UnsafeModel(msg, member=member.filename)
    try:
        check_json(archive.read(member), DOCUMENT, "the JSON of a .pt2")
    except InvalidInput as err:
        raise InvalidModel(err.message, member=member.filename) from err


def _looks_like_onnx(start: bytes) -> bool:
    """Return whether a file begins as a ModelProto: its version, then another of its fields."""
    known_fields = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42}
    return len(start) > 2 and start[0] == 0x08 and start[1] <= 32 and start[2] in known_fields


def inspect_dataset(path: Path, *, max_ratio: int, max_bytes: int) -> DatasetFormat:
    """Return what kind of calibration set lies at ``path``.

    Raises:
        InvalidCalibration: It is none, torn, holds Python objects, or its arrays do not fit.
        TooLarge: It unpacks to more than is allowed.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"PK"):
        check_npz(path, max_ratio=max_ratio, max_bytes=max_bytes)
        return DatasetFormat.NPZ
    if start.startswith(_PICKLE_STARTS):
        msg = (
            "a calibration set must be data, never code; this file is a pickle: write it with "
            "numpy.savez or safetensors"
        )
        raise InvalidCalibration(msg, format="pickle")
    if _looks_like_safetensors(start, path):
        check_safetensors(path, InvalidCalibration)
        return DatasetFormat.SAFETENSORS
    msg = "a calibration set must be an .npz (numpy.savez) or a safetensors file; got neither"
    raise InvalidCalibration(msg)


def inspect_plan(path: Path) -> None:
    """Check that a plan lies at ``path``.

    Raises:
        InvalidPlan: It is none, or its sums do not hold.
        TooLarge: It is larger than any plan.
    """
    _at_most(path, MAX_PLAN_BYTES)
    try:
        data = parse_json(path.read_bytes(), DOCUMENT, "a plan")
    except InvalidInput as err:
        msg = f"a plan must be a JSON file that 'bitquota plan' wrote; {err.message}"
        raise InvalidPlan(msg) from err
    Plan.from_json(data)


def inspect_matrix(path: Path, *, max_ratio: int, max_bytes: int) -> None:
    """Check that an archive of plain arrays lies at ``path``; the rest is seen when it is solved.

    Raises:
        InvalidMatrix: It is none, torn, or holds Python objects.
        TooLarge: It unpacks to more than is allowed.
    """
    try:
        check_arrays(path, max_ratio=max_ratio, max_bytes=max_bytes, what="a matrix", kinds="biufU")
    except InvalidCalibration as err:
        raise InvalidMatrix(err.message, **err.details) from err


def _at_most(path: Path, limit: int) -> None:
    _within(path.stat().st_size, limit, "this upload")


def _within(size: int, limit: int, what: str) -> None:
    if size > limit:
        msg = f"{what} must be at most {limit:,} bytes; it has {size:,}"
        raise TooLarge(msg, limit=limit)


def _looks_like_safetensors(start: bytes, path: Path) -> bool:
    if len(start) < 9 or start[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", start[:8])
    return bool(length <= max(_MAX_HEADER_BYTES, path.stat().st_size))


def check_safetensors(path: Path, error: type[InvalidInput]) -> None:
    """Check that header and bytes of a safetensors file fit each other; raises ``error``."""
    size = path.stat().st_size
    with path.open("rb") as file:
        # A file of less than eight bytes has no room for what it announces.
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, _MAX_HEADER_BYTES):
            msg = (
                f"a safetensors file must be whole; its header says {length:,} bytes and the file "
                f"has {size:,}: it is truncated, upload it again"
            )
            raise error(msg, size=size)
        text = file.read(length)
    try:
        header = parse_json(text, DOCUMENT, "the header of a safetensors file")
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            bits = math.prod(entry["shape"]) * _DTYPE_BITS[entry["dtype"]]
            if start != end or (stop - start) * 8 != bits or min(entry["shape"], default=0) < 0:
                msg = f"tensor '{name}' of a safetensors file must fit its shape; it does not"
                raise error(msg, tensor=name)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as err:
        if isinstance(err, error):
            raise
        msg = f"a safetensors file must have a valid header; got: {err!r:.200}"
        raise error(msg) from err
    if size != 8 + length + end:
        msg = (
            f"a safetensors file must be whole; {8 + length + end:,} bytes are announced and "
            f"{size:,} are there: it is truncated or has a tail, upload it again"
        )
        raise error(msg, expected=8 + length + end, size=size)
