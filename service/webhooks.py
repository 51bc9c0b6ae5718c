"""Webhooks: tell a tenant's server that a job has ended; signed, retried, never to ourselves.

References:
    Standard Webhooks specification 1.0: headers ``webhook-id``, ``webhook-timestamp`` and
    ``webhook-signature`` (HMAC-SHA256).
"""

from __future__ import annotations

import base64
import ipaddress
import secrets
import socket
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import sqlalchemy as sa
from standardwebhooks import Webhook

from bitquota.errors import BitquotaError, InvalidInput
from bitquota.service.database import deliveries, tenants
from bitquota.service.keys import check_tenant
from bitquota.service.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, RowMapping

    from bitquota.service.database import Database
    from bitquota.service.settings import Settings

_log = logger("webhooks")
_LEASE_S = 60.0
_ANSWER_S = 10.0
_TICK_S = 1.0
_LONGEST_WAIT_S = 6 * 3600.0


def check_url(url: str, *, allow_private: bool) -> None:
    """Check what can be said of a webhook's address without asking the network.

    Raises:
        InvalidInput: Not https, or it names a user, or it is an address that is not public.
    """
    parts = urlsplit(url)
    schemes = {"https", "http"} if allow_private else {"https"}
    if parts.scheme not in schemes or not parts.hostname or parts.username or parts.password:
        msg = (
            f"a webhook must be an {' or '.join(sorted(schemes))} URL with a host and without a "
            f"user; got '{url}'"
        )
        raise InvalidInput(msg, url=url)
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return  # a name: it is resolved, and judged, for every delivery
    if not allow_private and not _is_public(address):
        raise _not_public(parts.hostname)


def public_address(host: str, port: int, *, allow_private: bool) -> str:
    """Return the address to connect to; the caller must use this very one.

    Resolving again later would let a name point to the public for the check and to this machine
    for the call.

    Raises:
        InvalidInput: The name cannot be resolved, or one of its addresses is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as err:
        msg = f"the host of a webhook must be found; '{host}' is not: {err}"
        raise InvalidInput(msg, host=host) from err
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not allow_private and not all(_is_public(address) for address in addresses):
        raise _not_public(host)
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        # Forms of IPv6 that carry an IPv4 address to somewhere.
        inner = address.ipv4_mapped or address.sixtofour
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast


def _not_public(host: str) -> InvalidInput:
    msg = (
        f"a webhook must go to a public address; '{host}' is not one: use another, or have the "
        "operator set BITQUOTA_WEBHOOK_ALLOW_PRIVATE"
    )
    return InvalidInput(msg, host=host)


class Webhooks:
    """Secrets of tenants and the thread that delivers.

    Args:
        settings: Of the server.
        database: Where deliveries wait.
        clock: Seconds since 1970.
    """

    def __init__(self, settings: Settings, database: Database, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._db = database
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def new_secret(self, tenant: str) -> str:
        """Give a tenant a new signing secret and return it; the old one ends."""
        check_tenant(tenant)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()

        def work(connection: Connection) -> None:
            where = tenants.c.tenant == tenant
            if connection.execute(sa.select(tenants.c.tenant).where(where)).first() is None:
                connection.execute(tenants.insert().values(tenant=tenant))
            connection.execute(tenants.update().where(where).values(webhook_secret=secret))

        self._db.write(work)
        return secret

    def _secret(self, tenant: str) -> str | None:
        query = sa.select(tenants.c.webhook_secret).where(tenants.c.tenant == tenant)
        return self._db.read(lambda connection: connection.execute(query).scalar())

    def check(self, tenant: str, url: str) -> None:
        """Raise ``InvalidInput`` unless a job of ``tenant`` may name ``url``."""
        check_url(url, allow_private=self._settings.webhook_allow_private)
        if self._secret(tenant) is None:
            msg = (
                "webhooks are signed, so a tenant needs a secret first: have the operator run "
                f"'bitquota admin webhook-secret {tenant}'"
            )
            raise InvalidInput(msg)

    def start(self) -> None:
        """Begin to deliver in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the delivery that is under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_ANSWER_S + _TICK_S)

    def _run(self) -> None:
        while not self._stop.wait(_TICK_S):
            try:
                while (due := self.claim()) is not None and not self._stop.is_set():
                    self.deliver(due)
            except BitquotaError as error:
                _log.warning("deliveries wait", error=str(error))

    def claim(self) -> RowMapping | None:
        """Return a delivery that is due and put it off for others; ``None`` if none is."""
        now = self._clock()

        def find(connection: Connection) -> bool:
            query = sa.select(deliveries.c.id).where(deliveries.c.next_at <= now).limit(1)
            return connection.execute(query).first() is not None

        def work(connection: Connection) -> RowMapping | None:
            row = (
                connection.execute(
                    sa.select(deliveries)
                    .where(deliveries.c.next_at <= now)
                    .order_by(deliveries.c.next_at)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                )
                .mappings()
                .first()
            )
            if row is not None:
                connection.execute(
                    deliveries.update()
                    .where(deliveries.c.id == row["id"])
                    .values(next_at=now + _LEASE_S, attempts=deliveries.c.attempts + 1)
                )
            return row

        return self._db.write(work) if self._db.read(find) else None

    def deliver(self, row: RowMapping) -> None:
        """Send one delivery and note how that went."""
        now = self._clock()
        error: str | None = None
        try:
            status = self._send(row, now)
            if not 200 <= status < 300:
                error = f"answered {status}"
        except (BitquotaError, httpx.HTTPError, ValueError) as err:
            error = f"{type(err).__name__}: {err}"[:500]
        attempts = row["attempts"] + 1
        again = error is not None and attempts < self._settings.webhook_attempts
        wait = min(self._settings.webhook_retry_s * 2.0 ** row["attempts"], _LONGEST_WAIT_S)
        values = {
            "delivered_at": now if error is None else None,
            "error": error,
            "next_at": now + wait if again else None,
        }
        self._db.write(
            lambda connection: connection.execute(
                deliveries.update().where(deliveries.c.id == row["id"]).values(values)
            )
        )
        say = _log.info if error is None else _log.warning
        say("webhook", job=row["job"], attempt=attempts, error=error)

    def _send(self, row: RowMapping, now: float) -> int:
        parts = urlsplit(row["url"])
        assert parts.hostname is not None  # noqa: S101  # checked when it was ordered
        port = parts.port or (443 if parts.scheme == "https" else 80)
        allow_private = self._settings.webhook_allow_private
        address = public_address(parts.hostname, port, allow_private=allow_private)
        secret = self._secret(row["tenant"])
        if secret is None:
            msg = "the tenant's signing secret is gone"
            raise InvalidInput(msg)
        signature = Webhook(secret).sign(row["id"], datetime.fromtimestamp(now, UTC), row["body"])
        headers = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "User-Agent": "bitquota-webhooks",
            "webhook-id": row["id"],
            "webhook-timestamp": str(int(now)),
            "webhook-signature": signature,
        }
        shown = f"[{address}]" if ":" in address else address
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # The certificate is still that of the name; redirects could lead anywhere.
        with (
            httpx.Client(timeout=_ANSWER_S, follow_redirects=False, trust_env=False) as http,
            http.stream(
                "POST",
                f"{parts.scheme}://{shown}:{port}{path}",
                content=row["body"],
                headers=headers,
                extensions={"sni_hostname": parts.hostname},
            ) as answer,
        ):
            return answer.status_code  # the body is not read: it could be endless
