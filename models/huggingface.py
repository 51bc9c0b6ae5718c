"""Hugging Face folders: ``config.json`` and safetensors, no remote code, no network."""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bitquota.canonical import digest_json
from bitquota.errors import InvalidModel, UnsafeModel
from bitquota.models.identity import HALF_TYPES, Computation, computation_of, model_fingerprint
from bitquota.models.loaded import LoadedModel, check_finite, finish
from bitquota.models.outlines import NothingComputed, outline, run_outline
from bitquota.models.padding import without_padding
from bitquota.models.pages import Pages
from bitquota.models.transformer_classes import answer_of, check_parts, model_class

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject

_WITHOUT_EFFECT = frozenset(
    {"_name_or_path", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version"}
)
"""Entries of a config that change no output: every model is run in float32."""

_HALVES = ("float16", "bfloat16")

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")


def load_folder(path: Path) -> LoadedModel:
    """Load a folder with ``config.json`` and one or several ``.safetensors`` files.

    The module keeps the parameter names of the checkpoint. It takes ``input_ids`` (and
    optionally ``attention_mask``), or ``pixel_values``, and returns the logits; a model without a
    head returns the mean of its last hidden state over the positions that the mask keeps.

    Raises:
        UnsafeModel: Pickled weights only, or a config that asks for code of its own.
        InvalidModel: No config, an unknown or quantized model type, truncated or missing weights.
        MissingDependency: transformers is not installed.
    """
    model = load_folder_module(path)
    config: Any = model.config
    return finish(
        model,
        source=str(path),
        architecture=type(model).__name__,
        folder=path,
        example_inputs=_example(model, config),
        weight_format_bits=_stored_bits(_read_config(path)),
    )


def _stored_bits(config: JsonObject) -> int:
    """Return the bits per weight that a config says its checkpoint has."""
    return 16 if (config.get("dtype") or config.get("torch_dtype")) in _HALVES else 32


def load_folder_outline(path: Path) -> LoadedModel:
    """Load what ``load_folder`` loads, but of the weights only names and shapes.

    Its module is an outline (see ``outlines``), its digest empty. A network whose forward pass
    depends on values is loaded with its weights.

    Raises:
        UnsafeModel: As ``load_folder``.
        InvalidModel: As ``load_folder``, but for weights that are not finite.
        MissingDependency: As ``load_folder``.

    Cost: reads headers; memory for no weight.
    """
    config = _read_config(path)
    with NothingComputed():
        module = _load_module(path, config, _stored_shapes(path))
    outline(module)
    example = _example(module, module.config)
    if example is not None:
        try:
            with torch.no_grad(), run_outline(module.eval()):
                module(*example)
        except Exception:  # noqa: BLE001  # torch and transformers have many words for it
            return load_folder(path)
    return LoadedModel(
        module=module.eval(),
        digest="",
        source=str(path),
        architecture=type(module).__name__,
        folder=path,
        example_inputs=example,
        weight_format_bits=_stored_bits(config),
    )


def stored_weights(path: Path) -> int:
    """Return the number of weights in a folder's safetensors; raises what ``load_folder`` does.

    Cost: reads headers.
    """
    _read_config(path)
    return sum(math.prod(header.shape) for header in _stored_shapes(path).values())


def load_folder_paged(path: Path) -> LoadedModel:
    """Load what ``load_folder`` loads, but leave the weights in their files (see ``pages``).

    The module is in the precision of the checkpoint. Its weights are checked and hashed one after
    the other, so its digest is that of ``load_folder``.

    Raises:
        UnsafeModel: As ``load_folder``.
        InvalidModel: As ``load_folder``.
        MissingDependency: As ``load_folder``.

    Cost: reads every weight twice; memory for the largest one in float32.
    """
    config = _read_config(path)
    outlined = load_folder_outline(path)
    _check_weights(path)
    pages = Pages(*sorted(path.glob("*.safetensors")))
    if not any(tensor.dtype in HALF_TYPES for tensor in pages.tensors.values()):
        stored = torch.float32
    else:
        stored = next(t.dtype for t in pages.tensors.values() if t.dtype in HALF_TYPES)
    module = _load_module(path, config, pages.tensors, stored)
    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            part.register_forward_hook(lambda part, _args, _output: pages.release(part))
    module = module.eval()
    check_finite(module, pages.release_tensor)
    computation = computation_of(module)
    return replace(
        outlined,
        module=module,
        outline=outlined.module,
        pages=pages,
        digest=model_fingerprint(module, computation, pages.release_tensor),
    )


def load_folder_module(path: Path) -> nn.Module:
    """Return the module of ``load_folder`` alone; raises what it raises."""
    module: nn.Module = _load_module(path, _read_config(path), None)
    return module


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the context, transformers logs errors alone and draws no bars."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


class _Header:
    """A tensor of a file as transformers' loading takes it, of which only the shape is read."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape

    def __getitem__(self, index: object) -> _Header:
        """Return the whole: loading asks for ``tensor[...]``."""
        return self

    def to(self, *, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor without values, whatever device is asked for."""
        del device
        return torch.empty(self.shape, dtype=dtype, device="meta")


def _stored_shapes(path: Path) -> dict[str, _Header]:
    """Return every tensor of a folder's safetensors; raises what ``_check_weights`` raises."""
    _check_weights(path)
    from safetensors import safe_open

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                found[name] = _Header(opened.get_slice(name).get_shape())
    return found


def _load_module(
    path: Path,
    config: JsonObject,
    tensors: Mapping[str, _Header | Tensor] | None,
    dtype: torch.dtype = torch.float32,
) -> Any:  # noqa: ANN401
    """Return the module of a folder: with its weights, or with those of ``tensors``."""
    _check_weights(path)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    kind = model_class(config, path)
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are told, and refused below
    }
    try:
        with quiet_transformers():
            if tensors is None:
                model, info = kind.from_pretrained(str(path), use_safetensors=True, **options)
            else:
                if any(isinstance(tensor, _Header) for tensor in tensors.values()):
                    # The usual way of computing experts chooses by values which of them are run.
                    options["experts_implementation"] = "batched_mm"
                model, info = kind.from_pretrained(
                    None,
                    config=kind.config_class.from_pretrained(str(path), local_files_only=True),
                    state_dict=dict(tensors),
                    **options,
                )
    except Exception as err:  # a config can fail anywhere in transformers
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        msg = (
            f"a Hugging Face folder must hold the config and all weights of one model; "
            f"'{path.name}' cannot be loaded: {reason}"
        )
        raise InvalidModel(msg, source=str(path)) from err
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, described = mismatched[0]
        msg = (
            f"the weights of '{path.name}' must have the shapes of its config; '{name}' must be "
            f"{list(described)} and is {list(stored)}"
        )
        raise InvalidModel(msg, mismatched=[name for name, *_ in mismatched[:20]])
    if missing := sorted(info["missing_keys"]):
        msg = (
            f"the safetensors of '{path.name}' must hold every weight that its config describes; "
            f"{len(missing)} are missing, such as '{missing[0]}'"
        )
        raise InvalidModel(msg, missing=missing[:20])
    check_parts(model, path.name)
    module = return_tensor(model)
    described = {k: v for k, v in config.items() if k not in _WITHOUT_EFFECT}
    found = Computation(digest=digest_json([type(model).__name__, described]))
    type(module).computation = lambda _: found  # type: ignore[attr-defined]
    headless = module.base_model is module
    type(module).output_name = "embedding" if headless else "logits"  # type: ignore[attr-defined]
    return module


