"""GGUF files as models: unpacked once into a Hugging Face folder, which everything else reads.

Weights are dequantized to the values that the file stands for: in float32, unless all matrices are
stored in one half precision. Transformers can read a GGUF too, but passes over entries and tensors
that it does not know (scaled positions, biases), and another model would be measured without a
word. So config and weights are made here, and what is not understood is refused.

References:
    GGUF: ggml-org/ggml, its page on GGUF; ggml-org/llama.cpp, conversion/llama.py

Design: docs/design/models.md
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.canonical import digest_json
from bitquota.errors import InvalidModel, MissingDependency
from bitquota.models.gguf_names import ROPE_FACTORS, gguf_names, gguf_package, row_order
from bitquota.models.gguf_vetting import vet_gguf
from bitquota.models.huggingface import quiet_transformers
from bitquota.models.sources import cache_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.models.gguf_vetting import GgufHeader, StoredTensor

_FORM = 1
"""Of the unpacked folders: another number makes them anew."""

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model types of transformers by llama.cpp's names. Mistral models are ``llama`` there."""

_NEEDED = (
    "context_length", "block_count", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_UNDERSTOOD = frozenset(_NEEDED) | {
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip

_SPLITS = frozenset(
    {"gpt-2", "smollm", "llama3", "llama-v3", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken"}
)
"""Rules by which byte-level tokenizers split a text that are known to be read right."""

_SHARD_BYTES = 10**9
_CHUNK_VALUES = 1 << 24
_PLAIN = {"F32": np.float32, "F16": np.float16}
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def unpacked_gguf(path: Path) -> Path:
    """Return a Hugging Face folder with the model and the tokenizer of a GGUF file.

    It is made once, in the user's cache folder, and found again as long as the file is the same by
    name, size and time of change.

    Raises:
        InvalidModel: What ``vet_gguf`` raises; an architecture or entries that are not understood,
            or tensors that the model does not have.
        MissingDependency: gguf or transformers is not installed.

    Cost: when it is made, four bytes for each weight on disk (two if the file has half precision),
    and 1 GB in memory, or the largest tensor.
    """
    header = vet_gguf(path)
    stat = path.stat()
    key = digest_json([_FORM, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    kept = cache_folder() / "gguf"
    made = kept / f"{path.stem}-{key.removeprefix('sha256:')[:16]}"
    if (made / "config.json").is_file():
        return made
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".new-") as scratch:
        new = Path(scratch) / "model"
        _unpack(path, header, Path(scratch), new)
        with suppress(OSError):  # another process was first
            new.rename(made)
    return made


def _unpack(path: Path, header: GgufHeader, scratch: Path, folder: Path) -> None:
    """Write ``folder``; ``scratch`` is an empty one beside it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
        from safetensors.torch import save_file
    except ImportError as err:
        msg = "a GGUF file needs transformers; install it with: pip install bitquota[hf]"
        raise MissingDependency(msg) from err
    config = _config(path, header)
    names = _names(path, header, config)
    folder.mkdir()
    matrices = {t.stored for t in header.tensors.values() if len(t.shape) > 1}
    half = _HALVES.get(next(iter(matrices))) if len(matrices) == 1 else None

    # Shard after shard: what is in memory is one of them.
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stored in names.items():
        size = 4 * math.prod(header.tensors[stored].shape)
        if filled and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    where: dict[str, str] = {}
    for k, held in enumerate(shards, 1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        values = {n: _values(path, header.tensors[names[n]], half) for n in held}
        for name in held:
            order = row_order(name, config.to_dict())
            if order is not None:
                values[name] = values[name][np.argsort(order)]
        save_file(values, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )

    # Alone in a folder: transformers would look at what lies beside the file, too.
    (scratch / "model.gguf").symlink_to(path.resolve())
    with quiet_transformers():
        _save_tokenizer(path, header, scratch, folder)
        mapping = transformers.AutoModelForCausalLM._model_mapping  # noqa: SLF001  # no public name
        config.architectures = [mapping[type(config)].__name__]
        config.dtype = half or torch.float32
        config.save_pretrained(folder)


def _names(path: Path, header: GgufHeader, config: Any) -> dict[str, str]:  # noqa: ANN401
    """Return the file's name of every tensor of the model, by transformers' name.

    Raises:
        InvalidModel: One is missing or has another shape, or the file has others.
    """
    import transformers

    try:
        with quiet_transformers(), torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as err:  # sizes that fit each other badly may fail anywhere
        raise _misread(path, f"the sizes in its header make no model ({err!s:.200})") from err
    tied = set(model.all_tied_weights_keys)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}
    names = gguf_names(shapes, config.to_dict())
    for name, shape in shapes.items():
        held = header.tensors.get(names[name])
        if held is None or held.shape != shape:
            got = "is missing" if held is None else f"is {list(held.shape)}"
            raise _misread(path, f"'{names[name]}' must be {list(shape)} and {got}")
    if others := sorted(set(header.tensors) - set(names.values()) - {ROPE_FACTORS}):
        raise _misread(path, f"'{others[0]}' belongs to no such {header.architecture} model")
    return names


def _values(path: Path, held: StoredTensor, half: torch.dtype | None) -> Tensor:
    """Return one tensor as transformers has it: a matrix in ``half`` if that is not ``None``.

    A few rows at a time, so that nothing but the result is large.
    """
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType[held.stored]
    rows = math.prod(held.shape[:-1])
    raw = np.memmap(path, np.uint8, "r", offset=held.offset, shape=(rows, held.n_bytes // rows))
    dtype = half if half is not None and len(held.shape) > 1 else torch.float32
    made = torch.empty((rows, held.shape[-1]), dtype=dtype)
    step = max(1, _CHUNK_VALUES // held.shape[-1])
    for start in range(0, rows, step):
        part = np.ascontiguousarray(raw[start : start + step])
        values = (
            part.view(_PLAIN[held.stored])
            if held.stored in _PLAIN
            else (gguf.quants.dequantize(part, kind))
        )
        made[start : start + step] = torch.from_numpy(np.array(values, np.float32))
    return made.reshape(held.shape)


def _config(path: Path, header: GgufHeader) -> Any:  # noqa: ANN401  # a config of transformers
    """Return transformers' config of the model that a file describes."""
    import transformers

    architecture = header.architecture
    if architecture not in _MODEL_TYPES:
        msg = (
            f"a .gguf must be of an architecture that is read here: {', '.join(_MODEL_TYPES)} "
            f"(Mistral and its like are llama); '{path.name}' is {architecture!r}: provide the "
            "Hugging Face folder that it was made of"
        )
        raise InvalidModel(msg, architecture=architecture)
    prefix = f"{architecture}."
    said = {k.removeprefix(prefix): v for k, v in header.entries.items() if k.startswith(prefix)}
    if missing := [key for key in _NEEDED if key not in said]:
        raise _misread(path, f"its header lacks '{prefix}{missing[0]}'")
    if unknown := sorted(set(said) - _UNDERSTOOD):
        raise _misread(path, f"'{prefix}{unknown[0]}' ({said[unknown[0]]}) is not understood")
    if said["block_count"] > len(header.tensors) or "token_embd.weight" not in header.tensors:
        raise _misread(path, f"it has {len(header.tensors)} tensors, which are not all")
    heads = said["attention.head_count"]
    if not isinstance(heads, int) or not 1 <= heads <= said["embedding_length"]:
        raise _misread(path, f"'{prefix}attention.head_count' must be a number of heads")
    head_dim = said.get("attention.key_length") or said["embedding_length"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.get(key, head_dim) != head_dim:
            raise _misread(path, f"'{prefix}{key}' must be {head_dim}; it is {said[key]}")
    settings: dict[str, Any] = {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": said["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _positions(path, header, said, head_dim),
    }
    if architecture == "llama":
        settings["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        settings[f"{name}_token_id"] = header.entries.get(f"tokenizer.ggml.{key}_token_id")
    return transformers.AutoConfig.for_model(_MODEL_TYPES[architecture], **settings)


def _positions(
    path: Path, header: GgufHeader, said: dict[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return transformers' ``rope_parameters``: the inverse of ``exports.gguf_metadata``."""
    theta = float(said.get("rope.freq_base", 10000.0))
    kind, factor = said.get("rope.scaling.type", "none"), said.get("rope.scaling.factor", 1.0)
    if ROPE_FACTORS in header.tensors:
        factors = _rope_factors(path, header)
        if np.allclose(factors, 1.0):
            return {"rope_type": "default", "rope_theta": theta}
        return _llama3(path, factors, theta, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    original = said.get("rope.scaling.original_context_length")
    if kind != "yarn" or original is None:
        raise _misread(path, f"rotary positions scaled by '{kind}' are not understood")
    betas = {
        f"beta_{end}": said[f"rope.scaling.yarn_beta_{end}"]
        for end in ("fast", "slow")
        if f"rope.scaling.yarn_beta_{end}" in said
    }
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        **betas,
    }


def _rope_factors(path: Path, header: GgufHeader) -> NDArray[np.float64]:
    held = header.tensors[ROPE_FACTORS]
    if held.stored != "F32" or len(held.shape) != 1:
        raise _misread(path, f"'{ROPE_FACTORS}' must be a row of float32")
    table = np.fromfile(path, np.float32, count=held.shape[0], offset=held.offset)
    return table.astype(np.float64)


def _llama3(
    path: Path, factors: NDArray[np.float64], theta: float, head_dim: int
) -> dict[str, Any]:
    """Return the parameters of Llama 3's positions that give ``factors: f64[d / 2]``.

    A file states what each frequency is divided by, and not how that was computed: with a context
    of C tokens, wavelengths below C / 4 are left, those above C divided by ``factor``, and those
    between interpolated. C is a power of two in all models.
    """
    factor = float(factors.max())
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for exponent in range(4, 24):
        context = 2**exponent
        smooth = ((context / waves - 1.0) / 3.0).clip(0.0, 1.0)
        made = 1 / ((1 - smooth) / factor + smooth)
        if made.shape == factors.shape and np.allclose(made, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise _misread(path, f"the rotary positions of its '{ROPE_FACTORS}' are not understood")


def _misread(path: Path, what: str) -> InvalidModel:
    msg = (
        f"every entry of a .gguf must be understood, or another model would be measured; of "
        f"'{path.name}' {what}: provide the Hugging Face folder that it was made of"
    )
    return InvalidModel(msg, source=str(path))


def _save_tokenizer(path: Path, header: GgufHeader, scratch: Path, folder: Path) -> None:
    """Write the file's tokenizer if it has one whose rules are known.

    Raises:
        InvalidModel: It is broken.
    """
    from transformers import AutoTokenizer

    kind = header.entries.get("tokenizer.ggml.model")
    rule = header.entries.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and rule not in _SPLITS):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(scratch), gguf_file="model.gguf", local_files_only=True
        )
    except Exception as err:  # a tokenizer can fail anywhere in transformers
        raise _misread(path, f"the tokenizer cannot be read ({err!s:.200})") from err
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    # Transformers adds the special tokens of its own classes where a vocabulary lacks them.
    n_tokens = header.tensors["token_embd.weight"].shape[0]
    described["added_tokens"] = [t for t in described["added_tokens"] if t["id"] < n_tokens]
    if rule == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        described["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, described["pre_tokenizer"]],
        }
    file.write_text(json.dumps(described, ensure_ascii=False))
