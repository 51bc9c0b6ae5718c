"""Webhooks: tell a tenant's server that a job has ended; signed, retried, never to ourselves.

Deliveries wait in the database.  One thread with an event loop of its own sends many at once, each
under one deadline for all of it, a few of one tenant and to one host: who answers slowly, or not
at all, delays only himself.

References:
    Standard Webhooks specification 1.0: headers ``webhook-id``, ``webhook-timestamp`` and
    ``webhook-signature`` (HMAC-SHA256).
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import ssl
import threading
from collections import Counter
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import httpx
import sqlalchemy as sa
from standardwebhooks import Webhook

from bitquota.errors import BitquotaError, InvalidInput
from bitquota.service.jobs.turns import tenants_of
from bitquota.service.logs import logger
from bitquota.service.security.keys import check_tenant
from bitquota.service.security.public_addresses import check_url, host_of, resolve
from bitquota.service.store.database import deliveries, tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection, RowMapping

    from bitquota.service.settings import Settings
    from bitquota.service.store.database import Database

_log = logger("webhooks")
_LEASE_S = 60.0
_TICK_S = 0.5
_LONGEST_WAIT_S = 6 * 3600.0
_STOP_S = 3.0
_OF_ALL, _OF_HOST = 16, 2
"""Deliveries at the same time, in all and to one host, in multiples of those of one tenant."""


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

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """What signs the certificates of receivers; reading it takes some 20 ms."""
        return httpx.create_ssl_context(trust_env=False)

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
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="webhooks", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop soon; what is still under way then is sent again, by whoever runs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_STOP_S + 2 * _TICK_S)

    async def _run(self) -> None:
        """Deliver until the end, many at once."""
        under_way: dict[asyncio.Task[None], RowMapping] = {}
        while not self._stop.is_set():
            due = None
            going = tuple(under_way.values())
            try:
                due = await _in_thread(partial(self.claim, going))
            except BitquotaError as error:
                _log.warning("deliveries wait", error=str(error))
            if due is None:
                await asyncio.sleep(_TICK_S)
                continue
            task = asyncio.create_task(self.deliver(due))
            under_way[task] = due
            task.add_done_callback(under_way.pop)
        if under_way:
            await asyncio.wait(under_way, timeout=_STOP_S)

    def claim(self, under_way: Sequence[RowMapping] = ()) -> RowMapping | None:
        """Return a delivery that is due and put it off for others; ``None`` if none may go now.

        It is of a tenant with the fewest under way here, to a host that has not too many.

        Args:
            under_way: Deliveries of this server that have not ended.
        """
        now = self._clock()
        most = self._settings.webhook_in_flight
        if len(under_way) >= _OF_ALL * most:
            return None

        # Who has as many deliveries under way as allowed.
        of_tenant = Counter(row["tenant"] for row in under_way)
        of_host = Counter(row["host"] for row in under_way)
        busy = [tenant for tenant, count in of_tenant.items() if count >= most]
        busy_hosts = [host for host, count in of_host.items() if count >= _OF_HOST * most]
        may_go = sa.and_(deliveries.c.next_at <= now, deliveries.c.host.not_in(busy_hosts))

        def find(connection: Connection) -> list[str]:
            waiting = tenants_of(deliveries, lambda table: table.c.next_at.is_not(None))
            first = (
                sa.select(sa.func.min(deliveries.c.next_at))
                .where(deliveries.c.tenant == waiting.c.tenant, may_go)
                .scalar_subquery()
            )
            query = sa.select(waiting.c.tenant).where(
                waiting.c.tenant.not_in(busy), first.is_not(None)
            )
            return list(connection.execute(query.order_by(first)).scalars())

        def work(connection: Connection) -> RowMapping | None:
            query = (
                sa.select(deliveries)
                .where(deliveries.c.tenant == tenant, may_go)
                .order_by(deliveries.c.next_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = connection.execute(query).mappings().first()
            if row is not None:
                connection.execute(
                    deliveries.update()
                    .where(deliveries.c.id == row["id"])
                    .values(
                        next_at=now + _LEASE_S + self._settings.webhook_deadline_s,
                        attempts=deliveries.c.attempts + 1,
                    )
                )
            return row

        # Of the tenants that wait, the one with the fewest under way.
        found = self._db.read(find)
        if not found:
            return None
        tenant = min(found, key=lambda name: of_tenant[name])
        return self._db.write(work)

    async def deliver(self, row: RowMapping) -> None:
        """Send one delivery and note how that went; returns when nothing of it goes on."""
        now = self._clock()
        error: str | None = None
        resolving = _in_thread(partial(self._resolve, row["url"]))
        try:
            async with asyncio.timeout(self._settings.webhook_deadline_s):
                status = await self._send(row, now, await asyncio.shield(resolving))
            if not 200 <= status < 300:
                error = f"answered {status}"
        except TimeoutError:
            error = f"did not answer within {self._settings.webhook_deadline_s:g} s"
        except (BitquotaError, httpx.HTTPError, ssl.SSLError, OSError, ValueError) as err:
            error = f"{type(err).__name__}: {err}"[:500]
        try:
            await _in_thread(partial(self._note, row, now, error))
        except BitquotaError as err:
            _log.warning("delivery will be repeated", job=row["job"], error=str(err))
        # The system's resolver cannot be stopped: as long as it looks, this is under way.
        await asyncio.wait([resolving])

    def _note(self, row: RowMapping, now: float, error: str | None) -> None:
        """Write down how an attempt went, and when the next one is."""
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

    def _resolve(self, url: str) -> str:
        """Return the address to connect to."""
        parts = urlsplit(url)
        allow_private = self._settings.webhook_allow_private
        return resolve(host_of(parts), _port_of(parts), allow_private=allow_private)

    async def _send(self, row: RowMapping, now: float, address: str) -> int:
        """Return the status of the answer; its body is not read: it could be endless.

        httpx refuses headers of more than 100 KiB together.
        """
        parts = urlsplit(row["url"])
        secret = await _in_thread(partial(self._secret, row["tenant"]))
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
        # The certificate is still that of the name; redirects could lead anywhere, and are not
        # followed.  There is one time limit for all of this, further up.
        async with (
            httpx.AsyncClient(verify=self._trusted, timeout=None, trust_env=False) as http,  # noqa: S113
            http.stream(
                "POST",
                f"{parts.scheme}://{shown}:{_port_of(parts)}{path}",
                content=row["body"],
                headers=headers,
                extensions={"sni_hostname": host_of(parts)},
            ) as answer,
        ):
            return answer.status_code


def _port_of(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _in_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Run ``work`` in a daemon thread: one that never returns must not hold up the end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:  # noqa: ANN401
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as err:  # noqa: BLE001  # handed to who waits
            error = err
        try:
            loop.call_soon_threadsafe(finish, result, error)
        except RuntimeError:
            return  # the loop has ended

    threading.Thread(target=run, name="webhook", daemon=True).start()
    return future
