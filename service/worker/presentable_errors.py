"""Errors as clients see them: of a length that a page can show, and without a path of the server.

What an evaluator says of a failure is text by a library about files of ours, or by a stranger.
"""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquota.service.security.sandbox import python_folders

if TYPE_CHECKING:
    from bitquota.errors import BitquotaError

MAX_MESSAGE = 4_000
_REST = r"(?:/[^\s'\"`:,;()\[\]{}<>]*)?"
_OF_ANY_NODE = r"/[^\s'\"]*?/scratch/job-[^/\s'\"]+"
"""The scratch folder of an evaluator on whatever host."""


def presentable(error: BitquotaError, data_dir: Path) -> BitquotaError:
    """Return an error of the same kind that names files without their folders.

    Args:
        error: As it arose, or as an evaluator sent it.
        data_dir: Of the server.
    """
    pattern = _folders(data_dir)

    def cleaned(value: Any) -> Any:  # noqa: ANN401  # JSON
        match value:
            case str():
                return pattern.sub(lambda found: Path(found[0]).name, value)
            case dict():
                return {cleaned(key): cleaned(member) for key, member in value.items()}
            case list() | tuple():
                return [cleaned(member) for member in value]
        return value

    message = cleaned(error.message)
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 1] + "…"
    return type(error)(message, **{k: cleaned(v) for k, v in error.details.items()})


@cache
def _folders(data_dir: Path) -> re.Pattern[str]:
    """Return what matches a path below a folder that is nobody's business."""
    known = [data_dir, Path(tempfile.gettempdir()), Path.home(), *python_folders()]
    places = {str(path.absolute()) for path in known} | {str(path.resolve()) for path in known}
    escaped = [re.escape(p) for p in sorted(places - {"/"}, key=len, reverse=True)]
    return re.compile(rf"(?<![\w.-])(?:{_OF_ANY_NODE}|{'|'.join(escaped)})(?![\w.-]){_REST}")