def return_tensor(model: nn.Module) -> nn.Module:
    """Make a transformers model return one tensor, without changing a parameter's name.

    Logits ``[N, T, V]`` are zero at positions that an ``attention_mask`` leaves out.

    The object gets a subclass of its own class; a wrapper module would prefix every name.
    """
    kind: Any = type(model)
    config: Any = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = False

    def forward(  # inputs by the names of transformers, but the main one
        self: Any,  # noqa: ANN401
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        name = self.main_input_name
        keywords = {name: inputs}
        if attention_mask is not None:
            keywords["attention_mask"] = attention_mask
        if token_type_ids is not None:
            keywords["token_type_ids"] = token_type_ids
        output = kind.forward(self, **keywords)
        hidden, answers = answer_of(output)
        if answers:
            # A position that only fills up the batch answers nothing.
            return without_padding(hidden, None if attention_mask is None else attention_mask != 0)
        if hidden.ndim != 3:
            return hidden.flatten(2).mean(-1)  # feature maps [N, C, H, W]
        if attention_mask is None:
            return hidden.mean(1)
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)

    members = {
        "forward": forward,
        "takes_padding": model.main_input_name == "input_ids",
        "keeps_unread_weights": True,
    }
    model.__class__ = type(kind.__name__, (kind,), members)
    return model


