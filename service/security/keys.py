"""API keys: who calls, and what they may do.

A key is ``bq_<id>_<secret>`` with 256 random bits of secret. Only its SHA-256 is stored: a slow
hash protects guessable passwords, and nobody guesses 256 bits.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.errors import Forbidden, InvalidInput, NotFound, Unauthorized
from bitquota.service.store.database import api_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy.engine import Connection, RowMapping

    from bitquota.service.store.database import Database

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_KEY = re.compile(r"bq_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_SECRET_BYTES = 32
LOWEST_PRIORITY, HIGHEST_PRIORITY = -100, 100
"""Of jobs.  A key submits up to a priority of its own, 0 unless its maker says otherwise."""

_REMEMBERED = 4096
MEMORY_S = 2.0
"""How long a server trusts what it last read of a key, so that polls need not read it again: a
revocation takes effect on every server within this time."""


class Scope(StrEnum):
    """What a key permits."""

    READ = "read"
    """Look at jobs, plans and uploads."""
    WRITE = "write"
    """Upload, submit and cancel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key without its secret; times in seconds since 1970."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    max_priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request."""

    tenant: str
    actor: str
    scopes: frozenset[Scope]
    max_priority: int = 0

    def check_priority(self, priority: int) -> None:
        """Raise ``Forbidden`` if the caller's key may not submit jobs of ``priority``."""
        if priority > self.max_priority:
            msg = (
                f"a job of this key must have a priority of at most {self.max_priority}; got "
                f"{priority}: lower it, or have the operator make a key with a higher "
                "--max-priority"
            )
            raise Forbidden(msg, max_priority=self.max_priority)

    def require(self, scope: Scope) -> None:
        """Raise ``Forbidden`` unless the caller's key has ``scope``."""
        if scope not in self.scopes:
            msg = (
                f"this needs a key with the scope '{scope}'; yours has "
                f"{', '.join(sorted(self.scopes))}"
            )
            raise Forbidden(msg, scope=str(scope))


