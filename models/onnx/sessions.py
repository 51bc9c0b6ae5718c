"""How ONNX Runtime sessions are made: one thread setting, one memory arena for all of them.

Measuring one graph takes a session for each distinct part of it. With an arena each, the
activations of one pass are kept in memory as often as there are sessions (PP-OCR's orientation
classifier, 128 samples: 6 GB); with a shared one, once. What sessions keep would also break up the
places in the heap that large tensors leave (PP-OCR's recognition, 8 samples: 1 GB of gaps after 60
sessions), so those are kept out of the heap.

Design: docs/design/runners.md
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from typing import Any

import torch

from bitquota.errors import InvalidModel, MissingDependency

_MMAP_THRESHOLD = -3
"""Number of the setting in glibc's malloc.h."""

_LARGE_BLOCK = 4 * 2**20
"""Bytes from which a block has pages of its own. Left alone, glibc raises this to 32 MiB."""


def import_onnxruntime() -> Any:  # noqa: ANN401  # a module
    """Return the onnxruntime module.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as err:
        msg = "an ONNX model needs onnxruntime; install it with: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    return onnxruntime


def make_session(
    model: Any,  # noqa: ANN401  # onnx.ModelProto
    *,
    optimize: bool = True,
) -> Any:  # noqa: ANN401  # InferenceSession
    """Return a session of ``model`` on the processor.

    Args:
        model: The graph, below 2 GiB.
        optimize: Whether ONNX Runtime may rewrite the graph.

    Raises:
        InvalidModel: ONNX Runtime cannot run it.
        MissingDependency: ONNX Runtime is not installed.
    """
    ort = import_onnxruntime()
    _share_arena()
    _keep_large_blocks_apart()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        data = model.SerializeToString()
    except ValueError as err:
        msg = f"an ONNX model must be below 2 GiB without its layers' weights; it is not: {err}"
        raise InvalidModel(msg) from err
    try:
        # Its fallback would print to standard output and try the same again.
        return ort.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as err:  # onnxruntime raises its own kinds
        msg = f"ONNX Runtime must be able to run the model; it says: {first_line(err)}"
        raise InvalidModel(msg) from err


@cache
def _share_arena() -> None:
    """Give the process one arena that sessions take memory from, grown by what is asked for."""
    ort = import_onnxruntime()
    place = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    no_limit, as_requested, default = 0, 1, -1
    ort.create_and_register_allocator(
        place, ort.OrtArenaCfg(no_limit, as_requested, default, default)
    )


@cache
def _keep_large_blocks_apart() -> None:
    """Let large blocks go back to the system when they are freed; nothing where malloc is another.

    A large block that is freed in the heap is cut up by the small ones of the next session, and the
    next large one of that size no longer fits.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def first_line(err: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    text = str(err).strip()
    return text.splitlines()[0] if text else type(err).__name__
