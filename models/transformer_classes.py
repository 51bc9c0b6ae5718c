"""Which classes of transformers can be measured: those that ship with it and answer one input.

There is no list of families. A class must be transformers' own, be told apart by its config's
``model_type``, and take token ids or pixels alone; what else its forward pass takes says whether a
part of it would not run, and so would seem to cost nothing at the fewest bits.

Design: docs/design/models.md
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from bitquota.errors import InvalidModel, MissingDependency

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject

_MAIN_INPUTS = ("input_ids", "pixel_values")

_FURTHER_INPUTS = frozenset(
    {
        "bbox", "decoder_input_ids", "image_embeds", "input_features", "input_values",
        "pixel_values", "pixel_values_videos", "query_embeds", "visual_embeds", "visual_feats",
    }
)  # fmt: skip
"""Inputs of parts beside the one that the main input goes to."""

_CROSS = re.compile(
    r"(encoder_attn|cross_?attn|cross_?attention|EncDecAttention)(\.|_)", re.IGNORECASE
)
"""Names of weights that attend to what another network gives."""

_FURTHER_ANSWERS = ("pred_", "masks_queries_logits", "class_queries_logits")
"""What names of further answers of a detector or a segmenter begin with."""

_ELSE = "export such a model to .pt2 or .onnx instead"


def model_class(config: JsonObject, path: Path) -> Any:  # noqa: ANN401  # a class of transformers
    """Return the class that a folder's config names.

    Raises:
        InvalidModel: It does not ship with transformers, belongs to another type, or takes more
            than tokens or pixels.
        MissingDependency: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as err:
        msg = "a Hugging Face folder needs transformers; install it with: pip install bitquota[hf]"
        raise MissingDependency(msg) from err
    model_type = config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        msg = (
            f"a model type must be one that transformers {transformers.__version__} has; got "
            f"{model_type!r}: {_ELSE}"
        )
        raise InvalidModel(msg, model_type=model_type)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        msg = (
            f"config.json of '{path.name}' must name its class under 'architectures'; got {names!r}"
        )
        raise InvalidModel(msg, source=str(path))
    name = names[0]
    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    base = transformers.PreTrainedModel
    own = isinstance(kind, type) and kind.__module__.startswith("transformers.models.")
    if not (own and issubclass(kind, base)):
        msg = f"transformers {transformers.__version__} must have the class '{name}'; it has not"
        raise InvalidModel(msg, architecture=name)
    expected = getattr(getattr(kind, "config_class", None), "model_type", None)
    if expected != model_type:
        msg = f"class '{name}' is for model type '{expected}'; the config says otherwise"
        raise InvalidModel(msg, architecture=name, model_type=model_type)
    takes = inspect.signature(kind.forward).parameters
    main = kind.main_input_name
    needed = {
        n for n, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    further = (_FURTHER_INPUTS & set(takes) | (needed - {"self"})) - {main}
    if main not in _MAIN_INPUTS or further:
        more = f"it takes {', '.join(sorted(further | {main}))}"
        msg = f"a model must take token ids or pixels alone; '{name}' does not, {more}: {_ELSE}"
        raise InvalidModel(msg, architecture=name, inputs=sorted(further | {main}))
    return kind


def check_parts(model: nn.Module, name: str) -> None:
    """Raise ``InvalidModel`` if a part of ``model`` waits for what another network gives."""
    crossing = [key for key, _ in model.named_parameters() if _CROSS.search(key)]
    if crossing:
        msg = (
            f"every weight of a model must be reached by its main input; '{crossing[0]}' of "
            f"'{name}' attends to another network: {_ELSE}"
        )
        raise InvalidModel(msg, tensors=crossing[:20])


def answer_of(output: Any) -> tuple[Tensor, bool]:  # noqa: ANN401  # of any class
    """Return logits or the last hidden state, and whether it is the former.

    Raises:
        InvalidModel: There is neither, or there are further answers, which nothing would measure.
    """
    found = dict(output.items())
    if further := [n for n in found if n.startswith(_FURTHER_ANSWERS)]:
        msg = (
            f"a model of transformers must answer by its logits alone; this one gives "
            f"{', '.join(further)} too: {_ELSE}"
        )
        raise InvalidModel(msg, outputs=further)
    for name in ("logits", "last_hidden_state"):
        if found.get(name) is not None:
            return found[name], name == "logits"
    msg = (
        f"a model of transformers must return logits or its last hidden state; this one returns "
        f"{', '.join(found) or 'nothing'}: {_ELSE}"
    )
    raise InvalidModel(msg, outputs=list(found))
