"""Models in: a local factory, a Hugging Face folder, or a vetted ``.pt2``."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.errors import BitquotaError, InvalidInput, InvalidModel, StalePlan, UnsafeModel
from bitquota.formats.pt2_vetting import vet_pt2
from bitquota.formats.sources import ModelSource, model_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitquota.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A model that is ready to be measured.

    Attributes:
        module: In eval mode, float32, on the CPU; ``module(*inputs)`` returns one tensor of
            logits or embeddings.
        digest: Fingerprint of its tensors.
        source: What the user named.
        architecture: Class or model type, for a person.
        example_inputs: A batch of two samples, where the source tells what it looks like.
        weight_format_bits: Bits per weight as the checkpoint stores most of them (32 or 16).
        imatrix: llama.cpp's importance matrix of this model (see ``sensitivity.foreign``); with
            ``dataclasses.replace(model, imatrix=path)`` scales are fitted with it everywhere, and
            plans say so.
    """

    module: nn.Module
    digest: str
    source: str
    architecture: str
    example_inputs: tuple[Tensor, ...] | None = None
    weight_format_bits: int = 32
    imatrix: Path | None = None


def load_model(spec: str, *, allow_pt2: bool = True, allow_factory: bool = True) -> LoadedModel:
    """Load a model without running code that comes with it (a factory is the user's own code).

    Args:
        spec: A factory ``package.module:function`` that returns an ``nn.Module`` (the current
            folder is searched first), a Hugging Face folder, a ``.pt2`` or an ``.onnx`` file.
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
            msg = f"a factory runs code and is for local use only; got '{spec}': hand in a file"
            raise InvalidInput(msg, source=spec)
        case ModelSource.FACTORY:
            return _from_factory(spec)
        case ModelSource.FOLDER:
            from bitquota.formats.huggingface import load_folder

            return load_folder(path)
        case ModelSource.PT2 if not allow_pt2:
            msg = (
                f"a .pt2 is not accepted here, because it cannot be run without a sandbox; got "
                f"'{path.name}': hand in a Hugging Face folder with safetensors, or an .onnx file"
            )
            raise InvalidInput(msg, source=spec)
        case ModelSource.PT2:
            return _from_pt2(path)
        case ModelSource.ONNX:
            from bitquota.formats.onnx_model import load_onnx

            return load_onnx(path)


def finish(
    module: nn.Module,
    *,
    source: str,
    architecture: str,
    example_inputs: tuple[Tensor, ...] | None = None,
    weight_format_bits: int = 32,
) -> LoadedModel:
    """Put ``module`` into eval mode and float32, check its weights, take its fingerprint."""
    from bitquota.sensitivity.discovery import model_fingerprint

    module = module.cpu().float().eval()
    check_finite(module)
    return LoadedModel(
        module=module,
        digest=model_fingerprint(module),
        source=source,
        architecture=architecture,
        example_inputs=example_inputs,
        weight_format_bits=weight_format_bits,
    )


def check_finite(module: nn.Module) -> None:
    """Raise ``InvalidModel`` if a parameter or buffer holds NaN or infinity.

    Buffers may hold minus infinity (attention masks), parameters may not.
    """
    for kind, named in (("weight", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            bad = tensor.isnan() if kind == "buffer" else ~tensor.isfinite()
            n_bad = int(bad.sum())
            if n_bad:
                msg = (
                    f"the weights of a model must be finite; {n_bad:,} of {tensor.numel():,} "
                    f"values of '{name}' are NaN or infinite: repair the checkpoint"
                )
                raise InvalidModel(msg, tensor=name, values=n_bad)


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Let imports find modules of the current folder."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def call_factory(spec: str, what: type[BitquotaError]) -> Any:  # noqa: ANN401  # user's code
    """Import ``package.module:function`` and call the function without arguments.

    Raises:
        BitquotaError: Of type ``what``: no such module or function, or it failed.
    """
    found = find_function(spec, what)
    with current_folder_first():
        try:
            return found()
        except BitquotaError:
            raise
        except Exception as err:  # the user's own code may raise anything
            msg = f"the factory '{spec}' must run without arguments; it failed: {err!r}"
            raise what(msg, source=spec) from err


def find_function(spec: str, what: type[BitquotaError]) -> Any:  # noqa: ANN401  # user's code
    """Import ``package.module:function`` and return the function.

    Raises:
        BitquotaError: Of type ``what``: no such module or function.
    """
    module_name, _, function_name = spec.partition(":")
    with current_folder_first():
        try:
            found: Any = importlib.import_module(module_name)
            for part in function_name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as err:
            msg = (
                f"a factory must be importable as 'package.module:function' from the current "
                f"folder or the installed packages; '{spec}' is not: {err}"
            )
            raise what(msg, source=spec) from err
    return found


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
    from bitquota.formats.pt2_model import build_pt2

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


def check_model(plan: Plan, model: LoadedModel) -> None:
    """Raise ``StalePlan`` unless ``plan`` was made for exactly this model."""
    if plan.model_digest != model.digest:
        msg = (
            f"a plan must be used with the model it was made for, {plan.model_digest}; "
            f"'{model.source}' is {model.digest}: make a new plan for it"
        )
        raise StalePlan(msg, plan=plan.model_digest, model=model.digest)
