"""Find every quantizable weight of a model, and account for every other tensor, each once.

Two ways: by module type, for ordinary modules, here; and by operator, for graphs that
``torch.export`` made (``exported.module()``), in ``operator_search``.

What counts. A parameter is quantizable if a layer multiplies with it: convolutions, transposed
convolutions, linear layers, embeddings, transformers' ``Conv1D``, three-dimensional expert
parameters, and, where there is a sample to run, parameters that matrix products outside of any
layer read (see ``products``). Everything else that a checkpoint stores ships as it is and is
counted with its exact bits: biases, normalisation, positions, persistent buffers.
``num_batches_tracked`` is left out: it is a counter of training that no inference reads.
Non-persistent buffers are rebuilt on loading and take no storage.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.calls import tensor_key
from bitquota.models.found_weight import FoundWeight, n_macs_of, n_samples_of
from bitquota.models.identity import model_fingerprint
from bitquota.models.layer_calls import MatrixOfOperator
from bitquota.models.layout import matrix_shape
from bitquota.models.operator_search import is_exported, search_operators
from bitquota.models.outlines import has_values, run_outline
from bitquota.models.plain_weights import GatedRecurrent
from bitquota.models.products import watch_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from bitquota.models.products import ProductWatcher

_ELEMENTWISE = frozenset({"add", "add_", "sub", "rsub", "mul", "div", "cat"})

_MODULES: dict[type[nn.Module], LayerKind] = {
    nn.Conv1d: LayerKind.CONV1D,
    nn.Conv2d: LayerKind.CONV2D,
    nn.Conv3d: LayerKind.CONV3D,
    nn.ConvTranspose1d: LayerKind.CONV_TRANSPOSE1D,
    nn.ConvTranspose2d: LayerKind.CONV_TRANSPOSE2D,
    nn.ConvTranspose3d: LayerKind.CONV_TRANSPOSE3D,
    nn.Linear: LayerKind.LINEAR,
    nn.Embedding: LayerKind.EMBEDDING,
    nn.EmbeddingBag: LayerKind.EMBEDDING,
}


def discover(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...] | None,
    *,
    model_digest: str | None = None,
) -> Inventory:
    """Return every quantizable layer of ``module`` and every other tensor that it stores.

    Args:
        module: The model; it is run once in eval mode, and left in the mode it was in. A module
            of ``torch.export`` is searched by its operators. An outline (see ``outlines``) is
            searched alike, and no weight is checked.
        example_inputs: Positional arguments, the first dimension being samples; one sample
            is enough. Counts of multiply-accumulates and inputs are per sample; integer inputs
            (token ids) are not counted: they are never quantized. With ``None`` nothing is run
            and nothing counted.
        model_digest: What the inventory names the model by; computed if not given.

    Raises:
        InvalidModel: No quantizable layer, or a weight that is NaN or infinite.
        InvalidInput: A module of ``torch.export`` without inputs: its operators are found by
            running it.

    Cost: one forward pass over ``example_inputs``, and one hash over the weights without a
    digest. Exact; a layer that the pass does not reach (an expert nobody was routed to) has zero
    multiply-accumulates.
    """
    _check_finite(module)
    names = _tensor_names(module)
    if is_exported(module):
        if example_inputs is None:
            msg = "an exported graph is searched by running it, which needs a sample; got none"
            raise InvalidInput(msg)
        found = search_operators(module, example_inputs, names)
    else:
        found = _search_modules(module, names)
    reasons: dict[str, str] = {}
    if example_inputs is not None and not is_exported(module):
        watcher = _count_by_hooks(module, example_inputs, found)
        reasons = _add_bare_parameters(watcher, found, names, n_samples_of(example_inputs))
        if getattr(module, "keeps_unread_weights", False):
            reasons |= _without_unread(watcher, found)
    layers = tuple(_layer(item) for item in found.values())
    return Inventory(
        model_digest=model_fingerprint(module) if model_digest is None else model_digest,
        layers=layers,
        unquantized=tuple(_unquantized(module, names, set(found), reasons)),
    )


def _tensor_names(module: nn.Module) -> dict[tuple[Any, ...], list[str]]:
    """Return every name of every parameter, by identity of its storage, in module order."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(tensor_key(parameter), []).append(name)
    return names


def _check_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not has_values(parameter) or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            msg = (
                f"all weights must be finite; {bad} of {parameter.numel()} values of '{name}' are "
                "NaN or infinite: repair the checkpoint"
            )
            raise InvalidModel(msg, tensor=name, n_bad=bad)


