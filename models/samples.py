"""Calibration sets in: ``.npz``, ``.safetensors``, tables, texts, or a local factory."""

from __future__ import annotations

import ast
import math
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bitquota.errors import InvalidCalibration
from bitquota.models.calibration import GENERIC_NAMES, CalibrationSet
from bitquota.models.factory import call_factory
from bitquota.models.pt2.module import ExportedModel
from bitquota.models.sources import HOW_TO_SAVE, SampleSource, sample_source
from bitquota.models.tables import read_table
from bitquota.models.text import DEFAULT_LENGTH, conversation_text, load_text, text_windows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from bitquota.models.loaded import LoadedModel

MASK_NAMES = ("attention_mask",)
LABEL_NAMES = ("y", "labels")

MAX_BYTES = 32 * 2**30
"""A calibration set of more than this is a mistake or an attack."""

MAX_RATIO = 200
"""Largest accepted compression of an ``.npz`` member; deflated images reach about 20."""


def load_calibration(
    spec: str,
    *,
    n: int | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    length: int = DEFAULT_LENGTH,
) -> CalibrationSet:
    """Load samples, and labels if there are any.

    Inputs are the model's own: floating point as it takes them (already normalised), or integer
    tokens. Images in uint8 are refused rather than guessed at.

    Args:
        spec: An ``.npz`` (members called as the model's inputs, or ``x`` where there is one;
            optional ``y`` or ``labels``), a ``.safetensors``, ``.jsonl`` or ``.parquet`` with the
            same names, a ``.txt`` (or a table with a column ``text`` or ``messages``), or a local
            factory ``package.module:function`` that returns ``inputs`` or ``(inputs, labels)``,
            inputs being a tensor, a tuple, or a dict by name.
        n: Draw this many samples, in their original order; all if left out.
        seed: Of that draw.
        tokenizer: For texts: a folder with ``tokenizer.json``, or ``bytes``.
        length: For texts: tokens per sample.

    Raises:
        InvalidCalibration: Missing, truncated, pickled or too large files, names or data types
            that are not understood, counts that differ, values that are not finite, fewer than
            ``n`` samples.
    """
    path = Path(spec)
    match sample_source(spec):
        case SampleSource.TEXT:
            return load_text(path, tokenizer=tokenizer, length=length, n=n, seed=seed)
        case SampleSource.TABLE:
            table = read_table(path)
            if isinstance(table, list):
                table = conversation_text(table, path, tokenizer=tokenizer)
            if isinstance(table, str):
                return text_windows(table, path, tokenizer=tokenizer, length=length, n=n, seed=seed)
            whole = _from_members(table, spec)
        case SampleSource.FACTORY:
            whole = _from_factory(spec)
        case SampleSource.NPZ:
            whole = _from_members(read_npz(path), spec)
        case SampleSource.SAFETENSORS:
            whole = _from_members(_read_safetensors(path), spec)
    return whole if n is None or n == len(whole) else whole.subset(n, seed)


def check_calibration(
    model: LoadedModel | nn.Module, calibration: CalibrationSet
) -> tuple[int, ...]:
    """Run two samples and return the shape of the model's output for one.

    Raises:
        InvalidCalibration: The model cannot take the samples, or does not return one row for
            each; the message says what the set holds and, where it is known, what is expected.
    """
    module = model if isinstance(model, nn.Module) else model.module
    batch = tuple(tensor[:2] for tensor in calibration.inputs)
    got = ", ".join(_describe(tensor) for tensor in batch)
    try:
        with torch.no_grad():
            output = module(*batch)
    except Exception as err:  # whatever the model raises is about its input
        raise samples_refused(model, calibration, err) from err
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != len(batch[0]):
        what = (
            f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        )
        msg = (
            f"the model must return one tensor with one row per sample; for {len(batch[0])} "
            f"samples of {got} it returned {what}: wrap it so that it returns the logits alone"
        )
        raise InvalidCalibration(msg, got=got)
    if not bool(torch.isfinite(output).all()):
        msg = f"the model's output must be finite; for samples of {got} it is not: check both"
        raise InvalidCalibration(msg, got=got)
    return tuple(output.shape[1:])


