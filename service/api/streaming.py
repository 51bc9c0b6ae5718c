"""Bodies that are written to a file as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from starlette.requests import Request

    from bitquota.service.store.blobs import Incoming

_PIECE = 2**20
"""Bytes that a body may take in memory; many arrive at the same time."""


async def write_body(request: Request, incoming: Incoming) -> None:
    """Write the body of a request in pieces, off the event loop.

    Raises:
        TooLarge: It exceeds the limit of ``incoming``.
        InvalidInput: The connection ended first; what came is written.
        StorageFull: The disk is full.
    """
    held: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            held.append(chunk)
            size += len(chunk)
            if size >= _PIECE:
                await run_in_threadpool(_write, incoming, held)
                held, size = [], 0
    except ClientDisconnect as err:
        await run_in_threadpool(_write, incoming, held)  # a later piece can go on from here
        msg = "an upload must arrive whole; the connection ended before it did: send it again"
        raise InvalidInput(msg) from err
    await run_in_threadpool(_write, incoming, held)


def _write(incoming: Incoming, chunks: list[bytes]) -> None:
    for chunk in chunks:
        incoming.write(chunk)
