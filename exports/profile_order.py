"""What is timed: files in a folder, what each of them is, and how they are run.

Design: docs/design/latency.md
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitquota.canonical import canonical_json, digest_json, read_json
from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput
from bitquota.exports import time_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from torch import Tensor

RUNTIMES = {"onnx-qdq": "onnxruntime", "onnx-matmulnbits": "onnxruntime", "openvino": "openvino"}
"""The runtime of each export format that ``time_files`` runs."""
FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}
ORDER, TIMES, INPUTS, SCRIPT = "files.json", "times.json", "inputs.npz", "time_files.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(Document):
    """Files to time, and what each of them is (``files.json``).

    Attributes:
        runtime: Name of the runtime, as ``time_files`` knows it.
        options: Its options.
        threads: It runs on.
        batch: Samples of one run.
        length: Tokens of a sample, or 0.
        model_digest: Of the model.
        target: Whose formats the files have.
        layers: Names of layers.
        kinds: Number of the kind of each layer; those of one kind take the same time.
        files: Paths in the folder.
        labels: For each file the candidate of each layer; the last ``checked`` files are not
            fitted.
        checked: See there.
    """

    FORM: ClassVar[Form] = Form(
        what="an order of files to time", schema="bitquota/files/1", derived=("digest",)
    )

    runtime: str
    options: dict[str, str]
    threads: int
    batch: int
    length: int
    model_digest: str
    target: str
    layers: tuple[str, ...]
    kinds: tuple[int, ...]
    files: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    checked: int

    @property
    def digest(self) -> str:
        """Digest of what is timed, which the times repeat."""
        return digest_json([self.files, self.labels, self.model_digest, self.target, self.threads])

    def save(self, folder: Path, inputs: Sequence[Tensor]) -> None:
        """Write all that belongs to the files: order, inputs of a run, and the script."""
        arrays = {f"x{k}": t.numpy() for k, t in enumerate(inputs)}
        np.savez(folder / INPUTS, **arrays)  # type: ignore[arg-type]  # no option of its own
        shutil.copy(time_files.__file__, folder / SCRIPT)
        (folder / ORDER).write_text(canonical_json(self.to_json()) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``files.json`` of a folder; raises ``InvalidInput``."""
        advice = "name a folder that 'bitquota profile --files' wrote"
        return cls.from_json(read_json(folder / ORDER, "an order of files", advice, InvalidInput))


def tokens_of(inputs: Sequence[Tensor]) -> int:
    """Return the tokens of a sample, or 0 where samples are no tokens."""
    first = inputs[0]
    return 0 if first.is_floating_point() or first.ndim != 2 else int(first.shape[1])
