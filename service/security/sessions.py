"""Sessions of the web pages: a cookie that stands for an API key, and the token against forgery.

The cookie names the key, the time and a nonce, and is signed (HMAC-SHA256) with a secret that lies
in the data folder, so every server over that folder accepts it and a restart ends no session. The
key is looked up on every request: revoking it ends its sessions. One that was signed out is noted
in the database until it would have ended by itself.

Design: docs/design/web-pages.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.errors import Forbidden, NotFound, Unauthorized
from bitquota.service.store.database import ended_sessions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.engine import Connection

    from bitquota.canonical import JsonObject
    from bitquota.service.security.keys import Caller, KeyStore
    from bitquota.service.store.database import Database

COOKIE = "bitquota_session"
FORM_COOKIE = "bitquota_form"
"""Ties the sign-in form to the browser that it was sent to, before there is a session."""

CSRF_HEADER = "x-csrf-token"
LIFETIME_S = 12 * 3600.0
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One signed-in browser."""

    caller: Caller
    csrf_token: str


class Sessions:
    """Makes and reads session cookies.

    Args:
        secret_file: Where the signing secret is, or will be put.
        keys: Who may sign in.
        database: Where sessions that were signed out are noted.
        clock: Seconds since 1970.
    """

    def __init__(
        self, secret_file: Path, keys: KeyStore, database: Database, clock: Callable[[], float]
    ) -> None:
        self._secret = _secret(secret_file)
        self._keys = keys
        self._db = database
        self._clock = clock

    def open(self, key_text: str) -> str:
        """Return the cookie of a new session; raises ``Unauthorized`` unless the key is valid."""
        caller = self._keys.verify(key_text)
        payload = {
            "key": caller.actor.removeprefix("key:"),
            "until": self._clock() + LIFETIME_S,
            "nonce": secrets.token_hex(16),
        }
        body = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode()
        return f"{body}.{self._sign('session', body)}"

    def read(self, cookie: str) -> Session:
        """Return the session of a cookie.

        Raises:
            Unauthorized: It is not one of ours, it is over, it was signed out, or its key is no
                longer valid.
        """
        payload = self._payload(cookie)
        query = sa.select(ended_sessions.c.nonce).where(ended_sessions.c.nonce == payload["nonce"])
        if self._db.read(lambda connection: connection.execute(query).first()) is not None:
            raise _over()
        try:
            caller = self._keys.caller_of_key(payload["key"])
        except NotFound as err:
            raise _over() from err
        body = cookie.partition(".")[0]
        return Session(caller=caller, csrf_token=self._sign("csrf", body))

    def end(self, cookie: str) -> None:
        """End a session now, wherever its cookie is kept; raises ``Unauthorized`` like ``read``."""
        payload, now = self._payload(cookie), self._clock()
        row = {"nonce": payload["nonce"], "until": payload["until"]}

        def work(connection: Connection) -> None:
            connection.execute(ended_sessions.delete().where(ended_sessions.c.until <= now))
            same = ended_sessions.c.nonce == row["nonce"]
            if connection.execute(sa.select(ended_sessions.c.nonce).where(same)).first() is None:
                connection.execute(ended_sessions.insert().values(row))

        self._db.write(work)

    def _payload(self, cookie: str) -> JsonObject:
        """Return what a cookie says; raises ``Unauthorized`` unless it is ours and not over."""
        body, _, signature = cookie.partition(".")
        if not hmac.compare_digest(
            signature.encode("utf-8", "replace"), self._sign("session", body).encode()
        ):
            raise _over()
        try:
            payload: JsonObject = json.loads(base64.urlsafe_b64decode(body))
        except (ValueError, binascii.Error) as err:
            raise _over() from err
        if payload["until"] <= self._clock():
            raise _over()
        return payload

    def check_csrf(self, session: Session, sent: str | None) -> None:
        """Raise ``Forbidden`` unless ``sent`` is the session's token."""
        if not hmac.compare_digest((sent or "").encode(), session.csrf_token.encode()):
            msg = (
                "a change from a signed-in browser must come from one of our own pages "
                f"(header '{CSRF_HEADER}'); reload the page, or send the API key itself"
            )
            raise Forbidden(msg)

    def form_token(self, nonce: str) -> str:
        """Return the hidden field that goes with the cookie of a sign-in form."""
        return self._sign("form", nonce)

    def _sign(self, purpose: str, text: str) -> str:
        message = f"{purpose}:{text}".encode("utf-8", "replace")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def _over() -> Unauthorized:
    return Unauthorized("a session must be valid; this one is over: sign in again")


def _secret(path: Path) -> bytes:
    """Return the secret in ``path``; the first server to come makes it."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(_SECRET_BYTES))
    try:
        # A link appears whole or not at all, and only if nobody was first.
        os.link(made, path)
    except FileExistsError:
        pass
    finally:
        made.unlink()
    return path.read_bytes()
