"""Samples to the inputs of a model, by name.

Design: docs/design/models.md
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from bitquota.errors import InvalidCalibration
from bitquota.models.calibration import GENERIC_NAMES
from bitquota.models.onnx.program import source_of
from bitquota.models.pt2.module import ExportedModel

if TYPE_CHECKING:
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredInput:
    """An input that a model declares.

    Attributes:
        name: As the graph or the forward pass calls it.
        integer: Whether it must hold integers (or may not), if that is declared.
        required: Whether the model cannot run without it.
        dtype: The type that its operators compute with, where samples must have it.
    """

    name: str
    integer: bool | None = None
    required: bool = True
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        """Return the name, with the type where it is declared."""
        kind = {None: "", True: " (integers)", False: " (floating point)"}[self.integer]
        return f"{self.name}{kind}" if self.required else f"[{self.name}{kind}]"


def declared_inputs(module: nn.Module) -> tuple[DeclaredInput, ...]:
    """Return what ``module`` takes, in its order; empty if it does not say."""
    source = source_of(module)
    if source is not None:
        return tuple(
            DeclaredInput(name=name, integer=dtype.kind in "iu" if dtype.kind in "iuf" else None)
            for name, dtype in source.inputs
        )
    if isinstance(module, ExportedModel):
        return tuple(
            DeclaredInput(
                name=entry.name,
                integer=None if entry.dtype == torch.bool else not entry.dtype.is_floating_point,
                dtype=entry.dtype,
            )
            for entry in module.declared
        )
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return ()
    return tuple(
        DeclaredInput(name=p.name, required=p.default is inspect.Parameter.empty)
        for p in parameters
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


def bound(model: LoadedModel | nn.Module, samples: CalibrationSet) -> CalibrationSet:
    """Return ``samples`` with their inputs in the order in which ``model`` takes them.

    Samples without names are taken as they are. A single input may have any of the usual names
    (``x``, ``inputs``, ``input_ids``, ``pixel_values``); so may the first of a torch module.

    Raises:
        InvalidCalibration: An input that the model needs is missing, one that it does not declare
            is there, or it has the wrong type; the message says what is declared.
    """
    module = model if isinstance(model, nn.Module) else model.module
    declared = declared_inputs(module)
    if not samples.names or not declared:
        return samples
    samples = _with_label_as_input(samples, declared)
    names = _with_usual_name(samples.names, declared, module)
    _check_names(names, declared)
    tensors = dict(zip(names, samples.inputs, strict=True))
    given = [entry for entry in declared if entry.name in tensors]
    for entry in given:
        tensor = tensors[entry.name]
        if entry.integer and tensor.is_floating_point():
            msg = (
                f"'{entry.name}' must hold integers, as the model declares; it is floating point: "
                f"{_comparison(names, declared)}"
            )
            raise InvalidCalibration(msg, input=entry.name)
        if entry.dtype is not None:
            tensors[entry.name] = tensor.to(entry.dtype)
    return replace(
        samples,
        inputs=tuple(tensors[entry.name] for entry in given),
        names=tuple(entry.name for entry in given),
    )


def _with_label_as_input(
    samples: CalibrationSet, declared: tuple[DeclaredInput, ...]
) -> CalibrationSet:
    """Return ``samples`` with their labels as an input where the model has one of that name.

    A member of the samples' file called y or labels was read as labels.
    """
    missing = {entry.name for entry in declared}.difference(samples.names)
    if samples.labels is None or samples.label_name not in missing:
        return samples
    return replace(
        samples,
        inputs=(*samples.inputs, samples.labels),
        names=(*samples.names, samples.label_name),
        labels=None,
        label_name="",
    )


def _with_usual_name(
    names: tuple[str, ...], declared: tuple[DeclaredInput, ...], module: nn.Module
) -> tuple[str, ...]:
    """Return ``names`` with the first input's own name in place of a usual one (``x``, ``inputs``).

    The usual names say "the input" where there is one, or where a torch module has its own name.
    """
    first = declared[0].name
    takes_any = source_of(module) is None or len(declared) == len(names) == 1
    if first in names or not takes_any:
        return names
    known = {entry.name for entry in declared}
    usual = [name for name in names if name in GENERIC_NAMES and name not in known]
    if len(usual) != 1:
        return names
    return tuple(first if name == usual[0] else name for name in names)


def _check_names(names: tuple[str, ...], declared: tuple[DeclaredInput, ...]) -> None:
    """Refuse samples that lack an input, have one too many, or leave a gap in the order.

    Raises:
        InvalidCalibration: With what the model takes and the samples hold.
    """
    known = {entry.name for entry in declared}
    says = _comparison(names, declared)
    if missing := [e.name for e in declared if e.required and e.name not in names]:
        msg = f"samples must have every input of the model; '{missing[0]}' is missing: {says}"
        raise InvalidCalibration(msg, missing=missing)
    if extra := [name for name in names if name not in known]:
        msg = f"samples must have no input that the model lacks; '{extra[0]}' is none: {says}"
        raise InvalidCalibration(msg, extra=extra)
    given = [entry for entry in declared if entry.name in names]
    if given != list(declared[: len(given)]):
        gap = next(entry.name for entry in declared if entry.name not in names)
        msg = f"inputs are given in order, so '{gap}' must be there too: {says}"
        raise InvalidCalibration(msg, missing=[gap])


def _comparison(names: tuple[str, ...], declared: tuple[DeclaredInput, ...]) -> str:
    return f"the model takes {', '.join(map(str, declared))}; the samples hold {', '.join(names)}"