def _search_modules(
    module: nn.Module, names: dict[tuple[Any, ...], list[str]]
) -> dict[tuple[Any, ...], FoundWeight]:
    """Return the quantizable weights by identity, in module order."""
    found: dict[tuple[Any, ...], FoundWeight] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, kind in _quantizable(owner):
            weight = getattr(owner, attribute)
            key = tensor_key(weight)
            full = f"{path}.{attribute}" if path else attribute
            if key in found:
                continue
            own = kind is not LayerKind.EXPERTS and attribute == "weight"
            found[key] = FoundWeight(
                name=(path if own else full) or "model",
                kind=kind,
                weight_name=full,
                weight=weight,
                groups=int(getattr(owner, "groups", 1)),
                transposed=bool(getattr(owner, "is_transposed", False)),
                aliases=[name for name in names.get(key, []) if name != full],
            )
    return found


def _quantizable(owner: nn.Module) -> Iterator[tuple[str, LayerKind]]:
    """Yield attribute and kind of each quantizable weight that ``owner`` holds itself."""
    if isinstance(owner, MatrixOfOperator):
        yield "weight", owner.kind
        return
    for kind_of_module, kind in _MODULES.items():
        if isinstance(owner, kind_of_module):
            if isinstance(getattr(owner, "weight", None), nn.Parameter):
                yield "weight", kind
            return
    if _is_conv1d(owner):
        yield "weight", LayerKind.LINEAR_TRANSPOSED
        return
    if isinstance(owner, nn.MultiheadAttention):
        # The projections are bare parameters; out_proj is a Linear of its own.
        for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if isinstance(getattr(owner, attribute, None), nn.Parameter):
                yield attribute, LayerKind.LINEAR
        return
    if isinstance(owner, nn.Bilinear) or any(
        isinstance(child, nn.Linear) for child in owner.children()
    ):
        return
    for attribute, parameter in owner.named_parameters(recurse=False):
        # One matrix per expert; a first dimension of one is a bias or a position table.
        if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and parameter.shape[0] > 1:
            yield attribute, LayerKind.EXPERTS


def _is_conv1d(owner: nn.Module) -> bool:
    """Recognise transformers' Conv1D without importing transformers."""
    weight = getattr(owner, "weight", None)
    return (
        type(owner).__name__ == "Conv1D"
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 2
        and hasattr(owner, "nf")
    )


def _count_by_hooks(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    found: dict[tuple[Any, ...], FoundWeight],
) -> ProductWatcher:
    """Run once and count, and watch products outside of modules.

    Experts are counted by the share of tokens that reach each.
    """
    n_samples = n_samples_of(example_inputs)
    handles = []
    for owner in module.modules():
        if isinstance(owner, GatedRecurrent):
            items = [found[tensor_key(matrix.weight)] for matrix in owner.matrices()]
            handles.append(owner.register_forward_hook(_steps_hook(items, n_samples)))
        if isinstance(owner, nn.MultiheadAttention):
            # Attention multiplies with the projection's weight and never calls the module.
            item = found[tensor_key(owner.out_proj.weight)]
            hook = _counting_hook(item, LayerKind.LINEAR, n_samples)
            handles.append(owner.register_forward_hook(hook, with_kwargs=True))
        for attribute, kind in _quantizable(owner):
            item = found[tensor_key(getattr(owner, attribute))]
            hook = _counting_hook(item, kind, n_samples)
            handles.append(owner.register_forward_hook(hook, with_kwargs=True))
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        watched = [p for p in module.parameters() if p.ndim > 1]
        with run_outline(module):
            return watch_products(lambda: module(*example_inputs), watched)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes:
            part.training = mode


def _add_bare_parameters(
    watcher: ProductWatcher,
    found: dict[tuple[Any, ...], FoundWeight],
    names: dict[tuple[Any, ...], list[str]],
    n_samples: int,
) -> dict[str, str]:
    """Add the parameters that are multiplied outside of modules; say why the rest are no layers."""
    reasons = {}
    for key, use in watcher.uses.items():
        full, *aliases = names[key]
        axes = use.axes
        if key in found:
            # By its shape alone it was taken for experts, of which a product reads one at a time.
            whole = axes is not None and 0 in use.rows | use.columns
            added = bool(use.others) and use.others <= _ELEMENTWISE and not use.columns
            if found[key].kind is not LayerKind.EXPERTS or not (whole or added):
                continue
            del found[key]
        if use.looked_up:
            kind, axes = LayerKind.EMBEDDING, None
        elif axes is not None:
            kind = LayerKind.CONTRACTION
        else:
            reasons[full] = use.reason
            continue
        owner, _, attribute = full.rpartition(".")
        found[key] = FoundWeight(
            name=(owner if attribute == "weight" else full) or full,
            kind=kind,
            weight_name=full,
            weight=use.parameter,
            aliases=aliases,
            n_macs=use.n_macs // n_samples,
            n_inputs=use.n_inputs // n_samples,
            axes=None if axes is None or list(axes) == sorted(axes) else axes,
        )
        if kind is LayerKind.CONTRACTION:
            found[key].columns = use.n_columns
    order = {key: k for k, key in enumerate(names)}
    in_order = sorted(found.items(), key=lambda item: order[item[0]])
    found.clear()
    found.update(in_order)
    return reasons


