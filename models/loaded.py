"""A model that is ready to be measured, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidModel, StalePlan
from bitquota.models.discovery import discover
from bitquota.models.identity import (
    NOT_TRACED,
    computation_of,
    model_fingerprint,
    weights_fingerprint,
)
from bitquota.models.plain_weights import with_plain_weights
from bitquota.models.running import n_not_finite
from bitquota.models.sharing import sharing_weights
from bitquota.plan import ONLY_WEIGHTS, Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.pages import Pages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A model that is ready to be measured.

    Attributes:
        module: In eval mode, float32, on the CPU; ``module(*inputs)`` returns one tensor of
            logits or embeddings.
        digest: Fingerprint of its tensors and of what it computes with them; empty if the module
            is an outline (see ``outlines``).
        source: What the user named.
        architecture: Class or model type, for a person.
        folder: The Hugging Face folder that ``source`` is, or was unpacked into.
        example_inputs: A batch of two samples, where the source tells what it looks like.
        weight_format_bits: Bits per weight as the checkpoint stores most of them (32 or 16).
        imatrix: llama.cpp's importance matrix of this model (see ``sensitivity.foreign``); with
            ``dataclasses.replace(model, imatrix=path)`` scales are fitted with it everywhere, and
            plans say so.
        weights: Files of quantized weights that belong to plans for this model, or their content;
            each plan names its own by digest.
        identity_note: What ``digest`` does not cover, for a person; empty where it covers all.
        pages: The files that the weights of ``module`` are read from while it runs, in the
            precision of the checkpoint; ``None`` for weights that are in memory.
        outline: The outline of a module whose weights stay in their files.
    """

    module: nn.Module
    digest: str
    source: str
    architecture: str
    folder: Path | None = None
    example_inputs: tuple[Tensor, ...] | None = None
    weight_format_bits: int = 32
    imatrix: Path | None = None
    weights: tuple[Path | bytes, ...] = ()
    identity_note: str = ""
    pages: Pages | None = None
    outline: nn.Module | None = None


class Recognised(Enum):
    """Whether a digest that a plan or lock file names is that of a model."""

    SAME = auto()
    SAME_WEIGHTS = auto()
    """An earlier release wrote it, of these tensors; it says nothing of the graph."""
    OTHER = auto()


def recognise(digest: str, model: LoadedModel) -> Recognised:
    """Return whether ``digest`` is that of ``model``.

    Cost: none if it is; otherwise one hash over all weights.
    """
    if digest == model.digest:
        return Recognised.SAME
    if digest == weights_fingerprint(model.module):
        return Recognised.SAME_WEIGHTS
    return Recognised.OTHER


def finish(
    module: nn.Module,
    *,
    source: str,
    architecture: str,
    folder: Path | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
    weight_format_bits: int = 32,
) -> LoadedModel:
    """Put ``module`` into eval mode and float32, check its weights, take its fingerprint.

    Weights that it computes become parameters (see ``plain_weights``).
    """
    module = with_plain_weights(module.cpu().float().eval())
    check_finite(module)
    computation = computation_of(module)
    return LoadedModel(
        module=module,
        digest=model_fingerprint(module, computation),
        identity_note="" if computation.traced else NOT_TRACED,
        source=source,
        architecture=architecture,
        folder=folder,
        example_inputs=example_inputs,
        weight_format_bits=weight_format_bits,
    )


def in_memory(model: LoadedModel) -> LoadedModel:
    """Return a model all of whose weights are in memory, in float32."""
    if model.pages is None:
        return model
    module = sharing_weights(model.module)
    for tensor in (*module.parameters(), *module.buffers()):
        # The files may not be written to.
        kept = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(kept, copy=True)
    for part in module.modules():
        # They read files and let them go.
        part._forward_hooks.clear()  # noqa: SLF001
        part._forward_pre_hooks.clear()  # noqa: SLF001
    return replace(model, module=module, pages=None, outline=None)


def check_finite(module: nn.Module, after: Callable[[Tensor], None] | None = None) -> None:
    """Raise ``InvalidModel`` if a parameter or buffer holds NaN or infinity.

    ``after`` is called with each tensor when it has been read.

    Buffers may hold minus infinity (attention masks), parameters may not.
    """
    for kind, named in (("weight", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            n_bad = n_not_finite(tensor, infinite=kind == "buffer")
            if after is not None:
                after(tensor)
            if n_bad:
                msg = (
                    f"the weights of a model must be finite; {n_bad:,} of {tensor.numel():,} "
                    f"values of '{name}' are NaN or infinite: repair the checkpoint"
                )
                raise InvalidModel(msg, tensor=name, values=n_bad)


def check_model(plan: Plan, model: LoadedModel) -> str:
    """Return what to tell about the plan's digest, if anything.

    Raises:
        StalePlan: ``plan`` was made for another model, in its weights or in what it computes.
    """
    match recognise(plan.model_digest, model):
        case Recognised.SAME:
            return ""
        case Recognised.SAME_WEIGHTS:
            return ONLY_WEIGHTS
        case Recognised.OTHER:
            msg = (
                f"a plan must be used with the model it was made for, {plan.model_digest}; "
                f"'{model.source}' has other weights or computes something else "
                f"({model.digest}): make a new plan for it"
            )
            raise StalePlan(msg, plan=plan.model_digest, model=model.digest)


def inventory_of(module: torch.nn.Module, model: LoadedModel, samples: CalibrationSet) -> Inventory:
    """Return the tensors of ``module``, counted in the format that the checkpoint has them in."""
    seen = module if model.outline is None else model.outline
    found = discover(seen, samples.first(2).inputs, model_digest=model.digest)
    return found.stored_in(model.weight_format_bits)