class KeyStore:
    """API keys in the database."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock
        self._any = (False, -math.inf)
        self._verified: dict[str, tuple[Caller, float]] = {}

    def create(
        self,
        tenant: str,
        *,
        name: str = "",
        scopes: Iterable[Scope] = tuple(Scope),
        lifetime_s: float | None = None,
        max_priority: int = 0,
    ) -> tuple[ApiKey, str]:
        """Return a new key and its text, which is not kept and cannot be shown again.

        Raises:
            InvalidInput: The tenant's name, the lifetime or the priority cannot be used.
        """
        check_tenant(tenant)
        if lifetime_s is not None and lifetime_s <= 0:
            msg = f"the lifetime of a key must be positive; got {lifetime_s} s"
            raise InvalidInput(msg)
        if not LOWEST_PRIORITY <= max_priority <= HIGHEST_PRIORITY:
            msg = (
                f"the highest priority of a key must be from {LOWEST_PRIORITY} to "
                f"{HIGHEST_PRIORITY}; got {max_priority}"
            )
            raise InvalidInput(msg)
        now = self._clock()
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(_SECRET_BYTES)
        values = {
            "id": key_id,
            "tenant": tenant,
            "name": name,
            "secret_sha256": _hash(secret),
            "scopes": ",".join(sorted(scopes)),
            "created_at": now,
            "expires_at": None if lifetime_s is None else now + lifetime_s,
            "max_priority": max_priority,
        }

        def work(connection: Connection) -> ApiKey:
            if (known := _find(connection, key_id)) is None:
                connection.execute(api_keys.insert().values(values))
                known = _find(connection, key_id)
            assert known is not None  # noqa: S101  # inserted above
            return _key(known)

        return self._db.write(work), f"bq_{key_id}_{secret}"

    def rotate(self, key_id: str, *, overlap_s: float = 0.0) -> tuple[ApiKey, str]:
        """Replace a key by one with the same tenant, name and rights; returns the new one.

        Args:
            key_id: The key to replace.
            overlap_s: How long the old one still works.

        Raises:
            NotFound: There is no such key, or it was revoked.
        """
        old = self.get(key_id)
        if old.revoked_at is not None:
            msg = f"a key must be valid to be rotated; '{key_id}' was revoked: create a new one"
            raise NotFound(msg, key=key_id)
        lifetime_s = None if old.expires_at is None else old.expires_at - old.created_at
        made = self.create(
            old.tenant,
            name=old.name,
            scopes=old.scopes,
            lifetime_s=lifetime_s,
            max_priority=old.max_priority,
        )
        until = self._clock() + overlap_s
        self._set(
            key_id, expires_at=until if old.expires_at is None else min(until, old.expires_at)
        )
        if overlap_s <= 0:
            self.revoke(key_id)
        return made

    def revoke(self, key_id: str) -> None:
        """End a key now; raises ``NotFound``."""
        self._set(key_id, revoked_at=self._clock())

    def _set(self, key_id: str, **values: float) -> None:
        changed = self._db.write(
            lambda connection: (
                connection.execute(
                    api_keys.update().where(api_keys.c.id == key_id).values(**values)
                ).rowcount
            )
        )
        if changed != 1:
            raise _unknown(key_id)

    def get(self, key_id: str) -> ApiKey:
        """Return a key; raises ``NotFound``."""
        row = self._db.read(lambda connection: _find(connection, key_id))
        if row is None:
            raise _unknown(key_id)
        return _key(row)

    def list(self, tenant: str | None = None) -> Sequence[ApiKey]:
        """Return all keys, or those of one tenant, oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        return self._db.read(
            lambda connection: [_key(row) for row in connection.execute(query).mappings()]
        )

    def any(self) -> bool:
        """Return whether a key was ever made; from then on every call needs one."""
        query = sa.select(api_keys.c.id).limit(1)
        found = self._db.read(lambda connection: connection.execute(query).first()) is not None
        self._any = (found, self._clock())
        return found

    def any_remembered(self) -> bool | None:
        """Return what ``any`` said within the last ``MEMORY_S``, without the database."""
        found, at = self._any
        return found if found or 0 <= self._clock() - at < MEMORY_S else None

    def remembered(self, text: str) -> Caller | None:
        """Return who ``verify`` found for ``text`` within ``MEMORY_S``, without the database."""
        known = self._verified.get(_hash(text))
        if known is None or not 0 <= self._clock() - known[1] < MEMORY_S:
            return None
        return known[0]

    def verify(self, text: str) -> Caller:
        """Return who holds the key ``text``.

        Raises:
            Unauthorized: It is no key, or it was revoked, or it has expired. Which of these is
                not said.
        """
        found = _KEY.fullmatch(text)
        row = None
        if found is not None:
            row = self._db.read(lambda connection: _find(connection, found[1]))
        # Compared also when there is no such key, so that the time taken tells nothing.
        sent = _hash(found[2] if found else "")
        same = hmac.compare_digest(sent, row["secret_sha256"] if row else _hash("none"))
        now = self._clock()
        if (
            row is None
            or not same
            or row["revoked_at"] is not None
            or (row["expires_at"] is not None and row["expires_at"] <= now)
        ):
            msg = "a valid API key must be sent as 'Authorization: Bearer bq_…'; this one is not"
            raise Unauthorized(msg)
        return self._remember(_hash(text), _key(row), now)

    def caller_of_key(self, key_id: str) -> Caller:
        """Return who holds the key with this id, known or read within ``MEMORY_S``.

        Raises:
            NotFound: There is none, or it was revoked, or it has expired.
        """
        now = self._clock()
        known = self._verified.get(f"id:{key_id}")
        if known is not None and 0 <= now - known[1] < MEMORY_S:
            return known[0]
        key = self.get(key_id)
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
            raise _unknown(key_id)
        return self._remember(f"id:{key_id}", key, now)

    def _remember(self, name: str, key: ApiKey, now: float) -> Caller:
        caller = Caller(
            tenant=key.tenant,
            actor=f"key:{key.id}",
            scopes=key.scopes,
            max_priority=key.max_priority,
        )
        if len(self._verified) >= _REMEMBERED:
            self._verified.clear()
        self._verified[name] = (caller, now)
        return caller


def is_key(text: str) -> bool:
    """Return whether ``text`` has the form of an API key."""
    return _KEY.fullmatch(text) is not None


def check_tenant(tenant: str) -> None:
    """Raise ``InvalidInput`` unless ``tenant`` can name a folder and a column."""
    if not _TENANT.fullmatch(tenant):
        msg = (
            "a tenant must be named by 1 to 63 lower-case letters, digits, '-' and '_', beginning "
            f"with a letter or digit; got {tenant!r}"
        )
        raise InvalidInput(msg, tenant=tenant)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _find(connection: Connection, key_id: str) -> RowMapping | None:
    query = sa.select(api_keys).where(api_keys.c.id == key_id)
    return connection.execute(query).mappings().first()


def _key(row: RowMapping) -> ApiKey:
    return ApiKey(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        scopes=frozenset(Scope(s) for s in row["scopes"].split(",") if s),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        max_priority=row["max_priority"],
    )


def _unknown(key_id: str) -> NotFound:
    return NotFound(f"the key must exist; there is no key '{key_id}'", key=key_id)
