"""The service: a REST API in front of durable jobs, each in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquota.service.run import serve

__all__ = ["serve"]


def __getattr__(name: str) -> object:
    """Import ``serve`` on first use, so that a driver does not load the web framework."""
    if name == "serve":
        from bitquota.service.run import serve

        return serve
    msg = f"module '{__name__}' has no attribute '{name}'"
    raise AttributeError(msg)
