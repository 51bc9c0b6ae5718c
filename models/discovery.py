"""Find every quantizable weight of a model, and account for every other tensor, each once.

Two ways: by module type, for ordinary modules; and by operator, for graphs that
``torch.export`` made (``exported.module()``), where the modules are gone and only the calls are
left.

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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.calls import tensor_key
from bitquota.models.identity import model_fingerprint
from bitquota.models.layer_calls import MatrixOfOperator
from bitquota.models.layout import matrix_shape
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

_CALLS: dict[str, tuple[LayerKind, int, int]] = {
    # Operator: kind, position of the input, position of the weight.
    "aten.conv1d": (LayerKind.CONV1D, 0, 1),
    "aten.conv2d": (LayerKind.CONV2D, 0, 1),
    "aten.conv3d": (LayerKind.CONV3D, 0, 1),
    "aten.conv_transpose1d": (LayerKind.CONV_TRANSPOSE1D, 0, 1),
    "aten.conv_transpose2d": (LayerKind.CONV_TRANSPOSE2D, 0, 1),
    "aten.conv_transpose3d": (LayerKind.CONV_TRANSPOSE3D, 0, 1),
    "aten.linear": (LayerKind.LINEAR, 0, 1),
    "aten.embedding": (LayerKind.EMBEDDING, 1, 0),
    "aten.addmm": (LayerKind.LINEAR_TRANSPOSED, 1, 2),
    "aten.mm": (LayerKind.LINEAR_TRANSPOSED, 0, 1),
    "aten.matmul": (LayerKind.LINEAR_TRANSPOSED, 0, 1),
}
_CONVOLUTION_KINDS = {
    (False, 3): LayerKind.CONV1D,
    (False, 4): LayerKind.CONV2D,
    (False, 5): LayerKind.CONV3D,
    (True, 3): LayerKind.CONV_TRANSPOSE1D,
    (True, 4): LayerKind.CONV_TRANSPOSE2D,
    (True, 5): LayerKind.CONV_TRANSPOSE3D,
}


@dataclass(slots=True)
class _Found:
    """One quantizable weight while the model is searched."""

    name: str
    kind: LayerKind
    weight_name: str
    weight: Tensor
    groups: int = 1
    transposed: bool = False
    aliases: list[str] = field(default_factory=list)
    n_macs: int = 0
    n_inputs: int = 0
    axes: tuple[int, ...] | None = None
    columns: int | None = None


def discover(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...] | None,
    *,
    model_digest: str | None = None,
) -> Inventory:
    """Return every quantizable layer of ``module`` and every other tensor that it stores.

    Args:
        module: The model; it is run once in eval mode, and left in the mode it was in. A module
            of ``torch.export`` is searched by its operators.
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
    if _is_exported(module):
        if example_inputs is None:
            msg = "an exported graph is searched by running it, which needs a sample; got none"
            raise InvalidInput(msg)
        found = _search_graph(module, example_inputs, names)
    else:
        found = _search_modules(module, names)
    reasons: dict[str, str] = {}
    if example_inputs is not None and not _is_exported(module):
        watcher = _count_by_hooks(module, example_inputs, found)
        reasons = _add_bare_parameters(watcher, found, names, _n_samples(example_inputs))
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
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            msg = (
                f"all weights must be finite; {bad} of {parameter.numel()} values of '{name}' are "
                "NaN or infinite: repair the checkpoint"
            )
            raise InvalidModel(msg, tensor=name, n_bad=bad)


def _is_exported(module: nn.Module) -> bool:
    """Whether this is a graph of operators rather than of module calls."""
    if not isinstance(module, fx.GraphModule):
        return False
    return any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001
        for node in module.graph.nodes
    )