def samples_refused(
    model: LoadedModel | nn.Module, calibration: CalibrationSet, error: Exception
) -> InvalidCalibration:
    """Return the error of a model that failed on samples: what they are, and what it takes."""
    example = None if isinstance(model, nn.Module) else model.example_inputs
    got = ", ".join(_describe(tensor) for tensor in calibration.inputs)
    expected = "" if example is None else f" (expected {', '.join(map(_describe, example))})"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    advice = "save the inputs in the shape and data type that the model takes"
    module = model if isinstance(model, nn.Module) else model.module
    if isinstance(module, ExportedModel) and (n := module.declared[0].n_samples) is not None:
        advice += (
            f", or, since this .pt2 was exported for {n} at a time, export it with a dynamic first "
            "dimension (dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
        )
    msg = (
        f"the model must accept the calibration samples; got {got} per sample{expected} and "
        f"it failed: {reason}: {advice}"
    )
    return InvalidCalibration(msg, got=got, reason=reason)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` after checking its directory and headers.

    Nothing is inflated or allocated before its declared size is known to be sane.

    Raises:
        InvalidCalibration: Not a whole archive of plain arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_directory(archive, path)
            return {
                info.filename.removesuffix(".npy"): _read_array(archive, info)
                for info in archive.infolist()
            }
    except InvalidCalibration:
        raise
    except Exception as err:  # zipfile, zlib and numpy raise many kinds for broken bytes
        msg = (
            f"'{path.name}' must be a whole .npz archive; reading it failed: {err!s:.300}: "
            f"{HOW_TO_SAVE}"
        )
        raise InvalidCalibration(msg, source=str(path)) from err


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        shape, fortran, dtype = _read_header(member, version)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size > info.file_size:
            msg = (
                f"members of an .npz must be plain arrays as large as they say; "
                f"'{info.filename}' claims {dtype} {list(shape)}"
            )
            raise InvalidCalibration(msg, member=info.filename)
        data = member.read(size)
    if len(data) != size:
        msg = f"'{info.filename}' is cut short; copy the archive again"
        raise InvalidCalibration(msg, member=info.filename)
    array: NDArray[Any] = np.frombuffer(data, dtype=dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _check_directory(archive: zipfile.ZipFile, path: Path) -> None:
    total = 0
    for info in archive.infolist():
        # Nothing is written under a member's name, and an ONNX input may be called almost anything.
        if not (info.filename.isprintable() and re.fullmatch(r".{1,1000}\.npy", info.filename)):
            msg = (
                f"members of an .npz must be plain arrays, with names of at most 1,000 characters; "
                f"'{path.name}' holds '{info.filename:.100}'"
            )
            raise InvalidCalibration(msg, member=info.filename)
        total += info.file_size
        if info.file_size > MAX_RATIO * max(info.compress_size, 1024) or total > MAX_BYTES:
            msg = (
                f"'{info.filename}' of '{path.name}' would grow from {info.compress_size:,} to "
                f"{info.file_size:,} bytes; at most {MAX_RATIO} times and {MAX_BYTES:,} bytes in "
                "all are accepted: save it with numpy.savez"
            )
            raise InvalidCalibration(msg, member=info.filename, bytes=info.file_size)


def _read_header(
    member: Any,  # noqa: ANN401  # a zip member
    version: tuple[int, int],
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if version not in ((1, 0), (2, 0), (3, 0)):
        msg = f"an .npy header must be of version 1 to 3; got {version}"
        raise ValueError(msg)
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(member.read(width), "little")
    if length > 10_000:
        msg = f"an .npy header must be short; got {length} bytes"
        raise ValueError(msg)
    try:
        header = ast.literal_eval(member.read(length).decode("latin1"))
        shape, fortran = tuple(header["shape"]), bool(header["fortran_order"])
        described = header["descr"]
    except (SyntaxError, KeyError, TypeError) as err:
        msg = f"an .npy header must name descr, fortran_order and shape; got {err!r}"
        raise ValueError(msg) from err
    if not isinstance(described, str) or not all(isinstance(d, int) and d >= 0 for d in shape):
        msg = f"an array must have a plain data type and shape; got {described!r}, {shape}"
        raise ValueError(msg)
    return shape, fortran, np.dtype(described)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as err:  # torch has no type for some of safetensors'
        msg = (
            f"'{path.name}' must be a whole safetensors file; reading it failed: {err!s:.300}: "
            "it was cut short or altered, copy it again"
        )
        raise InvalidCalibration(msg, source=str(path)) from err


def _from_members(
    members: Mapping[str, NDArray[Any]] | Mapping[str, Tensor], source: str
) -> CalibrationSet:
    usual = [name for name in (*GENERIC_NAMES, *MASK_NAMES) if name in members]
    others = [name for name in members if name not in {*usual, *LABEL_NAMES}]
    names = [*usual, *others]
    if not set(names) - set(MASK_NAMES):
        held = ", ".join(sorted(members)) or "nothing"
        msg = (
            f"a calibration set must hold the model's inputs by their names (or {GENERIC_NAMES[0]} "
            f"where there is one), and may hold y or labels; '{source}' holds {held}: {HOW_TO_SAVE}"
        )
        raise InvalidCalibration(msg, members=sorted(members))
    inputs = [_named_input(name, members[name]) for name in names]
    labels = [name for name in LABEL_NAMES if name in members]
    if len(labels) > 1:
        msg = "a calibration set must hold y or labels, not both"
        raise InvalidCalibration(msg, members=labels)
    target = _labels(_tensor(labels[0], members[labels[0]])) if labels else None
    return CalibrationSet(
        inputs=tuple(inputs),
        names=tuple(names),
        labels=target,
        label_name=labels[0] if labels else "",
    )


def _named_input(name: str, value: object) -> Tensor:
    """Return an input; those of no usual name may be flags."""
    tensor = _tensor(name, value)
    if name in MASK_NAMES:
        return tensor.to(torch.int64)
    return (
        tensor if tensor.dtype == torch.bool and name not in GENERIC_NAMES else _input(name, value)
    )


def _from_factory(spec: str) -> CalibrationSet:
    value = call_factory(spec, InvalidCalibration)
    if isinstance(value, CalibrationSet):
        return value
    inputs, labels = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if isinstance(inputs, dict):
        members = inputs if labels is None else inputs | {"labels": labels}
        try:
            return _from_members(members, spec)
        except TypeError as err:
            msg = f"the factory '{spec}' must return tensors or arrays by name: {err}"
            raise InvalidCalibration(msg, source=spec) from err
    parts = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        tensors = [_input("inputs", parts[0])]
        tensors += [_tensor(f"input {k}", part) for k, part in enumerate(parts[1:], 1)]
        target = None if labels is None else _labels(_tensor("labels", labels))
    except (TypeError, IndexError) as err:
        got = type(value).__name__
        msg = f"the factory '{spec}' must return inputs or (inputs, labels); it returned {got}"
        raise InvalidCalibration(msg, source=spec) from err
    return CalibrationSet(inputs=tuple(tensors), labels=target)


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            msg = f"'{name}' must be numbers; got data type {value.dtype}"
            raise InvalidCalibration(msg, member=name)
        native = value.astype(value.dtype.newbyteorder("="), copy=True)
        if native.dtype.kind == "u" and native.dtype.itemsize > 1:
            native = native.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(native))
    if isinstance(value, Tensor):
        return value.detach().cpu()
    msg = f"'{name}' must be an array or tensor; got {type(value).__name__}"
    raise TypeError(msg)


def _input(name: str, value: object) -> Tensor:
    tensor = _tensor(name, value)
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    if tensor.dtype == torch.uint8:
        shape = list(tensor.shape)
        layout = ", and move the channels: x.transpose(0, 3, 1, 2)" if _is_nhwc(tensor) else ""
        msg = (
            f"inputs must be float32 as the model takes them, or integer tokens; '{name}' is "
            f"uint8 of shape {shape}: normalise images as in training, for example "
            f"((x / 255 - mean) / std).astype('float32'){layout}; save bytes of text, and what a "
            "model takes as uint8, as int64"
        )
        raise InvalidCalibration(msg, member=name, shape=shape)
    if tensor.dtype == torch.bool:
        msg = f"inputs must be float32 or integer tokens; '{name}' is boolean"
        raise InvalidCalibration(msg, member=name)
    return tensor.to(torch.int64)


def _labels(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.to(torch.int64)


def _is_nhwc(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[-1] in (1, 3, 4) and tensor.shape[1] > 4


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape[1:])} {str(tensor.dtype).removeprefix('torch.')}"