def _without_unread(
    watcher: ProductWatcher, found: dict[tuple[Any, ...], FoundWeight]
) -> dict[str, str]:
    """Take out the layers whose weights nothing read, and say why.

    They would cost nothing at the fewest bits, whatever another use of the model needs. A class of
    transformers may have such parts (for other tasks, or a global attention that nobody asked
    for). Experts are left, since samples choose among these.
    """
    unread = [
        key
        for key, use in watcher.uses.items()
        if use.is_unread and key in found and found[key].kind is not LayerKind.EXPERTS
    ]
    return {found.pop(key).weight_name: watcher.uses[key].reason for key in unread}


def _counting_hook(item: FoundWeight, kind: LayerKind, n_samples: int) -> Callable[..., None]:
    def hook(owner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        del owner
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        result = _first_tensor(output)
        if not given or result is None:
            return
        n_in, floating = given[0].numel(), given[0].is_floating_point()
        if floating:  # token ids are no activations
            item.n_inputs += n_in // n_samples
        if kind is LayerKind.EXPERTS:
            # Arguments in transformers 5: tokens, chosen experts [tokens, k], weights.
            tokens = n_in // given[0].shape[-1]
            chosen = given[1].shape[-1] if len(given) > 1 and given[1].ndim >= 2 else 1
            item.n_macs += tokens * chosen * math.prod(item.weight.shape[1:]) // n_samples
            return
        n_out = result.numel()
        if kind is LayerKind.EMBEDDING and floating:  # a head that is tied to it
            item.n_macs += n_in // item.weight.shape[1] * item.weight.numel() // n_samples
            return
        if item.weight_name.endswith(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
            n_out = n_in // item.weight.shape[1] * item.weight.shape[0]
        elif item.weight_name.endswith("in_proj_weight"):
            n_out *= 3
        item.n_macs += n_macs_of(kind, item.weight, item.groups, n_in, n_out) // n_samples

    return hook


def _steps_hook(items: list[FoundWeight], n_samples: int) -> Callable[..., None]:
    """Count a recurrent module: each step of each sample multiplies with each matrix once."""

    def hook(owner: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        del owner, output
        given = args[0].data if isinstance(args[0], PackedSequence) else args[0]
        steps = given.numel() // given.shape[-1]
        for item in items:
            item.n_macs += steps * item.weight.numel() // n_samples
            item.n_inputs += steps * item.weight.shape[1] // n_samples

    return hook


def _first_tensor(value: Any) -> Tensor | None:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    if isinstance(value, dict):
        return _first_tensor(list(value.values()))
    return None


def _layer(item: FoundWeight) -> Layer:
    shape = tuple(item.weight.shape)
    rows, columns = matrix_shape(item.kind, shape, groups=item.groups, transposed=item.transposed)
    if item.columns is not None:
        rows, columns = item.weight.numel() // item.columns, item.columns
    return Layer(
        name=item.name,
        kind=item.kind,
        weight_name=item.weight_name,
        weight_shape=shape,
        rows=rows,
        columns=columns,
        n_weights=item.weight.numel(),
        n_macs=item.n_macs,
        n_inputs=item.n_inputs,
        weight_format_bits=item.weight.element_size() * 8,
        aliases=tuple(item.aliases),
        axes=item.axes,
    )


def _unquantized(
    module: nn.Module,
    names: dict[tuple[Any, ...], list[str]],
    quantized: set[tuple[Any, ...]],
    reasons: dict[str, str],
) -> Iterator[UnquantizedTensor]:
    """Yield every other stored tensor once."""
    seen = set(quantized)
    known: dict[str, str] = getattr(module, "reasons", {}) or reasons
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or name.endswith("num_batches_tracked"):
            continue
        key = tensor_key(tensor)
        if key in seen:
            continue
        seen.add(key)
        yield UnquantizedTensor(
            name=name,
            shape=tuple(tensor.shape),
            format=_format_name(tensor.dtype),
            size_bits=tensor.numel() * tensor.element_size() * 8,
            reason=known.get(name) or _reason(name, tensor, is_parameter=key in names),
        )


def _format_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(
        name, name
    )


def _reason(name: str, tensor: Tensor, *, is_parameter: bool) -> str:
    if not is_parameter:
        return "buffer"
    if name.endswith("bias") or name.rpartition(".")[2].startswith("bias_"):
        return "bias"
    return "scale of a normalisation" if tensor.ndim <= 1 else "not multiplied by a known layer"
