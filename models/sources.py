"""What a user may name as a model or as samples, told by the name alone: no file is read, no torch.

Commands ask here before they load anything, loaders ask again.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path

from bitquota.errors import InvalidCalibration, InvalidInput, InvalidModel, UnsafeModel

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""``package.module:function``."""

PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib", ".ckpt", ".model"})
"""Suffixes of files that run code when they are read."""

TABLE_SUFFIXES = (".jsonl", ".parquet")
"""Suffixes of tables: their columns are inputs, or a text, which takes a tokenizer."""

MODEL_WAYS = (
    "a Hugging Face folder (config.json and .safetensors), a .gguf of llama.cpp, a .pt2 written by "
    "torch.export.save, an .onnx file, or, on this machine, a factory 'package.module:function'"
)
SAMPLE_WAYS = (
    "an .npz or .safetensors file of arrays, a .jsonl or .parquet of columns or of a 'text', a "
    ".txt, or, on this machine, a factory 'package.module:function'"
)
HOW_TO_SAVE = (
    "save it with numpy.savez('calibration.npz', x=inputs, y=labels), x being what the model "
    "takes: float32 activations, normalised as in training, or integer tokens"
)


class ModelSource(StrEnum):
    """The ways in which a model comes."""

    FACTORY = "factory"
    FOLDER = "folder"
    PT2 = "pt2"
    ONNX = "onnx"
    GGUF = "gguf"


class SampleSource(StrEnum):
    """The ways in which samples come."""

    FACTORY = "factory"
    NPZ = "npz"
    SAFETENSORS = "safetensors"
    TABLE = "table"
    TEXT = "text"


def model_source(spec: str) -> ModelSource:
    """Return which kind of model ``spec`` names.

    Raises:
        UnsafeModel: A pickle.
        InvalidModel: Nothing of that name, or a file that is no model.
    """
    path = Path(spec)
    if FACTORY.fullmatch(spec) and not path.exists():
        return ModelSource.FACTORY
    if path.is_dir():
        return ModelSource.FOLDER
    if not path.exists():
        msg = f"a model must exist and be {MODEL_WAYS}; '{spec}' does not exist"
        raise InvalidModel(msg, source=spec)
    if path.suffix in (".pt2", ".onnx", ".gguf"):
        return ModelSource(path.suffix[1:])
    if path.suffix in PICKLES:
        msg = (
            f"a model must not be a pickle, which runs code when it is read; got '{path.name}': "
            f"provide {MODEL_WAYS}"
        )
        raise UnsafeModel(msg, source=spec)
    hint = ": provide the folder that holds it" if path.suffix == ".safetensors" else ""
    msg = f"a model must be {MODEL_WAYS}; got the file '{path.name}'{hint}"
    raise InvalidModel(msg, source=spec)


def sample_source(spec: str) -> SampleSource:
    """Return which kind of samples ``spec`` names; raises ``InvalidCalibration``."""
    path = Path(spec)
    if FACTORY.fullmatch(spec) and not path.exists():
        return SampleSource.FACTORY
    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        msg = f"a calibration set must be {SAMPLE_WAYS}; '{spec}' {got}"
        raise InvalidCalibration(msg, source=spec)
    if path.suffix in TABLE_SUFFIXES:
        return SampleSource.TABLE
    if path.suffix == ".txt":
        return SampleSource.TEXT
    if path.suffix in (".npz", ".safetensors"):
        return SampleSource(path.suffix[1:])
    why = " is a pickle, which runs code when it is read" if path.suffix in PICKLES else " is none"
    msg = f"a calibration set must be {SAMPLE_WAYS}; '{path.name}'{why}: {HOW_TO_SAVE}"
    raise InvalidCalibration(msg, source=spec)


def tokenizer_of(spec: str, *, model: str, tokenizer: str | None) -> str | None:
    """Return the tokenizer for the samples ``spec``: as given, or that of the model.

    Raises:
        InvalidCalibration: A text without a tokenizer, or no folder with one.
    """
    if tokenizer is None and _may_hold_tokenizer(Path(model)):
        tokenizer = model
    if sample_source(spec) is SampleSource.TEXT:
        require_tokenizer(Path(spec), tokenizer)
    return tokenizer


def _may_hold_tokenizer(path: Path) -> bool:
    """Whether this is a folder with a tokenizer, or a file that may hold one."""
    return (path / "tokenizer.json").is_file() or (path.suffix == ".gguf" and path.is_file())


BYTES = "bytes"
"""Tokenizer of byte-level models: every byte of the UTF-8 text is a token."""


def require_tokenizer(text: Path, tokenizer: str | None) -> str:
    """Return ``tokenizer``; raises ``InvalidCalibration`` if ``text`` cannot do with it."""
    if tokenizer is None:
        msg = (
            f"a text needs a tokenizer to become tokens; '{text.name}' has none: name the folder "
            "of the model (with its tokenizer.json), or 'bytes' for a byte-level model"
        )
        raise InvalidCalibration(msg, source=str(text))
    if tokenizer != BYTES and not _may_hold_tokenizer(Path(tokenizer)):
        msg = (
            f"a tokenizer must be 'bytes', a folder with tokenizer.json or a .gguf; got "
            f"'{tokenizer}'"
        )
        raise InvalidCalibration(msg, tokenizer=tokenizer)
    return tokenizer


def cache_folder() -> Path:
    """Return where this user keeps what can be made again (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "bitquota"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_existing(path: Path, what: str, option: str) -> None:
    """Raise ``InvalidInput`` unless a file that ``option`` names is there."""
    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        msg = f"{option} must name {what}; '{path}' {got}"
        raise InvalidInput(msg, path=str(path))
