"""Run a module on samples: its tensors by name, its output, batch after batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bitquota.errors import InvalidCalibration, InvalidInput, InvalidModel, MeasurementFailed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet


DEFAULT_CHUNK = 64


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called ``name``.

    Raises:
        InvalidModel: The model has no such tensor: the inventory is of another model.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        value = getattr(module.get_submodule(owner), leaf)
    except AttributeError as err:
        msg = f"the model must have the weight '{name}' of its inventory; it does not"
        raise InvalidModel(msg, weight=name) from err
    if not isinstance(value, torch.Tensor):
        msg = f"'{name}' must be a tensor; got {type(value).__name__}"
        raise InvalidModel(msg, weight=name)
    return value


_PIECE = 2**22


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the values of a tensor in its order, a few million at a time; nothing of an empty one.

    What is computed of them then takes no more memory than that, however large the tensor is.
    """
    if tensor.numel():
        yield from torch.split(tensor.detach().reshape(-1), _PIECE)


def n_not_finite(tensor: Tensor, *, infinite: bool = False) -> int:
    """Return how many values are NaN or infinite; only NaN counts if they may be ``infinite``."""
    found = 0
    for piece in in_pieces(tensor):
        found += int((torch.isnan(piece) if infinite else ~torch.isfinite(piece)).sum())
    return found


def checked_output(value: Any, n_samples: int) -> Tensor:  # noqa: ANN401  # whatever a model returns
    """Return the primary output, one row per sample.

    Raises:
        MeasurementFailed: The output does not have one row per sample.
    """
    output = primary_output(value)
    if output.ndim == 0 or len(output) != n_samples:
        msg = (
            f"the model's output must have one row per sample; for {n_samples} samples it has "
            f"shape {list(output.shape)}: wrap the model so that it returns [N, ...]"
        )
        raise MeasurementFailed(msg, shape=list(output.shape))
    return output.float() if output.dtype in {torch.bfloat16, torch.float16} else output


def put_in_eval_mode(module: nn.Module) -> nn.Module:
    """Put ``module`` in eval mode and return it; an exported one is in the mode it was saved in."""
    with contextlib.suppress(NotImplementedError):
        module.eval()
    return module


def run_module(module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    """Call ``module`` on ``inputs`` without gradients and return its primary output.

    Raises:
        InvalidCalibration: The model does not accept the samples.
    """
    try:
        with torch.no_grad():
            value = module(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as err:
        shapes = ", ".join(f"{list(t.shape[1:])} {t.dtype}".replace("torch.", "") for t in inputs)
        msg = (
            f"the model must accept the calibration samples; for samples of shape {shapes} it "
            f"failed: {str(err).splitlines()[0] if str(err) else type(err).__name__}; check shape "
            "and type of the calibration set"
        )
        raise InvalidCalibration(msg, error=str(err)) from err
    return checked_output(value, len(inputs[0]))


def cut(n_samples: int, size: int) -> tuple[range, ...]:
    """Return consecutive chunks of at most ``size`` samples."""
    if size < 1:
        msg = f"a chunk must have at least one sample; got {size}"
        raise InvalidInput(msg)
    return tuple(range(a, min(a + size, n_samples)) for a in range(0, n_samples, size))


def inputs_of(calibration: CalibrationSet, chunk: range) -> tuple[Tensor, ...]:
    """Return the inputs of one chunk on the device that uses them."""
    return calibration.chunk(chunk)[0]


def labels_of(calibration: CalibrationSet, chunk: range) -> Tensor | None:
    """Return the labels of one chunk on the device that uses them, if there are any."""
    return calibration.chunk(chunk)[1]


def primary_output(value: Any) -> Tensor:  # noqa: ANN401  # whatever a model returns
    """Return the tensor of a model's output that losses look at.

    A tensor is itself; otherwise ``logits``, then ``last_hidden_state``, then the first tensor.

    Raises:
        MeasurementFailed: There is no tensor.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        for key in ("logits", "last_hidden_state"):
            if isinstance(value.get(key), torch.Tensor):
                return primary_output(value[key])
        value = list(value.values())
    for attribute in ("logits", "last_hidden_state"):
        if isinstance(getattr(value, attribute, None), torch.Tensor):
            return primary_output(getattr(value, attribute))
    if isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (torch.Tensor, list, tuple, Mapping)):
                return primary_output(item)
    msg = (
        f"a model must return a tensor, or something that holds one; got {type(value).__name__}: "
        "wrap the model so that it returns the tensor the loss is about"
    )
    raise MeasurementFailed(msg)


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes a GPU where there is one.

    Raises:
        InvalidInput: torch does not find it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        msg = f"a device must be 'auto', 'cpu', or one that torch finds here; got '{name}': {err}"
        raise InvalidInput(msg, device=name) from err
    return device