def _read_config(path: Path) -> JsonObject:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as err:
        msg = (
            f"a model folder must hold a config.json and .safetensors files; '{path}' has no "
            "config.json"
        )
        raise InvalidModel(msg, source=str(path)) from err
    except (OSError, ValueError, RecursionError) as err:
        msg = f"config.json of '{path.name}' must be readable JSON; got: {err}"
        raise InvalidModel(msg, source=str(path)) from err
    if not isinstance(config, dict):
        msg = f"config.json of '{path.name}' must be an object; got {type(config).__name__}"
        raise InvalidModel(msg, source=str(path))
    if asked := _asks_for_code(config):
        msg = (
            f"config.json of '{path.name}' asks for code of its own ({asked}), which is never "
            "run; use a model type that ships with transformers, or export the model to .pt2"
        )
        raise UnsafeModel(msg, source=str(path))
    if _holds(config, "quantization_config"):
        msg = (
            f"the weights of a model must be in floating point to be measured; '{path.name}' is "
            "already quantized (quantization_config): provide the original checkpoint"
        )
        raise InvalidModel(msg, source=str(path))
    return config


def _holds(config: object, name: str) -> bool:
    """Whether a config, or one inside it, has an entry of this name that is not empty."""
    if not isinstance(config, dict):
        return False
    return bool(config.get(name)) or any(_holds(value, name) for value in config.values())


def _asks_for_code(config: object) -> str | None:
    """Return the entry of a config, or of one inside it, that names code outside transformers."""
    if isinstance(config, list):
        return next(filter(None, map(_asks_for_code, config)), None)
    if not isinstance(config, dict):
        return None
    for name, value in config.items():
        # Kernels of the hub are named 'owner/repository'.
        kernel = name.endswith("_implementation") and "/" in str(value)
        if (name == "auto_map" and value) or kernel:
            return str(name)
        if asked := _asks_for_code(value):
            return asked
    return None


def _check_weights(path: Path) -> None:
    """Open every safetensors file, so that a truncated one is named before anything is built."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [f.name for f in sorted(path.iterdir()) if f.suffix in _PICKLED]
        if pickled:
            msg = (
                f"weights must be safetensors; '{path.name}' holds {pickled[0]}, a pickle that "
                "runs code when it is read: save the model with safe_serialization=True"
            )
            raise UnsafeModel(msg, files=pickled)
        msg = f"a model folder must hold .safetensors files; '{path}' holds none"
        raise InvalidModel(msg, source=str(path))
    for file in files:
        try:
            with safe_open(str(file), framework="numpy") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as err:
            msg = (
                f"'{file.name}' must be a whole safetensors file; reading it failed: {err}: it "
                "was cut short or altered, copy or download it again"
            )
            raise InvalidModel(msg, file=file.name) from err
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
            msg = f"'{index.name}' must map tensors to files; got: {err!r}"
            raise InvalidModel(msg, file=index.name) from err
        names = {file.name for file in files}
        if absent := sorted(str(s) for s in shards if s not in names):
            msg = f"every shard of '{index.name}' must lie beside it; '{absent[0]}' does not"
            raise InvalidModel(msg, missing=absent)


def _example(model: Any, config: Any) -> tuple[Tensor, ...] | None:  # noqa: ANN401
    """Return two samples as the config describes them; none where it makes no sense."""
    try:
        if model.main_input_name == "input_ids":
            length = min(16, getattr(config, "max_position_embeddings", 16) or 16)
            tokens = torch.arange(2 * length).reshape(2, length)
            return (tokens % config.get_text_config().vocab_size,)
        size = getattr(config, "image_size", None) or 224
        if model.main_input_name == "pixel_values" and isinstance(size, int):
            return (torch.zeros(2, getattr(config, "num_channels", 3), size, size),)
    except (RuntimeError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    return None
