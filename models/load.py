"""Models in: a local factory, a Hugging Face folder, or a vetted ``.pt2``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bitquota.errors import InvalidInput, InvalidModel, UnsafeModel
from bitquota.models.factory import call_factory
from bitquota.models.gguf_folder import unpacked_gguf
from bitquota.models.huggingface import (
    load_folder,
    load_folder_outline,
    load_folder_paged,
    stored_weights,
)
from bitquota.models.loaded import LoadedModel, finish
from bitquota.models.onnx.module import load_onnx
from bitquota.models.pt2.build import build_pt2
from bitquota.models.pt2.vetting import vet_pt2
from bitquota.models.sources import ModelSource, model_source


def load_model(spec: str, *, allow_pt2: bool = True, allow_factory: bool = True) -> LoadedModel:
    """Load a model without running code that comes with it (a factory is the user's own code).

    Args:
        spec: A factory ``package.module:function`` that returns an ``nn.Module`` (the current
            folder is searched first), a Hugging Face folder, a ``.gguf``, ``.pt2`` or ``.onnx``
            file.
        allow_pt2: Whether ``.pt2`` files are accepted.
        allow_factory: Whether factories are; a service must not.

    Raises:
        UnsafeModel: A pickle, TorchScript, remote code, or a ``.pt2`` outside the allowlists;
            the message names the safe alternative.
        InvalidModel: Missing, truncated or malformed files, weights that are not finite, an
            unknown architecture, or something that is no model.
        InvalidInput: A kind of source that is not accepted here.
        MissingDependency: A Hugging Face folder or ONNX file and their packages are not installed.

    Cost: reads every weight once or twice; no forward pass.
    """
    path = Path(spec)
    match model_source(spec):
        case ModelSource.FACTORY if not allow_factory:
            msg = f"a factory runs code and is for local use only; got '{spec}': provide a file"
            raise InvalidInput(msg, source=spec)
        case ModelSource.FACTORY:
            return _from_factory(spec)
        case ModelSource.FOLDER:
            return load_folder(path)
        case ModelSource.GGUF:
            return replace(load_folder(unpacked_gguf(path)), source=spec)
        case ModelSource.PT2 if not allow_pt2:
            msg = (
                f"a .pt2 is not accepted here, because it cannot be run without a sandbox; got "
                f"'{path.name}': provide a Hugging Face folder with safetensors, or an .onnx file"
            )
            raise InvalidInput(msg, source=spec)
        case ModelSource.PT2:
            return _from_pt2(path)
        case ModelSource.ONNX:
            return load_onnx(path)


def load_within(spec: str, memory_bytes: int, **permitted: bool) -> LoadedModel:
    """Load a model, and leave the weights of a folder in their files if they would not fit.

    Args:
        spec: As for ``load_model``.
        memory_bytes: What weights in float32 may take in memory.
        **permitted: As for ``load_model``.

    Raises:
        UnsafeModel: As ``load_model``.
        InvalidModel: As ``load_model``.
        InvalidInput: As ``load_model``.
        MissingDependency: As ``load_model``.
    """
    folder, source = Path(spec), model_source(spec)
    if source is ModelSource.GGUF:
        folder = unpacked_gguf(folder)
    foldered = source in {ModelSource.FOLDER, ModelSource.GGUF}
    if foldered and 4 * stored_weights(folder) > memory_bytes:
        return replace(load_folder_paged(folder), source=spec)
    return load_model(spec, **permitted)


def load_outline(spec: str) -> LoadedModel:
    """Load what can be told of a model before anything is measured.

    Of a Hugging Face folder only config and headers are read: its module has shapes and no values
    (see ``outlines``), and its digest is empty; a ``.gguf`` is unpacked into one. Anything else is
    loaded as by ``load_model``.

    Raises:
        UnsafeModel: As ``load_model``.
        InvalidModel: As ``load_model``, but for weights of a folder that are not finite.
        MissingDependency: As ``load_model``.
    """
    match model_source(spec):
        case ModelSource.FOLDER:
            return load_folder_outline(Path(spec))
        case ModelSource.GGUF:
            return replace(load_folder_outline(unpacked_gguf(Path(spec))), source=spec)
    return load_model(spec)


def _from_factory(spec: str) -> LoadedModel:
    module = call_factory(spec, InvalidModel)
    if isinstance(module, torch.jit.ScriptModule):
        msg = (
            f"TorchScript cannot be measured; the factory '{spec}' must return the ordinary "
            "nn.Module that was scripted"
        )
        raise UnsafeModel(msg, source=spec)
    if not isinstance(module, nn.Module):
        got = type(module).__name__
        msg = f"the factory '{spec}' must return an nn.Module; it returned {got}"
        raise InvalidModel(msg, source=spec, got=got)
    bits = _most_common_bits(module)
    return finish(module, source=spec, architecture=type(module).__name__, weight_format_bits=bits)


def _from_pt2(path: Path) -> LoadedModel:
    built = build_pt2(vet_pt2(path))
    halves = [name for name in built.parameter_formats.values() if name in ("float16", "bfloat16")]
    bits = 16 if 2 * len(halves) > len(built.parameter_formats) else 32
    return finish(
        built.module, source=str(path), architecture="exported graph", weight_format_bits=bits
    )


def _most_common_bits(module: nn.Module) -> int:
    bits = {16: 0, 32: 0}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            bits[16 if parameter.element_size() <= 2 else 32] += parameter.numel()
    return 16 if bits[16] > bits[32] else 32