def _search_modules(
    module: nn.Module, names: dict[tuple[Any, ...], list[str]]
) -> dict[tuple[Any, ...], _Found]:
    """Return the quantizable weights by identity, in module order."""
    found: dict[tuple[Any, ...], _Found] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, kind in _quantizable(owner):
            weight = getattr(owner, attribute)
            key = tensor_key(weight)
            full = f"{path}.{attribute}" if path else attribute
            if key in found:
                continue
            own = kind is not LayerKind.EXPERTS and attribute == "weight"
            found[key] = _Found(
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


def _n_macs(kind: LayerKind, weight: Tensor, groups: int, n_in: int, n_out: int) -> int:
    """Return the multiply-accumulates of one call, for all its samples.

    A dense layer multiplies each output with a whole row; a transposed convolution each input
    with the whole slice of its channel (what falls outside a padded border included). Looking
    up an embedding multiplies nothing.
    """
    if kind is LayerKind.EMBEDDING:
        return 0
    if kind.name.startswith("CONV_TRANSPOSE"):
        return n_in * math.prod(weight.shape[1:])
    if kind is LayerKind.EXPERTS:
        return 0
    rows, columns = matrix_shape(kind, tuple(weight.shape), groups=groups)
    swaps = kind in (LayerKind.LINEAR, LayerKind.LINEAR_TRANSPOSED)
    if swaps and n_out * columns != n_in * rows and n_out * rows == n_in * columns:
        return n_out * rows  # the other way round: a tied weight, transposed
    return n_out // rows * rows * columns


def _count_by_hooks(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    found: dict[tuple[Any, ...], _Found],
) -> ProductWatcher:
    """Run once and count, and watch products outside of modules.

    Experts are counted by the share of tokens that reach each.
    """
    n_samples = _n_samples(example_inputs)
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
        return watch_products(lambda: module(*example_inputs), watched)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes:
            part.training = mode


def _add_bare_parameters(
    watcher: ProductWatcher,
    found: dict[tuple[Any, ...], _Found],
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
        found[key] = _Found(
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


def _counting_hook(item: _Found, kind: LayerKind, n_samples: int) -> Callable[..., None]:
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
        item.n_macs += _n_macs(kind, item.weight, item.groups, n_in, n_out) // n_samples

    return hook


def _steps_hook(items: list[_Found], n_samples: int) -> Callable[..., None]:
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


def _n_samples(example_inputs: tuple[Tensor, ...]) -> int:
    return max(1, example_inputs[0].shape[0]) if example_inputs and example_inputs[0].ndim else 1


class _CountingInterpreter(fx.Interpreter):
    """Runs a graph of operators and finds the calls that multiply with a parameter."""

    def __init__(
        self, module: fx.GraphModule, names: dict[tuple[Any, ...], list[str]], n_samples: int
    ) -> None:
        super().__init__(module)
        self.names, self.n_samples = names, n_samples
        self.weight_of: dict[fx.Node, tuple[str, Tensor]] = {}
        self.found: dict[tuple[Any, ...], _Found] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, nn.Parameter):
            self.weight_of[n] = (str(n.target), result)
        elif n.op == "call_function":
            self._look_at(n, result)
        return result

    def _look_at(self, node: fx.Node, result: Any) -> None:  # noqa: ANN401
        call = _layer_call(node)
        if call is None:
            return
        kind, input_node, weight_node = call
        if weight_node not in self.weight_of or not isinstance(result, torch.Tensor):
            return
        own_name, weight = self.weight_of[weight_node]
        if weight.ndim < 2:
            return
        if kind is LayerKind.CONV1D and (convolution := _decomposed_kind(node, weight)):
            kind = convolution
        key = tensor_key(weight)
        # The exporter keeps any one name of a tied weight; take the one that modules would give.
        full = self.names.get(key, [own_name])[0]
        groups = _groups(node, kind)
        if key not in self.found:
            owner, _, attribute = full.rpartition(".")
            self.found[key] = _Found(
                name=(owner if attribute == "weight" else full) or full,
                kind=kind,
                weight_name=full,
                weight=weight,
                groups=groups,
                aliases=[name for name in self.names.get(key, []) if name != full],
            )
        item = self.found[key]
        given = self.env[input_node] if isinstance(input_node, fx.Node) else None
        n_in = given.numel() if isinstance(given, torch.Tensor) else 0
        if isinstance(given, torch.Tensor) and given.is_floating_point():
            item.n_inputs += n_in // self.n_samples
        item.n_macs += _n_macs(kind, weight, groups, n_in, result.numel()) // self.n_samples


def _layer_call(node: fx.Node) -> tuple[LayerKind, Any, fx.Node] | None:
    """Return kind, input node and weight node of a call that multiplies with a weight."""
    name = str(node.target).rsplit(".", 1)[0] if "." in str(node.target) else str(node.target)
    if name == "aten.convolution":
        kind, at, weight_at = LayerKind.CONV1D, 0, 1  # the rank of the weight decides later
    elif name in _CALLS:
        kind, at, weight_at = _CALLS[name]
    else:
        return None
    if len(node.args) <= max(at, weight_at) or not isinstance(node.args[weight_at], fx.Node):
        return None
    weight = node.args[weight_at]
    # Decomposed linear layers multiply with the transpose of the parameter.
    if isinstance(weight, fx.Node) and str(weight.target) in {
        "aten.t.default",
        "aten.permute.default",
        "aten.numpy_T.default",
    }:
        inner = weight.args[0]
        if kind is LayerKind.LINEAR_TRANSPOSED and isinstance(inner, fx.Node):
            kind, weight = LayerKind.LINEAR, inner
    assert isinstance(weight, fx.Node)  # noqa: S101  # checked above
    return kind, node.args[at], weight


def _decomposed_kind(node: fx.Node, weight: Tensor) -> LayerKind | None:
    if str(node.target) != "aten.convolution.default":
        return None
    return _CONVOLUTION_KINDS.get((bool(node.args[6]), weight.ndim))


def _groups(node: fx.Node, kind: LayerKind) -> int:
    name = str(node.target)
    if name == "aten.convolution.default":
        return int(node.args[8])  # type: ignore[arg-type]
    if "CONV" not in kind.name:
        return 1
    # The seventh argument of all six convolutions.
    value = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    return int(value)  # type: ignore[arg-type]


def _search_graph(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    names: dict[tuple[Any, ...], list[str]],
) -> dict[tuple[Any, ...], _Found]:
    assert isinstance(module, fx.GraphModule)  # noqa: S101  # asked by the caller
    interpreter = _CountingInterpreter(module, names, _n_samples(example_inputs))
    flat = torch.utils._pytree.tree_leaves(example_inputs)  # noqa: SLF001
    with torch.no_grad():
        interpreter.run(*flat, enable_io_processing=False)
    return interpreter.found


def _layer(item: _Found) -> Layer:
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
