"""``bitquota serve``: one process with the REST API, the supervisor, and its drivers.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput, MissingDependency
from bitquota.service.settings import Settings
from bitquota.service.store.storage_errors import require_writable

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

SWITCH_S = 0.0005
"""Seconds for which a thread may keep the interpreter while others wait."""


def serve(
    host: str | None = None,
    port: int | None = None,
    data_dir: Path | None = None,
    *,
    settings: Settings | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; running jobs are then handed back to the queue.

    The first line of standard output says where it listens.

    Args:
        host: Address; the default is ``settings.host``.
        port: Port, 0 for a free one; the default is ``settings.port``.
        data_dir: Folder of everything it keeps; the default is ``settings.data_dir``.
        settings: Everything else; from ``BITQUOTA_*`` variables when not given.

    Raises:
        InvalidInput: The address is not loopback and there is no API key, or it is taken.
        MissingDependency: The ``service`` extra is not installed.
    """
    try:
        import uvicorn

        from bitquota.service.api.connections import Connection, Connections
        from bitquota.service.app import create_app
        from bitquota.service.logs import configure
    except ImportError as err:
        msg = f"the server needs {err.name}; install it with: pip install 'bitquota[service]'"
        raise MissingDependency(msg, extra="service") from err

    chosen = Settings.from_environment() if settings is None else settings
    given = {"host": host, "port": port, "data_dir": data_dir}
    chosen = replace(chosen, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    configure(chosen.log_level)
    has_keys = _has_keys(chosen)
    if not (chosen.loopback or has_keys or chosen.oidc_issuer):
        msg = (
            f"a server that others can reach must have API keys; '{chosen.host}' is not a loopback "
            "address, or a proxy is trusted, and there are none: create one with 'bitquota admin "
            "keys create', or listen on 127.0.0.1 without a proxy"
        )
        raise InvalidInput(msg, host=chosen.host)
    listening = _listen(chosen.host, chosen.port)
    port = listening.getsockname()[1]
    app = create_app(replace(chosen, port=port))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        # Said explicitly: by itself uvicorn believes every program of this machine.
        proxy_headers=bool(chosen.proxies),
        forwarded_allow_ips=[str(network) for network in chosen.proxies],
        timeout_keep_alive=75,
        http=partial(Connection, Connections(chosen)),  # type: ignore[arg-type]  # called like a class
        ws="none",
    )
    shown = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
    print(f"bitquota serves http://{shown}:{port} (data in {chosen.data_dir})", flush=True)  # noqa: T201
    if chosen.loopback and not has_keys:
        print("no API keys: every program of this machine may use it", flush=True)  # noqa: T201
    # Threads that write submissions would otherwise keep the event loop from the interpreter for
    # 5 ms each time it comes back from the network, and polls would queue up behind that.
    sys.setswitchinterval(SWITCH_S)
    # uvicorn raises the signal that ended it once more; the work is done by then, so exit with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    uvicorn.Server(config).run(sockets=[listening])


def _has_keys(settings: Settings) -> bool:
    from bitquota.service.security.keys import KeyStore
    from bitquota.service.store.database import Database

    require_writable(settings.data_dir)
    database = Database(settings.url)
    try:
        database.create()
        return KeyStore(database, time.time).any()
    finally:
        database.close()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing."""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as err:
        listening.close()
        msg = f"the address to listen on must be free; {host} port {port}: {err.strerror}"
        raise InvalidInput(msg, host=host, port=port) from err
    listening.listen(2048)
    return listening
