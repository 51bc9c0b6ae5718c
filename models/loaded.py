"""A model that is ready to be measured, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.errors import InvalidModel, StalePlan
from bitquota.models.discovery import discover, model_fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.models.calibration import CalibrationSet
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


def finish(
    module: nn.Module,
    *,
    source: str,
    architecture: str,
    example_inputs: tuple[Tensor, ...] | None = None,
    weight_format_bits: int = 32,
) -> LoadedModel:
    """Put ``module`` into eval mode and float32, check its weights, take its fingerprint."""
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


def check_model(plan: Plan, model: LoadedModel) -> None:
    """Raise ``StalePlan`` unless ``plan`` was made for exactly this model."""
    if plan.model_digest != model.digest:
        msg = (
            f"a plan must be used with the model it was made for, {plan.model_digest}; "
            f"'{model.source}' is {model.digest}: make a new plan for it"
        )
        raise StalePlan(msg, plan=plan.model_digest, model=model.digest)


def inventory_of(module: torch.nn.Module, model: LoadedModel, samples: CalibrationSet) -> Inventory:
    """Return the tensors of ``module``, counted in the format that the checkpoint has them in."""
    found = discover(module, samples.first(2).inputs, model_digest=model.digest)
    return found.stored_in(model.weight_format_bits)
