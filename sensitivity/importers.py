"""Measurements of other tools, so that they can be solved here without measuring again.

==========================  =====================================================================
exllamav2                   ``measurement.json`` of ``convert.py -om``: accuracy and bits of every
                            option of every attention and MLP block
exllamav3                   the file of ``measure.py``: change of KL divergence and of bits of
                            every group against a quantized base
ModelOpt                    ``candidate_stats`` of ``auto_quantize``, written as JSON (its own
                            checkpoint is a pickle, which is never read)
llama.cpp                   ``imatrix`` in the binary layout (``--output-format dat``): mean squared
                            input of every weight column, an importance for scale fitting
==========================  =====================================================================

An imported measurement has its own options, sizes and unit, which are not candidates of ours: it
is solved and read back in the terms of the tool it came from.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.canonical import digest_array, digest_json, why_unreadable
from bitquota.errors import InvalidInput, StalePlan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Inventory
    from bitquota.canonical import JsonObject
    from bitquota.plan import Plan

_LARGEST_FILE = 2**30
_LONGEST_NAME = 2**12
_LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to store one group, in another tool's terms.

    Attributes:
        group: The group that it is an option of.
        label: Short name.
        score: Predicted loss in ``ImportedMeasurement.unit``, additive over groups.
        cost_bits: Cost in ``ImportedMeasurement.cost_unit``.
        detail: What the tool wrote about it.
    """

    group: str
    label: str
    score: float
    cost_bits: int
    detail: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedMeasurement:
    """Scores and costs of another tool: a separable problem.

    Attributes:
        source: Which tool.
        unit: Unit of the scores.
        cost_unit: Unit of the costs: ``bits``, or what the tool counts instead.
        options: Groups contiguous, in the tool's order.
    """

    source: str
    unit: str
    cost_unit: str
    options: tuple[Option, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Group names in order."""
        return tuple(dict.fromkeys(option.group for option in self.options))

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``i64[G+1]``: group ``g`` owns the options ``offsets[g]:offsets[g+1]``."""
        counts = dict.fromkeys(self.groups, 0)
        for option in self.options:
            counts[option.group] += 1
        return np.cumsum([0, *counts.values()], dtype=np.int64)

    @property
    def diagonal(self) -> NDArray[np.float64]:
        """``f64[n]``: the scores."""
        return np.array([option.score for option in self.options])

    @property
    def costs(self) -> NDArray[np.int64]:
        """``i64[1, n]``: the costs, shifted per group so that none is negative."""
        raw = np.array([option.cost_bits for option in self.options], dtype=np.int64)
        offsets = self.offsets
        for a, b in itertools.pairwise(offsets):
            raw[a:b] -= min(0, int(raw[a:b].min()))
        return raw[None]

    @property
    def shift_bits(self) -> int:
        """What ``costs`` adds to the tool's own total: add it to a limit in the tool's terms."""
        raw = np.array([option.cost_bits for option in self.options], dtype=np.int64)
        return int(-np.minimum.reduceat(raw, self.offsets[:-1]).clip(max=0).sum())

    def chosen(self, choice: NDArray[np.int64] | tuple[int, ...]) -> tuple[Option, ...]:
        """Return the option of each group that a choice (index within the group) names."""
        rows = self.offsets[:-1] + np.asarray(choice, dtype=np.int64)
        return tuple(self.options[int(row)] for row in rows)


def read_measurement(path: Path) -> ImportedMeasurement:
    """Read a measurement of exllamav2, exllamav3 or ModelOpt; the layout tells which.

    Scores: exllamav2 ``-log(accuracy)`` (so that accuracies multiply), exllamav3 the change of KL
    divergence, ModelOpt its own score.

    Raises:
        InvalidInput: Not JSON, none of these layouts, or a number that cannot be.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            msg = f"a measurement must be smaller than 1 GiB; '{path}' is larger"
            raise InvalidInput(msg, path=str(path))
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        if isinstance(err, InvalidInput):
            raise
        msg = f"a measurement must be readable JSON; '{path}' {why_unreadable(err)}"
        raise InvalidInput(msg, path=str(path)) from err
    try:
        if isinstance(data, dict) and isinstance(data.get("measurement"), dict):
            return _exllamav2(data["measurement"])
        if isinstance(data, dict) and isinstance(data.get("groups"), list):
            return _exllamav3(data["groups"])
        if isinstance(data, dict):
            stats = data.get("candidate_stats", data)
            if stats and all(isinstance(v, dict) and "scores" in v for v in stats.values()):
                return _modelopt(stats)
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        if isinstance(err, InvalidInput):
            raise
        msg = f"'{path}' looks like a measurement of another tool but cannot be read: {err!r}"
        raise InvalidInput(msg, path=str(path)) from err
    msg = (
        f"'{path}' must be exllamav2's measurement.json ('measurement'), exllamav3's measurement "
        "('groups'), or ModelOpt's candidate_stats as JSON; it is none of them"
    )
    raise InvalidInput(msg, path=str(path))


def _number(value: Any, what: str) -> float:  # noqa: ANN401  # from JSON
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        msg = f"{what} must be a finite number; got {value!r}"
        raise InvalidInput(msg)
    return number


def _measurement(
    source: str, unit: str, cost_unit: str, options: list[Option]
) -> ImportedMeasurement:
    if not options:
        msg = f"a measurement of {source} must hold at least one option; got none"
        raise InvalidInput(msg)
    return ImportedMeasurement(
        source=source, unit=unit, cost_unit=cost_unit, options=tuple(options)
    )


def _exllamav2(data: JsonObject) -> ImportedMeasurement:
    options = []
    for group, entries in data.items():
        for k, entry in enumerate(entries):
            accuracy = _number(entry["accuracy"], f"accuracy of '{group}'")
            if not 0 < accuracy <= 1:
                msg = f"an accuracy must be above 0 and at most 1; '{group}' has {accuracy}"
                raise InvalidInput(msg, group=group)
            detail = {key: value for key, value in entry.items() if isinstance(value, dict)}
            bits = "/".join("-".join(map(str, d.get("bits", []))) for d in detail.values())
            options.append(
                Option(
                    group=group,
                    label=f"{k}: {bits}",
                    score=-math.log(accuracy),
                    cost_bits=round(_number(entry["total_bits"], f"total_bits of '{group}'")),
                    detail=detail,
                )
            )
    return _measurement("exllamav2", "-log accuracy", "bits", options)


def _exllamav3(groups: list[JsonObject]) -> ImportedMeasurement:
    options = []
    for group in groups:
        name = "+".join(group["layers"])
        options.append(Option(group=name, label="base", score=0.0, cost_bits=0, detail={}))
        for k, entry in enumerate(group["candidates"]):
            options.append(  # a comprehension of this length hides the numbers
                Option(
                    group=name,
                    label=f"alternative {k}",
                    score=_number(entry["dkld"], f"dkld of '{name}'"),
                    cost_bits=round(_number(entry["dbits"], f"dbits of '{name}'")),
                    detail=dict(entry),
                )
            )
    return _measurement("exllamav3", "nats/token", "bits beyond the base", options)


def _modelopt(stats: JsonObject) -> ImportedMeasurement:
    options = []
    for layer, entry in stats.items():
        formats = entry["formats"]
        for label, score, cost in zip(formats, entry["scores"], entry["costs"], strict=True):
            options.append(
                Option(
                    group=layer,
                    label=str(label),
                    score=_number(score, f"score of '{layer}'"),
                    cost_bits=round(_number(cost, f"cost of '{layer}'")),
                    detail={"module_names": list(entry.get("module_names", []))},
                )
            )
    return _measurement("ModelOpt", "score", "ModelOpt's cost", options)


def read_imatrix(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the mean squared input of every column, by tensor name, from an imatrix ``.dat``.

    The layout: ``i32`` count, then per entry ``i32`` length, name, ``i32`` calls, ``i32`` count,
    ``f32`` sums; the sums are divided by the calls.

    Raises:
        InvalidInput: Not that layout, cut off, or with values that cannot be. (Newer versions
            write GGUF by default; ``llama-imatrix --output-format dat`` converts.)
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        msg = f"an imatrix must be readable; '{path}': {err}"
        raise InvalidInput(msg, path=str(path)) from err
    if data[:4] == b"GGUF":
        msg = (
            f"'{path}' is an imatrix in GGUF; convert it with "
            "'llama-imatrix --in-file FILE --output-format dat -o FILE.dat'"
        )
        raise InvalidInput(msg, path=str(path))
    try:
        return _imatrix_entries(data)
    except (struct.error, ValueError) as err:
        msg = f"'{path}' must be an imatrix in its binary layout, whole; got: {err}"
        raise InvalidInput(msg, path=str(path)) from err


def _imatrix_entries(data: bytes) -> dict[str, NDArray[np.float64]]:
    """Raises ``ValueError`` or ``struct.error`` where the layout does not hold."""
    found: dict[str, NDArray[np.float64]] = {}
    (n_entries,) = struct.unpack_from("<i", data, 0)
    if n_entries < 1:
        msg = "no entries"
        raise ValueError(msg)
    at = 4
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length < _LONGEST_NAME:
            msg = f"a name of {length} bytes"
            raise ValueError(msg)
        name = data[at + 4 : at + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if count < 1 or at + 4 * count > len(data):
            msg = f"entry '{name}' does not fit the file"
            raise ValueError(msg)
        sums = np.frombuffer(data, dtype="<f4", count=count, offset=at).astype(np.float64)
        at += 4 * count
        values = sums / max(calls, 1)
        if not np.isfinite(values).all() or (values < 0).any():
            msg = f"entry '{name}' has negative or infinite values"
            raise ValueError(msg)
        found[name] = values
    return found


_FLOOR = 1e-6
"""Share of a layer's mean importance that every column has at least."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """Weights of squared errors in the fit of scales.

    Attributes:
        columns: f64[columns] by layer name.
        digest: Of all of it; part of ledger keys and of a plan's provenance.
        missing: Layers that have none: their columns count alike.
    """

    columns: dict[str, torch.Tensor]
    digest: str
    missing: tuple[str, ...] = ()


def importance_of(path: Path, inventory: Inventory) -> Importance:
    """Read an imatrix as the importance of the columns of ``inventory``'s layers.

    With ``h`` the mean squared input of each column, scales minimise ``Σ h (w - q(w))²``: to first
    order the squared error of the layer's output for inputs that are not correlated, and what
    llama.cpp does with the same file. Columns that no input ever reached keep a millionth of the
    layer's mean, so that a scale never rests on nothing.

    Args:
        path: ``imatrix`` in its binary layout; names as llama.cpp gives them, or the layers' own.
        inventory: The layers.

    Raises:
        InvalidInput: Unreadable, no entry belongs to a layer, or one has another width.
    """
    layers = {layer.name: layer for layer in inventory.layers}
    found: dict[str, torch.Tensor] = {}
    for tensor, values in sorted(read_imatrix(path).items()):
        name = tensor.removesuffix(".weight")
        name = name if name in layers else (layer_name(tensor) or "")
        if name not in layers:
            continue
        if len(values) != layers[name].columns:
            msg = (
                f"an imatrix must be of this model; '{tensor}' has {len(values)} columns, layer "
                f"'{name}' has {layers[name].columns}"
            )
            raise InvalidInput(msg, layer=name)
        floor = _FLOOR * float(values.mean()) or 1.0
        found[name] = torch.from_numpy(np.maximum(values, floor))
    if not found:
        msg = (
            "an imatrix must name layers of this model, as llama.cpp does (blk.0.attn_q.weight) or "
            f"as the model does ({inventory.layers[0].name}.weight); '{path.name}' names none"
        )
        raise InvalidInput(msg, path=str(path))
    digests = {name: digest_array(columns.numpy()) for name, columns in found.items()}
    return Importance(
        columns=found,
        digest=digest_json(digests),
        missing=tuple(name for name in layers if name not in found),
    )


def check_importance(
    plan: Plan, imatrix: Path | None, inventory: Inventory
) -> dict[str, torch.Tensor] | None:
    """Return the importance that a plan's scales are fitted with, ``None`` for none.

    Raises:
        StalePlan: The plan was made with another importance matrix, or with one and got none.
    """
    made_with = plan.provenance.get("importance")
    given = None if imatrix is None or made_with is None else importance_of(imatrix, inventory)
    if made_with is not None and (given is None or given.digest != made_with):
        got = "none" if imatrix is None else f"'{imatrix}'"
        msg = (
            "a plan must be used with the importance matrix it was made with, "
            f"{made_with}; got {got}: give that file with --imatrix"
        )
        raise StalePlan(msg, plan=made_with)
    return None if given is None else given.columns


def layer_name(tensor: str) -> str | None:
    """Return the Hugging Face layer that a llama.cpp tensor name stands for, if it is known.

    ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj``; ``output.weight`` is
    ``lm_head``. Llama-like models only.
    """
    if tensor == "output.weight":
        return "lm_head"
    parts = tensor.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[3] == "weight":
        part = _LLAMA_NAMES.get(parts[2])
        return None if part is None else f"model.layers.{parts[1]}.{part}"
    return None
