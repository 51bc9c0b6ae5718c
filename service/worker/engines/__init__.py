"""Engines: where the evaluators of a job run; add one to the map below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.service.worker.engines.engine import Assignment, Engine, Inbox, InputFile, Worker
from bitquota.service.worker.engines.local import LocalEngine
from bitquota.service.worker.engines.ray_cluster import RayEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.service.settings import Settings

ENGINES: dict[str, Callable[[Settings], Engine]] = {
    LocalEngine.name: LocalEngine,
    RayEngine.name: RayEngine,
}
"""In order of preference."""

__all__ = ["ENGINES", "Assignment", "Engine", "Inbox", "InputFile", "Worker", "engine_of"]


def engine_of(settings: Settings) -> Engine:
    """Return the engine that the settings name; raises ``InvalidInput`` that lists them."""
    if settings.engine not in ENGINES:
        msg = f"BITQUOTA_ENGINE must be one of {', '.join(ENGINES)}; got {settings.engine!r}"
        raise InvalidInput(msg, engine=settings.engine)
    return ENGINES[settings.engine](settings)
